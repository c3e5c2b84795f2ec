"""Groups of tokens inside a vision tower: each goes on as one row, and comes out as the tokens that it stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.errors import Unsupported
from vtok.kernels.merge import sizes
from vtok.types import Layout, Plane

GROUPS = "_vtok_groups"  # the attribute of a tensor that says how its rows are grouped


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


def groups_of(x: Tensor) -> Groups:
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
