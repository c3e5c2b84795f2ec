"""`compact_sequence` in Triton: one launch. Each token finds its new place by counting those kept before it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = {
    "TOKENS": 32,  # of one program
    "CHANNELS": 256,  # at once, of the
    "SPAN": 1024,  # of one program: fewer would mean to count more often
    "COUNTED": 1024,  # flags that are counted at once
}


def compact(
    keep: Tensor, length: int, embeds: Tensor, positions: Tensor, visual: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the twin in `compact_sequence`. Arguments of any strides; gradient flows to `embeds`."""
    return _Compact.apply(keep, length, embeds, positions, visual)


def _grid(batch: int, places: int, width: int) -> tuple[int, int, int]:
    return triton.cdiv(places, BLOCKS["TOKENS"]), max(1, triton.cdiv(width, BLOCKS["SPAN"])), batch


class _Compact(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keep: Tensor, length: int, embeds: Tensor, positions: Tensor, visual: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        (batch, places), width, axes = keep.shape, embeds.shape[2], len(positions)
        index = keep.new_empty(batch, length, dtype=torch.long)
        valid, flags = keep.new_empty(batch, length), visual.new_empty(batch, length)
        rows = embeds.new_empty(batch, length, width)
        moved = positions.new_empty(axes, batch, length)
        positions = positions.expand(-1, batch, -1)
        if batch and places:
            _forward[_grid(batch, places, width)](
                keep, embeds, positions, visual, index, valid, rows, moved, flags,
                *keep.stride(), *embeds.stride(), *positions.stride(), *visual.stride(),
                batch, places, length, width, axes, **BLOCKS,
            )  # fmt: skip
        ctx.save_for_backward(keep)
        ctx.mark_non_differentiable(index, valid, moved, flags)
        return index, valid, rows, moved, flags

    @staticmethod
    def backward(ctx: Any, _: Tensor, __: Tensor, grad: Tensor, *___: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        (batch, places), (length, width) = keep.shape, grad.shape[1:]
        out = grad.new_empty(batch, places, width)
        if batch and places:
            _backward[_grid(batch, places, width)](
                keep, grad, out, *keep.stride(), *grad.stride(), places, length, width, **BLOCKS
            )
        return None, None, out, None, None


@triton.jit
def _slots(keep, stride_t, first, places, length, TOKENS: tl.constexpr, COUNTED: tl.constexpr):
    """Of the tokens from `first` on: their places, whether each is kept, and its new place, below 0 for none."""
    total = tl.zeros([COUNTED], tl.int32)
    before = tl.zeros([COUNTED], tl.int32)
    for start in range(0, places, COUNTED):
        at = start + tl.arange(0, COUNTED)
        here = (tl.load(keep + at.to(tl.int64) * stride_t, at < places, 0) != 0).to(tl.int32)
        total += here
        before += tl.where(at < first, here, 0)
    t = first + tl.arange(0, TOKENS)
    kept = tl.load(keep + t.to(tl.int64) * stride_t, t < places, 0) != 0
    rank = tl.sum(before, 0) + tl.cumsum(kept.to(tl.int32), 0) - kept.to(tl.int32)  # kept ones before each
    order = tl.where(kept, places - tl.sum(total, 0) + rank, t - rank)  # the dropped ones first
    return t, kept, tl.where(t < places, order - (places - length), -1)


@triton.jit
def _forward(
    keep, embeds, positions, visual, index, valid, rows, moved, flags,
    stride_kb, stride_kt, stride_eb, stride_et, stride_ec, stride_pa, stride_pb, stride_pt, stride_vb, stride_vt,
    batch, places, length, width, axes,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * TOKENS
    t, kept, slot = _slots(keep + b * stride_kb, stride_kt, first, places, length, TOKENS, COUNTED)
    t, there, new = t.to(tl.int64), slot >= 0, b * length + slot  # [T]
    low = tl.program_id(1) * SPAN
    for start in range(low, tl.minimum(low + SPAN, width), CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        mask = there[:, None] & (c < width)[None, :]
        old = embeds + b * stride_eb + t[:, None] * stride_et + c[None, :] * stride_ec
        tl.store(rows + new[:, None] * width + c[None, :], tl.load(old, mask), mask)
    if tl.program_id(1) == 0:
        tl.store(index + new, t, there)
        tl.store(valid + new, kept, there)
        flag = tl.load(visual + b * stride_vb + t * stride_vt, there, 0) != 0
        tl.store(flags + new, flag & kept, there)
        for a in range(axes):
            old = positions + a * stride_pa + b * stride_pb + t * stride_pt
            tl.store(moved + a * batch * length + new, tl.load(old, there, 0), there)


@triton.jit
def _backward(
    keep, grad, out,
    stride_kb, stride_kt, stride_gb, stride_gt, stride_gc,
    places, length, width,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * TOKENS
    t, _, slot = _slots(keep + b * stride_kb, stride_kt, first, places, length, TOKENS, COUNTED)
    old, there = b * places + t, slot >= 0
    low = tl.program_id(1) * SPAN
    for start in range(low, tl.minimum(low + SPAN, width), CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        at = grad + b * stride_gb + slot.to(tl.int64)[:, None] * stride_gt + c[None, :] * stride_gc
        values = tl.load(at, there[:, None] & (c < width)[None, :], 0.0)  # 0 for tokens that are gone
        tl.store(out + old[:, None] * width + c[None, :], values, (t < places)[:, None] & (c < width)[None, :])
