"""Inside the encoder: tokens are grouped between the attention and the MLP of its blocks.

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

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok.compressor import Compressor
from vtok.engine.encode import EncoderCall
from vtok.engine.groups import GROUPS, Groups, gather, groups_of, leaders
from vtok.engine.prefill import Prefill
from vtok.engine.seams import Seam
from vtok.engine.trace import Part
from vtok.errors import PatchStateError, Unsupported
from vtok.stages.stage import Site, Stage
from vtok.tower import NEEDS, Tower, layer_index


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


@dataclass(frozen=True, kw_only=True)
class Blocks(Compressor):
    """A method that groups tokens inside the blocks of a vision transformer."""

    stage = "blocks"
    masks: ClassVar[bool] = False  # True if `bias()` may give something
    scatters: ClassVar[bool] = False  # True if it leaves single patches of a picture, which lie on no grid

    @property
    def replays(self) -> bool:
        return False  # what was merged with what inside the encoder is not recorded

    @abstractmethod
    def merged_at(self, n_blocks: int, patches: int) -> list[int]:
        """How many of a view's rows each block groups away.

        Raises `InvalidValue` where there are not the right number of blocks."""

    @abstractmethod
    def group(self, block: Block) -> tuple[Tensor, int] | None:
        """Which rows of a block go on as one: [B, n] the new row of each, and how many new rows there are; or None."""

    @abstractmethod
    def merge(self, x: Tensor, size: Tensor, group: Tensor, n: int) -> Tensor:
        """[B, n, D], the rows that `group()` asked for, of x [B, rows, D], which stand for `size` [B, rows] patches."""

    def bias(self, size: Tensor) -> Tensor | None:
        """[B, n] what is added to the attention logits of rows that stand for `size` [B, n] patches, or None."""
        return None


class BlocksStage(Stage[Blocks]):
    name = "blocks"
    in_encoder = True

    def __init__(self, compressor: Blocks, site: Site) -> None:
        super().__init__(compressor, site)
        needs = sorted({need for part in site.parts for need in part.needs_now & (NEEDS | {"crops", "frames"})})
        if compressor.scatters and needs:
            names = ", ".join(part.name for part in site.parts if part is not compressor)
            raise Unsupported(f"{names} needs {', '.join(needs)} of whole views, and {compressor!r} leaves parts.")
        tower, vit = site.adapter.tower(site.config), site.core.get_submodule(site.adapter.encoder)
        modules = tower.blocks(vit)
        n = len(modules) + 1  # hidden states; behind the block of the last that is read nothing matters
        self.grouping = Grouping(compressor, tower, n - 1, max(layer_index(x, n) for x in tower.features))
        tower.check(vit, compressor.masks)

    @property
    def drops(self) -> bool:
        return self.compressor.scatters  # else all tokens come out of the encoder again

    def encoder_hooks(self, site: Site) -> Iterable[tuple[Callable, Callable, dict[str, Any]]]:
        vit = site.core.get_submodule(site.adapter.encoder)
        check_tower(self.grouping.tower, vit, self.compressor)
        return self.grouping.hooks(self.grouping.tower.blocks(vit))

    def encode(self, call: EncoderCall, run: Callable[[], Any]) -> Any:
        if not self.compressor.scatters:
            return run()
        with self.grouping.noted() as rows:
            output = run()
        grouped = call.adapter.tower(call.core.config).arrange(torch.cat(rows), call.layouts)
        found = [leaders(layout, row, self.grouping.local.rows) for layout, row in zip(call.layouts, grouped)]
        call.small, call.sources, call.merged_into = zip(*found)
        return output

    def part(self, prefill: Prefill) -> Part:
        return Grouped(self.grouping)


def check_tower(tower: Tower, vit: nn.Module, compressor: Blocks) -> None:
    """Raise a `VtokError` where a compressor cannot act in the blocks of a vision transformer."""
    tower.check(vit, compressor.masks)
    if any(isinstance(hook, Seam) for block in tower.blocks(vit) for hook in block._forward_pre_hooks.values()):
        raise PatchStateError("This vision tower is patched already, alone or in another model. Unpatch that first.")


@dataclass(frozen=True)
class Grouped(Part):
    grouping: Grouping

    def merged_at(self, patches: int) -> Sequence[int]:
        return self.grouping.merged_at(patches)


class Grouping:
    """A compressor at work in the blocks of one tower. Holds no module. n_blocks: how many matter."""

    def __init__(self, compressor: Blocks, tower: Tower, depth: int, n_blocks: int | None = None) -> None:
        self.compressor, self.tower = compressor, tower
        self.protected = tower.skip
        self.n_blocks = depth if n_blocks is None else n_blocks
        self.merged_at(1)  # raises where there are not as many blocks as it says
        self.local = _Work(depth)

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

    @property
    def trace(self) -> VitTrace | None:
        """Of this thread's last forward; None before the first."""
        last = self.local.last
        return None if last is None else VitTrace(tuple(self.local.tokens), last.row.cpu())

    @contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """Within it, the group of each patch behind the last block that matters is noted, [views, P] a call."""
        self.local.seen = []
        try:
            yield self.local.seen
        finally:
            self.local.seen = None

    def _before_block(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        x, *rest = args
        groups = Groups.alone(x) if i == 0 else groups_of(x)
        rows = x if groups.trivial else gather(x, groups.first)
        setattr(rows, GROUPS, groups)
        return (rows, *rest), kwargs

    def _before_first(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.local.visits[i] = _Visit(groups_of(args[0]))

    def _before_attention(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        groups = self.local.visits[i].groups
        x = args[0] if args else kwargs["hidden_states"]
        setattr(x, GROUPS, groups)
        bias = None if groups.trivial else self.compressor.bias(groups.size)
        return None if bias is None else (args, self.tower.mask(kwargs, bias.to(x.dtype)))

    def _after_key(self, i: int, read: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        with torch.no_grad():
            self.local.visits[i].key = read(module, args, out)

    def _before_second(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        visit = self.local.visits[i]
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
        visit = self.local.visits[i]
        return None if visit.group is None else gather(out, visit.group)

    def _after_block(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Tensor) -> Tensor:
        visit = self.local.visits[i]
        groups = visit.groups
        self.local.tokens[i] = out.shape[1]
        if visit.group is not None:
            out = self._merged(visit, out)
            groups = groups.join(visit.group, visit.n)
        self.local.tokens[i + 1], self.local.last = out.shape[1], groups
        if i == self.n_blocks - 1:
            self.local.rows = out.shape[1] - self.protected
            if self.local.seen is not None:
                self.local.seen.append(groups.row[:, self.protected :] - self.protected)
        out = out if groups.trivial else gather(out, groups.row)
        setattr(out, GROUPS, groups)
        return out

    def _merged(self, visit: _Visit, x: Tensor) -> Tensor:
        return self.compressor.merge(x, visit.groups.size, visit.group, visit.n)


class _Work(threading.local):
    """What one thread is doing in the blocks.

    visits: of each block. tokens: of the last forward, rows that go into each block and come out of the last. last: its
    groups at the end. rows: patches and groups of them in a view, behind the last block that matters. seen: while
    somebody wants to know, the groups of each call.
    """

    def __init__(self, depth: int) -> None:
        self.visits: list[_Visit | None] = [None] * depth
        self.tokens = [0] * (depth + 1)
        self.last: Groups | None = None
        self.rows = 0
        self.seen: list[Tensor] | None = None


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
