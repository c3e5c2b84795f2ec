"""`attention_column_sums` in Triton: memory grows with the keys and with the queries, not with their product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok.kernels.attention_rows_triton import arguments, load_queries, log_sum_exp, logits


def softmax_column_sums(query: Tensor, key: Tensor, rows: Tensor, scaling: float, valid: Tensor) -> Tensor:
    """[B, L]; see the twin in `attention_column_sums`. Each program owns some keys, so that no sum depends on order."""
    common, sizes = arguments(query, key, rows, scaling, valid)
    batch, groups, length = key.shape[:3]
    sums = torch.zeros(batch, groups, length, dtype=torch.float32, device=key.device)
    if sums.numel() and rows.numel():
        grid = (triton.cdiv(length, sizes["BLOCK_N"]), batch * groups)
        _column_sums[grid](sums, log_sum_exp(common, sizes, query, key, rows), *common, **sizes)
    return sums.sum(1) / query.shape[1]


@triton.jit
def _column_sums(
    out, sums,
    query, key, rows, valid, scaling,
    stride_qb, stride_qh, stride_qq, stride_qd, stride_kb, stride_kg, stride_kl, stride_kd,
    stride_rb, stride_rr, stride_vb, stride_vl,
    groups, each, n_queries, length, n_rows, width,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    b, g = pair // groups, pair % groups
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, each * n_rows, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        values, row = load_queries(
            query, rows, stride_qb, stride_qh, stride_qq, stride_qd, stride_rb, stride_rr, b, g, m, each,
            length - n_queries, n_rows, width, HALF, BLOCK_D,
        )  # fmt: skip
        x = logits(
            values, row, key, valid, stride_kb, stride_kg, stride_kl, stride_kd, stride_vb, stride_vl, b, g, n, length,
            width, scaling, HALF, BLOCK_D,
        )  # fmt: skip
        there = m < each * n_rows
        x = tl.exp(x - tl.load(sums + pair * each * n_rows + m, there, 0.0)[:, None])
        total += tl.sum(tl.where((row >= 0)[:, None], x, 0.0), 0)
    tl.store(out + pair * length + n, total, n < length)
