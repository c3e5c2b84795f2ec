"""`farthest_points` in Triton: all picks after the first in one launch instead of four a pick."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def greedy_picks(similarity: Tensor, first: Tensor, k: int, weight: Tensor | None) -> Tensor:
    """[B, k]; see the twin in `farthest_points`. One program a picture, which holds what a pick needs in registers."""
    batch, n, _ = similarity.shape
    picks = torch.empty(batch, k, dtype=torch.long, device=similarity.device)
    block = triton.next_power_of_2(n)
    warps = min(16, max(1, block // 256))
    weighted = first if weight is None else weight.contiguous()  # where there is none it is not read
    _greedy_picks[(batch,)](
        similarity, first, picks, weighted, *similarity.stride(), k, n, weight is not None, BLOCK=block, num_warps=warps
    )
    return picks


@triton.jit
def _greedy_picks(
    similarity, first, picks, weight,
    stride_b, stride_row, stride_column, k, n,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    similarity += b * stride_b
    point = tl.arange(0, BLOCK)
    near = tl.where(point < n, -float("inf"), float("inf"))  # similarity to the nearest pick, +inf once picked
    pick = tl.load(first + b).to(tl.int32)
    if WEIGHTED:
        times = tl.load(weight + b * n + point, point < n, 0.0)
    for i in range(k):
        tl.store(picks + b * k + i, pick)
        row = tl.load(similarity + pick.to(tl.int64) * stride_row + point * stride_column, point < n, float("inf"))
        near = tl.where(point == pick, float("inf"), tl.maximum(near, row))
        far = near
        if WEIGHTED:  # infinite stays what it is
            far = tl.where(tl.abs(near) == float("inf"), near, times * (near - 1))
        pick = tl.argmin(far, 0)  # the lower index of equal ones
