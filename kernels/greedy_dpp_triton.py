"""`greedy_dpp` in Triton: all picks in one launch; the rows of the Cholesky factor stay in the card's cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok.kernels import greedy_dpp


def dpp_picks(kernel: Tensor, k: int) -> Tensor:
    """[B, k]; see the twin in `greedy_dpp`. One program a picture, which holds what a pick needs in registers."""
    batch, n, _ = kernel.shape
    picks = torch.empty(batch, k, dtype=torch.long, device=kernel.device)
    if not picks.numel():
        return picks
    factor = torch.empty(batch, k, n, dtype=torch.float32, device=kernel.device)
    block = triton.next_power_of_2(n)
    warps = min(16, max(1, block // 256))
    _dpp_picks[(batch,)](kernel, factor, picks, *kernel.stride(), k, n, greedy_dpp.SPENT, BLOCK=block, num_warps=warps)
    return picks


@triton.jit
def _dpp_picks(kernel, factor, picks, stride_b, stride_row, stride_column, k, n, limit, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    kernel += b * stride_b
    factor += b * k * n
    point = tl.arange(0, BLOCK)
    there = point < n
    diagonal = tl.load(kernel + point.to(tl.int64) * (stride_row + stride_column), there, 0.0).to(tl.float32)
    spent = diagonal / tl.maximum(tl.max(diagonal, 0), 1e-30) - 2
    left = diagonal
    taken = point >= n
    for i in range(k):
        score = tl.where(left > limit * diagonal, left, spent)
        pick = tl.argmax(tl.where(taken, -float("inf"), score), 0)  # the lower index of equal ones
        tl.store(picks + b * k + i, pick.to(tl.int64))
        here = point == pick
        own = tl.sum(tl.where(here, left, 0.0), 0)
        least = tl.sum(tl.where(here, limit * diagonal, 0.0), 0)
        row = kernel + pick.to(tl.int64) * stride_row + point * stride_column
        rest = tl.load(row, there, 0.0).to(tl.float32)
        for q in range(i):
            share = tl.load(factor + q * n + pick)
            rest -= share * tl.load(factor + q * n + point, there, 0.0)
        rest = tl.where(own > least, rest / tl.sqrt(tl.maximum(own, 1e-30)), 0.0)
        tl.store(factor + i * n + point, rest, there)
        tl.debug_barrier()  # the next pick reads what other threads wrote
        left -= rest * rest
        taken = taken | here
