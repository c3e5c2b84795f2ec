"""`pagerank` in Triton: M is made again for each iteration, a block in registers at a time; memory grows with H Q."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok.kernels.attention_rows_triton import arguments, load_queries, log_sum_exp, logits


def power_iteration(query: Tensor, key: Tensor, part: Tensor, scaling: float, iters: int, damping: float) -> Tensor:
    """[B, H, Q]; see the twin in `pagerank`. Each program owns some keys of a head, so that no sum depends on order."""
    batch, heads, length, _ = query.shape
    share = part / part.sum(1, keepdim=True).clamp(min=1)  # [B, Q], 1/n
    u = share[:, None].expand(-1, heads, -1).contiguous()
    if not u.numel():
        return u
    rows = torch.where(part, torch.arange(length, device=part.device), -1)  # [B, Q]
    common, sizes = arguments(query, key, rows, scaling, part)
    sums = log_sum_exp(common, sizes, query, key, rows)
    grid = (triton.cdiv(length, sizes["BLOCK_N"]), batch * heads)
    for _ in range(iters):
        flow = torch.empty_like(u)
        _flow[grid](flow, u, share, damping, sums, *common, **sizes)
        u = flow
    return u


@triton.jit
def _flow(
    out, u, share, damping, sums,
    query, key, rows, valid, scaling,
    stride_qb, stride_qh, stride_qq, stride_qd, stride_kb, stride_kg, stride_kl, stride_kd,
    stride_rb, stride_rr, stride_vb, stride_vl,
    groups, each, n_queries, length, n_rows, width,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    heads = groups * each
    b, h = pair // heads, pair % heads
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, length, BLOCK_M):  # earlier queries do not see these keys
        m = start + tl.arange(0, BLOCK_M)
        values, row = load_queries(
            query, rows, stride_qb, stride_qh, stride_qq, stride_qd, stride_rb, stride_rr, b, h, m, 1, 0, n_rows,
            width, HALF, BLOCK_D,
        )  # fmt: skip
        x = logits(
            values, row, key, valid, stride_kb, stride_kg, stride_kl, stride_kd, stride_vb, stride_vl, b, h // each, n,
            length, width, scaling, HALF, BLOCK_D,
        )  # fmt: skip
        at, there = pair * length + m, m < length
        x = tl.exp(x - tl.load(sums + at, there, 0.0)[:, None]) * tl.load(u + at, there, 0.0)[:, None]
        total += tl.sum(tl.where((row >= 0)[:, None], x, 0.0), 0)  # where a row sees nothing, x is not a number
    back = tl.load(share + b * length + n, n < length, 0.0)
    tl.store(out + pair * length + n, total * (1 - damping) + damping * back, n < length)
