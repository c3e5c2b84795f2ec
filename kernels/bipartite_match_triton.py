"""`bipartite_match` in Triton: norms, similarity and arg-max in one pass, no similarity matrix in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok.kernels.dispatch import takes_half


def best_partners(metric: Tensor, skip_even: int, skip_odd: int) -> tuple[Tensor, Tensor]:
    """Of each even token the highest cosine with an odd one, and which; see the twin in `bipartite_match`.

    metric [B, t, C] of any strides. Rows are scaled after they are multiplied, so that half floats go to the tensor
    cores as they are. Memory beyond the two results: none.
    """
    batch, t, width = metric.shape
    n_even, n_odd = (t + 1) // 2 - skip_even, t // 2 - skip_odd
    value = metric.new_empty(batch, n_even, dtype=torch.float32)
    partner = metric.new_empty(batch, n_even, dtype=torch.long)
    block = 64 if n_even > 32 else 16
    _best_partners[(triton.cdiv(n_even, block), batch)](
        metric,
        value,
        partner,
        *metric.stride(),
        n_even,
        n_odd,
        width,
        2 * skip_even,
        2 * skip_odd + 1,
        HALF=takes_half(metric),
        BLOCK_M=block,
        BLOCK_N=64,
        BLOCK_C=32,
    )
    return value, partner


@triton.jit
def _best_partners(
    metric,
    value,
    partner,
    stride_b,
    stride_t,
    stride_c,
    n_even,
    n_odd,
    width,
    first_even,
    first_odd,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    metric += b * stride_b
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = metric + (first_even + 2 * m.to(tl.int64))[:, None] * stride_t  # [M, 1] where the even tokens begin
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    where = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, n_odd, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        columns = metric + (first_odd + 2 * n.to(tl.int64))[None, :] * stride_t  # [1, N]
        dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        even_square = tl.zeros([BLOCK_M], tl.float32)
        odd_square = tl.zeros([BLOCK_N], tl.float32)
        for low in range(0, width, BLOCK_C):
            c = low + tl.arange(0, BLOCK_C)
            even = tl.load(rows + c[None, :] * stride_c, (m < n_even)[:, None] & (c < width)[None, :], 0.0)
            odd = tl.load(columns + c[:, None] * stride_c, (n < n_odd)[None, :] & (c < width)[:, None], 0.0)
            even32, odd32 = even.to(tl.float32), odd.to(tl.float32)
            even_square += tl.sum(even32 * even32, 1)
            odd_square += tl.sum(odd32 * odd32, 0)
            if HALF:
                dot = tl.dot(even, odd, dot)
            else:
                dot = tl.dot(even32, odd32, dot, input_precision="ieee")
        even_norm = tl.maximum(tl.sqrt(even_square), 1e-12)[:, None]
        odd_norm = tl.maximum(tl.sqrt(odd_square), 1e-12)[None, :]
        cosine = dot / even_norm / odd_norm
        # NaN and infinities, of which the square is no number below infinity, count as a cosine of 0
        finite = (even_square < float("inf"))[:, None] & (odd_square < float("inf"))[None, :]
        cosine = tl.where(finite, cosine, 0.0)
        cosine = tl.where((n < n_odd)[None, :], cosine, -float("inf"))
        top, place = tl.max(cosine, 1, return_indices=True)  # the lower index of equal ones
        better = top > best  # and the earlier block
        best = tl.where(better, top, best)
        where = tl.where(better, start + place, where)
    out = b * n_even + m
    tl.store(value + out, best, m < n_even)
    tl.store(partner + out, first_odd + 2 * where, m < n_even)
