"""`greedy_coverage` in Triton: a launch a pick, in which each program scores some candidates again; no difference is
ever stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok.kernels.greedy_coverage import first_scores


def coverage_picks(covers: Tensor, weight: Tensor, valid: Tensor, k: int) -> Tensor:
    """[B, k]; see the twin in `greedy_coverage`. Scores and coverage go from one buffer to another, so that no program
    overwrites what one of the same launch still reads."""
    batch, n, r = covers.shape
    picks = torch.empty(batch, k, dtype=torch.long, device=covers.device)
    if not picks.numel():
        return picks
    weight = weight.contiguous()
    score = first_scores(covers, weight, valid).contiguous()
    covered = covers.new_zeros(batch, r)
    new_score, new_covered = torch.empty_like(score), torch.empty_like(covered)
    grid = (triton.cdiv(n, 16), batch)
    for i in range(k):
        _pick[grid](
            covers, weight, score, covered, new_score, new_covered, picks, *covers.stride(), i, k, n, r,
            BLOCK=triton.next_power_of_2(n), BLOCK_V=16, BLOCK_U=128,
        )  # fmt: skip
        score, new_score, covered, new_covered = new_score, score, new_covered, covered
    return picks


@triton.jit
def _pick(
    covers, weight, score, covered, new_score, new_covered, picks, stride_b, stride_v, stride_u, i, k, n, r,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    covers += b * stride_b
    every = tl.arange(0, BLOCK)
    pick = tl.argmax(tl.load(score + b * n + every, every < n, -float("inf")), 0)  # the lower index of equal ones
    mine = tl.program_id(0) == 0
    tl.store(picks + b * k + i, pick.to(tl.int64), mine)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = covers + v.to(tl.int64)[:, None] * stride_v
    gain = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, r, BLOCK_U):
        u = start + tl.arange(0, BLOCK_U)
        held = tl.load(covered + b * r + u, u < r, 0.0)
        best = tl.load(covers + pick.to(tl.int64) * stride_v + u * stride_u, u < r, 0.0)
        held = tl.maximum(held, best.to(tl.float32))
        tl.store(new_covered + b * r + u, held, (u < r) & mine)
        x = tl.load(row + u[None, :] * stride_u, (v < n)[:, None] & (u < r)[None, :], 0.0)
        gain += tl.sum(tl.maximum(x.to(tl.float32) - held[None, :], 0.0), 1)
    old = tl.load(score + b * n + v, v < n, 0.0)
    new = tl.where(old >= 0, gain * tl.load(weight + b * n + v, v < n, 0.0), old)
    tl.store(new_score + b * n + v, tl.where(v == pick, -float("inf"), new), v < n)
