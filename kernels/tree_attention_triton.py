"""`tree_attention` in Triton: parts of the columns by themselves, so that few drafts too fill a card, then one merge.

Row m of group g is head g * H/G + m // N and new token m % N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok.kernels.dispatch import takes_half

BLOCK_N = 64  # columns
SPLITS = 32  # parts


def attend_tree(
    query: Tensor, key: Tensor, value: Tensor, tree: Tensor, scaling: float, valid: Tensor | None
) -> Tensor:
    """[B, H, N, d]; see the twin in `tree_attention`."""
    (batch, heads, n, width), (groups, length), wide = query.shape, key.shape[1:3], value.shape[3]
    each = heads // groups
    padded = valid is not None
    if padded and valid.ndim == 2:
        valid = valid[:, None].expand(-1, groups, -1)
    known = valid if padded else tree[None].expand(batch, -1, -1)  # something to point at, which is not read
    span = BLOCK_N * triton.cdiv(triton.cdiv(length, BLOCK_N), SPLITS)  # columns of one part
    splits = triton.cdiv(length, span)
    out = torch.empty(splits, batch, heads, n, wide, dtype=torch.float32, device=key.device)
    sums = torch.empty(splits, batch, heads, n, dtype=torch.float32, device=key.device)
    block_m = 16 if each * n <= 16 else 32 if each * n <= 32 or width > 128 else 64
    grid = (splits, triton.cdiv(each * n, block_m), batch * groups)
    strides = (*query.stride(), *key.stride(), *value.stride(), *tree.stride(), *known.stride())
    _attend[grid](
        out, sums, query, key, value, tree, known, float(scaling), *strides, span, groups, each, n, length, width, wide,
        PADDED=padded, HALF=takes_half(query, key, value), BLOCK_M=block_m, BLOCK_N=BLOCK_N,
        BLOCK_D=max(16, triton.next_power_of_2(width)), BLOCK_V=max(16, triton.next_power_of_2(wide)), num_stages=2,
    )  # fmt: skip
    weight = sums.softmax(0)[..., None]  # of a part that sees nothing 0
    return (out * weight).sum(0).to(query.dtype)


@triton.jit
def _attend(
    out, sums, query, key, value, tree, valid, scaling,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kg, stride_kl, stride_kd,
    stride_vb, stride_vg, stride_vl, stride_vd, stride_ti, stride_tj, stride_pb, stride_pg, stride_pl,
    span, groups, each, n, length, width, wide,
    PADDED: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(2).to(tl.int64)
    b, g = pair // groups, pair % groups
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = m < each * n
    head, i = g * each + m // n, m % n
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    start = query + b * stride_qb + head * stride_qh + i * stride_qn
    rows = tl.load(start[:, None] + d[None, :] * stride_qd, there[:, None] & (d < width)[None, :], 0.0)
    if not HALF:
        rows = rows.to(tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    past, first = length - n, tl.program_id(0) * span
    for begin in range(first, tl.minimum(first + span, length), BLOCK_N):
        c = begin + tl.arange(0, BLOCK_N)
        cached = c < past
        present = c < length
        if PADDED:
            present = present & (tl.load(valid + b * stride_pb + g * stride_pg + c * stride_pl, cached, 1) != 0)
        drafts = there[:, None] & present[None, :] & (c >= past)[None, :]
        below = tl.load(tree + i[:, None] * stride_ti + (c - past)[None, :] * stride_tj, drafts, 0) != 0
        seen = there[:, None] & present[None, :] & (cached[None, :] | below)
        at = c.to(tl.int64)
        keys = tl.load(
            key + b * stride_kb + g * stride_kg + at[None, :] * stride_kl + d[:, None] * stride_kd,
            present[None, :] & (d < width)[:, None], 0.0,
        )  # fmt: skip
        values = tl.load(
            value + b * stride_vb + g * stride_vg + at[:, None] * stride_vl + e[None, :] * stride_vd,
            present[:, None] & (e < wide)[None, :], 0.0,
        )  # fmt: skip
        if HALF:
            x = tl.dot(rows, keys)
        else:
            x = tl.dot(rows, keys.to(tl.float32), input_precision="ieee")
        x = tl.where(seen, x * scaling, -float("inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        level = tl.where(higher == -float("inf"), 0.0, higher)  # -inf - -inf is not a number
        shrink, weights = tl.exp(top - level), tl.exp(x - level[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if HALF:
            more = tl.dot(weights.to(values.dtype), values)
        else:
            more = tl.dot(weights, values.to(tl.float32), input_precision="ieee")
        mean = mean * shrink[:, None] + more
        top = higher
    level = tl.where(top == -float("inf"), 0.0, top)
    row = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + pair) * each * n + m
    tl.store(sums + row, level + tl.log(total), there)
    safe = tl.where(total == 0, 1.0, total)
    tl.store(out + row[:, None] * wide + e[None, :], mean / safe[:, None], there[:, None] & (e < wide)[None, :])
