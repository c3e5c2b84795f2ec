"""Compact a sequence: the kept tokens of each row, one after the other, with all that goes along with them."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.kernels.dispatch import dispatch, operation


def compact_sequence(
    keep: Tensor, length: int, embeds: Tensor, positions: Tensor, visual: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kept tokens of each row of a batch, in order and aligned on the right, with padding on the left.

    keep: [B, S] bool. length: L, at least the most that a row keeps, at most S. embeds: [B, S, D], any dtype.
    positions: position ids, [B or 1, S] or [3 or 4, B or 1, S]. Of 4 the first (text positions) is dropped: once it has
        gaps it would be read as packed sequences.
    visual: [B, S] bool, flags of the tokens.
    Returns index [B, L] long (where each token was, no two alike; padding stands for dropped tokens), valid [B, L] bool
    (false for padding), embeds [B, L, D], positions [B, L] or [3, B, L], and visual [B, L] bool (false for padding).
    Gradient flows to embeds. backend: "auto", "torch" or "triton", see `dispatch`.
    """
    axes = positions[None] if positions.ndim == 2 else positions[-3:]  # [1 or 3, B or 1, S]
    index, valid, embeds, axes, visual = dispatch(compact, backend, keep, length, embeds, axes, visual)
    return index, valid, embeds, axes[0] if positions.ndim == 2 else axes, visual


def kept_last(keep: Tensor, length: int) -> Tensor:
    """[B, length] the last places when the dropped ones go first: those that are kept, each in its order."""
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, order.shape[1] - length :].contiguous()


def _shapes(
    keep: Tensor, length: int, embeds: Tensor, positions: Tensor, visual: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = len(keep)
    return (
        keep.new_empty(batch, length, dtype=torch.long),
        keep.new_empty(batch, length),
        embeds.new_empty(batch, length, embeds.shape[2]),
        positions.new_empty(len(positions), batch, length),
        visual.new_empty(batch, length),
    )


@operation(_shapes, differentiable=True)
def compact(
    keep: Tensor, length: int, embeds: Tensor, positions: Tensor, visual: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`compact_sequence` in plain torch, for positions [A, B or 1, S] -> [A, B, L]."""
    index = kept_last(keep, length)
    valid = keep.gather(1, index)
    rows = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[2]))
    axes = positions.expand(-1, len(keep), -1).gather(2, index.expand(len(positions), -1, -1))
    return index, valid, rows, axes, visual.gather(1, index) & valid
