"""`redundancy_counts` in Triton: similarities are made, compared and counted in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok.kernels.dispatch import takes_half


def close_keys(keys: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """[B, N]; see the twin in `redundancy_counts`. One launch for the norms, one for the counts; memory grows with N.

    keys and valid of any strides. Similarities are scaled after they are multiplied, so that half floats go to the
    tensor cores as they are. Each program owns some keys.
    """
    batch, n, width = keys.shape
    counts = torch.empty(batch, n, dtype=torch.long, device=keys.device)
    scale = torch.empty(batch, n, dtype=torch.float32, device=keys.device)
    if counts.numel():
        half, block = takes_half(keys), 128 if n > 1024 else 64
        strides = (*keys.stride(), *valid.stride())
        _scales[(triton.cdiv(n, 16), batch)](keys, valid, scale, *strides, n, width, BLOCK_N=16, BLOCK_C=128)
        _close_keys[(triton.cdiv(n, block), batch)](
            keys,
            scale,
            counts,
            *keys.stride(),
            n,
            width,
            threshold,
            HALF=half,
            BLOCK_M=block,
            BLOCK_N=block,
            BLOCK_C=32,
            num_warps=block // 16,
            num_stages=3 if half else 2,  # what fits in the shared memory of small cards
        )
    return counts


@triton.jit
def _scales(
    keys, valid, scale, stride_b, stride_n, stride_c, stride_vb, stride_vn, n, width,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """1 / length of each key; 0 of one whose square is no number below infinity; -1 of one that is not valid."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = tl.load(valid + b * stride_vb + row.to(tl.int64) * stride_vn, row < n, 0) != 0
    start = keys + b * stride_b + row.to(tl.int64)[:, None] * stride_n
    square = tl.zeros([BLOCK_N], tl.float32)
    for low in range(0, width, BLOCK_C):
        c = low + tl.arange(0, BLOCK_C)
        x = tl.load(start + c[None, :] * stride_c, there[:, None] & (c < width)[None, :], 0.0).to(tl.float32)
        square += tl.sum(x * x, 1)
    inverse = tl.where(square < float("inf"), 1 / tl.maximum(tl.sqrt(square), 1e-12), 0.0)
    tl.store(scale + b * n + row, tl.where(there, inverse, -1.0), row < n)


@triton.jit
def _close_keys(
    keys, scale, counts, stride_b, stride_n, stride_c, n, width, threshold,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    keys += b * stride_b
    scale += b * n
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_scale = tl.load(scale + row, row < n, -1.0)
    rows = keys + row.to(tl.int64)[:, None] * stride_n  # [M, 1]
    total = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        column_scale = tl.load(scale + column, column < n, -1.0)
        columns = keys + column.to(tl.int64)[None, :] * stride_n  # [1, N]
        dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for low in range(0, width, BLOCK_C):
            c = low + tl.arange(0, BLOCK_C)
            x = tl.load(rows + c[None, :] * stride_c, (row < n)[:, None] & (c < width)[None, :], 0.0)
            y = tl.load(columns + c[:, None] * stride_c, (column < n)[None, :] & (c < width)[:, None], 0.0)
            if HALF:
                dot = tl.dot(x, y, dot)
            else:
                dot = tl.dot(x.to(tl.float32), y.to(tl.float32), dot, input_precision="ieee")
        # keys that are not finite count as zeros, and rounding must not lift equal ones above 1
        finite = (row_scale > 0)[:, None] & (column_scale > 0)[None, :]
        cosine = tl.where(finite, tl.minimum(dot * row_scale[:, None] * column_scale[None, :], 1.0), 0.0)
        other = (column_scale >= 0)[None, :] & (row[:, None] != column[None, :])
        total += tl.sum(((cosine > threshold) & other).to(tl.int32), 1)
    tl.store(counts + b * n + row, tl.where(row_scale >= 0, total, 0), row < n)
