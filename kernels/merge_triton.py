"""`merge` in Triton: members are read once and added in a fixed order, with no copies and no atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok.kernels.merge import members

BLOCK_C = 1024  # channels of one program at most
MEMBERS = 4  # that are read at once
TOKENS = 4  # of one program on the way back


def group_means(x: Tensor, group: Tensor, n: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means [B, n, D] and sizes [B, n]; see the twin in `merge`. Arguments of any strides; gradient flows to x."""
    return _GroupMeans.apply(x, group, n, torch.ones(group.shape, device=x.device) if size is None else size)


class _GroupMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Tensor, n: int, size: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        mean = x.new_empty(batch, n, width)
        total = x.new_empty(batch, n, dtype=torch.float32)
        order, starts = members(group, n)
        block = min(BLOCK_C, triton.next_power_of_2(width))
        if total.numel():
            _means[(batch * n, triton.cdiv(width, block))](
                x, size, order, starts, mean, total, *x.stride(), *size.stride(), length, width, MEMBERS, block
            )
        ctx.save_for_backward(group, size, total)
        ctx.mark_non_differentiable(total)
        return mean, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        group, size, total = ctx.saved_tensors
        (batch, length), (n, width) = group.shape, grad.shape[1:]
        out = grad.new_empty(batch, length, width)
        block = min(BLOCK_C, triton.next_power_of_2(width))
        if out.numel():
            _to_members[(triton.cdiv(length, TOKENS), triton.cdiv(width, block), batch)](
                grad, group, size, total, out,
                *grad.stride(), *group.stride(), *size.stride(), length, n, width, TOKENS, block,
            )  # fmt: skip
        return out, None, None, None


@triton.jit
def _means(
    x, size, order, starts, mean, total,
    stride_xb, stride_xt, stride_xc, stride_sb, stride_st,
    length, width,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of the B * n groups
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros([BLOCK_C], wide)
    weights = tl.zeros([BLOCK_M], tl.float32)
    end = tl.load(starts + row + 1)
    for first in range(tl.load(starts + row), end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        token = tl.load(order + m, m < end, 0)
        b, t = token // length, token % length
        s = tl.load(size + b * stride_sb + t * stride_st, m < end, 0.0).to(tl.float32)
        rows = x + b * stride_xb + t * stride_xt
        values = tl.load(rows[:, None] + c[None, :] * stride_xc, (m < end)[:, None] & (c < width)[None, :], 0.0)
        sums += tl.sum(values.to(wide) * s[:, None].to(wide), 0)
        weights += s
    weight = tl.sum(weights, 0)
    out = sums / tl.where(weight == 0.0, 1.0, weight).to(wide)
    tl.store(mean + row * width + c, out.to(mean.dtype.element_ty), c < width)
    if tl.program_id(1) == 0:
        tl.store(total + row, weight)


@triton.jit
def _to_members(
    grad, group, size, total, out,
    stride_gb, stride_gn, stride_gc, stride_b, stride_t, stride_sb, stride_st,
    length, n, width,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A token's part of the gradient of its group's mean."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    g = tl.load(group + b * stride_b + t * stride_t, t < length, -1)
    s = tl.load(size + b * stride_sb + t * stride_st, t < length, 0.0).to(tl.float32)
    whole = tl.load(total + b * n + g, g >= 0, 0.0)
    wide: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    share = s.to(wide) / tl.where(whole == 0.0, 1.0, whole).to(wide)
    rows = grad + b * stride_gb + g * stride_gn
    values = tl.load(rows[:, None] + c[None, :] * stride_gc, (g >= 0)[:, None] & (c < width)[None, :], 0.0)
    values = values.to(wide) * share[:, None]
    at = out + (b * length + t) * width
    tl.store(at[:, None] + c[None, :], values.to(out.dtype.element_ty), (t < length)[:, None] & (c < width)[None, :])
