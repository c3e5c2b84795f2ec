"""Compressors that act inside the blocks of a vision tower, which `vtok.tower.Tower.parts` describes.

A block is two residual branches: attention, then an MLP that treats each token alone. Between the two, tokens may be
grouped, and a group goes on as one token. Nothing outside of the blocks notices: between blocks each token is there,
with its group's feature, and inside one a group is one row. So poolers, heads, `forward_intermediates`, hidden states
and probes find what they expect, whatever the family.

    block, before      one row a group is picked
    attention, before  groups attend by their sizes (an additive mask)
    MLP's norm, before the compressor groups rows by their keys; each group becomes one row
    MLP, after         each row gets its group's row back, for the residual sum
    block, after       the sum is grouped, and then spread over all tokens

The groups travel on the tensors that they describe: a forward may be run again by gradient checkpointing long after the
next one has begun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtok.errors import Unsupported
from vtok.kernels.merge import sizes
from vtok.types import Layout, Plane

if TYPE_CHECKING:
    from vtok.compressor import Compressor
    from vtok.tower import Tower

GROUPS = "_vtok_groups"  # the attribute of a tensor that says how its rows are grouped


@dataclass(frozen=True)
class Block:
    """What a compressor sees of a block after its attention. Nothing here carries gradient.

    index, n_blocks: which of how many blocks that matter (a later one's output is not used).
    key: [B, n, d] mean over heads of the keys, before any rotary embedding; class and register tokens come first.
    size: [B, n] fp32, how many patches each row stands for.
    protected: how many rows in front may not be grouped. patches: of a view, when nothing was grouped.
    """

    index: int
    n_blocks: int
    key: Tensor
    size: Tensor
    protected: int
    patches: int


@dataclass(frozen=True)
class Groups:
    """How the N tokens of each view are grouped.

    row: [B, N] long, the row of each token among the n that are computed.
    first: [B, n] long, the first token of each row. size: [B, n] fp32, how many tokens it stands for.
    """

    row: Tensor
    first: Tensor
    size: Tensor

    @staticmethod
    def alone(x: Tensor) -> Groups:
        """Each token of x [B, N, D] for itself."""
        place = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return Groups(place, place, torch.ones(place.shape, device=x.device))

    def join(self, group: Tensor, n: int) -> Groups:
        """After the rows were grouped once more: group [B, rows], of each the one it goes into among `n`."""
        first = self.first.new_full((len(group), n), self.row.shape[1])
        return Groups(
            group.gather(1, self.row),
            first.scatter_reduce(1, group, self.first, "amin"),
            sizes(self.size, group, n),
        )

    @property
    def trivial(self) -> bool:
        return self.first.shape[1] == self.row.shape[1]


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x [B, L, D] by index [B, L'] -> [B, L', D]. Whole rows are copied, which `Tensor.gather` does not know."""
    return x.flatten(0, 1).index_select(0, flat(index, x.shape[1])).unflatten(0, index.shape)


def flat(index: Tensor, length: int) -> Tensor:
    """index [B, L'], each into `length` rows, as one [B * L'] into the rows of all."""
    return (index + length * torch.arange(len(index), device=index.device)[:, None]).flatten()


def full(x: Tensor) -> Tensor:
    """The input of a block or of its attention, with a row for each token again, each with its group's feature."""
    groups: Groups | None = getattr(x, GROUPS, None)
    return x if groups is None or groups.trivial else gather(x, groups.row)


class Blocks:
    """A compressor at work in the blocks of one tower. Holds no module.

    n_blocks: how many matter. tokens: of the last forward, rows that go into each block and come out of the last.
    """

    def __init__(self, compressor: Compressor, tower: Tower, depth: int, n_blocks: int | None = None) -> None:
        self.compressor, self.tower = compressor, tower
        self.protected = tower.skip
        self.n_blocks = depth if n_blocks is None else n_blocks
        self.tokens = [0] * (depth + 1)
        self.last: Groups | None = None
        self.rows = 0  # patches and groups of them in a view, behind the last block that matters
        self._seen: list[Tensor] | None = None
        self.merged_at(1)  # raises where there are not as many blocks as it says
        self.visits: list[_Visit | None] = [None] * depth

    def hooks(
        self, blocks: Sequence[nn.Module]
    ) -> Iterator[tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]]:
        """(register, hook, options) for each seam; all hooks take keywords."""
        for i, block in enumerate(blocks):
            parts = self.tower.parts(block)
            key, read = parts.key
            ahead = {"prepend": True}  # of transformers' own, which note hidden states
            yield block.register_forward_pre_hook, partial(self._before_block, i), {}
            yield parts.first.register_forward_pre_hook, partial(self._before_first, i), {}
            yield parts.attention.register_forward_pre_hook, partial(self._before_attention, i), {}
            yield key.register_forward_hook, partial(self._after_key, i, read), {}
            yield parts.second.register_forward_pre_hook, partial(self._before_second, i), {}
            yield parts.last.register_forward_hook, partial(self._after_last, i), {}
            yield block.register_forward_hook, partial(self._after_block, i), ahead

    def merged_at(self, patches: int) -> list[int]:
        """How many rows each block groups away, of a view of so many patches."""
        return self.compressor.merged_at(self.n_blocks, patches)

    def trace(self) -> VitTrace:
        return VitTrace(tuple(self.tokens), self.last.row.cpu())

    @contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """Within it, the group of each patch behind the last block that matters is noted, [views, P] a call."""
        self._seen = []
        try:
            yield self._seen
        finally:
            self._seen = None

    def _before_block(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        x, *rest = args
        groups = Groups.alone(x) if i == 0 else _groups_of(x)
        rows = x if groups.trivial else gather(x, groups.first)
        setattr(rows, GROUPS, groups)
        return (rows, *rest), kwargs

    def _before_first(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.visits[i] = _Visit(_groups_of(args[0]))

    def _before_attention(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        groups = self.visits[i].groups
        x = args[0] if args else kwargs["hidden_states"]
        setattr(x, GROUPS, groups)
        bias = None if groups.trivial else self.compressor.bias(groups.size)
        return None if bias is None else (args, self.tower.mask(kwargs, bias.to(x.dtype)))

    def _after_key(self, i: int, read: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        with torch.no_grad():
            self.visits[i].key = read(module, args, out)

    def _before_second(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        visit = self.visits[i]
        groups, key, visit.key = visit.groups, visit.key, None
        if i >= self.n_blocks:
            return None
        patches = groups.row.shape[1] - self.protected
        with torch.no_grad():
            answer = self.compressor.group(Block(i, self.n_blocks, key, groups.size, self.protected, patches))
        if answer is None:
            return None
        visit.group, visit.n = answer
        return (self._merged(visit, args[0]), *args[1:]), kwargs

    def _after_last(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Tensor) -> Any:
        visit = self.visits[i]
        return None if visit.group is None else gather(out, visit.group)

    def _after_block(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Tensor) -> Tensor:
        visit = self.visits[i]
        groups = visit.groups
        self.tokens[i] = out.shape[1]
        if visit.group is not None:
            out = self._merged(visit, out)
            groups = groups.join(visit.group, visit.n)
        self.tokens[i + 1], self.last = out.shape[1], groups
        if i == self.n_blocks - 1:
            self.rows = out.shape[1] - self.protected
            if self._seen is not None:
                self._seen.append(groups.row[:, self.protected :] - self.protected)
        out = out if groups.trivial else gather(out, groups.row)
        setattr(out, GROUPS, groups)
        return out

    def _merged(self, visit: _Visit, x: Tensor) -> Tensor:
        return self.compressor.merge(x, visit.groups.size, visit.group, visit.n)


@dataclass
class _Visit:
    """What is going on in one block. Its hooks run one after the other, also when the block is run again."""

    groups: Groups
    key: Tensor | None = None
    group: Tensor | None = None
    n: int = 0


@dataclass(frozen=True)
class VitTrace:
    """What a vision transformer alone merged in its last forward.

    tokens: rows that went into each block and, last, came out of the last one, class and register tokens among them.
    merged_at: how many each block merged away. groups: [B, N] long on the CPU, the group of each token at the end.
    """

    tokens: tuple[int, ...]
    groups: Tensor

    @property
    def merged_at(self) -> tuple[int, ...]:
        return tuple(a - b for a, b in pairwise(self.tokens))

    def to_dict(self) -> dict[str, Any]:
        return {"tokens": list(self.tokens), "merged_at": list(self.merged_at), "groups": self.groups.tolist()}


def _groups_of(x: Tensor) -> Groups:
    groups = getattr(x, GROUPS, None)
    if groups is None:
        raise Unsupported(
            "A block of the vision tower was not given what the block before it gave. Gradient checkpointing must be "
            "non-reentrant (use_reentrant=False), and one device must hold the whole tower."
        )
    return groups


def leaders(layout: Layout, row: Tensor, n: int) -> tuple[Layout, Tensor, Tensor]:
    """The layout in which each group is one token, where a token of `layout` is a patch.

    row: [V, P] the group of each patch of each view, 0 .. n-1. A group stands where its first token stands, and one
    that was cut away with the padding is not there. Returns the layout, each of its planes a single row; the [n']
    tokens of `layout` that stand for its tokens; and for each of the N tokens of `layout` the one that stands for it.
    Waits for the device where padding was cut away, as the content then says how many are left.
    """
    device, (views, patches) = row.device, row.shape
    place, first_view = [], 0
    for plane in layout.planes:
        y, x = plane.mosaic_rows(device), plane.mosaic_cols(device)
        rows, cols = plane.view_shape
        view = first_view + (y // rows)[:, None] * plane.crop_grid[1] + x // cols
        place.append((view * patches + (y % rows)[:, None] * cols + x % cols).flatten())
        first_view += plane.views
    apart = row + torch.arange(views, device=device)[:, None] * patches  # [V, P] groups of all views
    group = apart.flatten()[torch.cat(place)]  # [N]
    token = torch.arange(layout.n, device=device)
    first = torch.full((views * patches,), layout.n, device=device).scatter_reduce(0, group, token, "amin")
    leader = first[group]  # [N]
    leads = leader == token
    if layout.n == views * patches:
        counts = [n * plane.views for plane in layout.planes]
    else:
        counts = torch.stack([part.sum() for part in leads.split([plane.size for plane in layout.planes])]).tolist()
    planes = tuple(Plane(1, count, "image", plane.box) for plane, count in zip(layout.planes, counts))
    source = torch.nonzero_static(leads, size=sum(counts)).squeeze(1)
    return Layout(planes, modality=layout.modality), source, leader
