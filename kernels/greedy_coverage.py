"""Greedy maximum coverage: each pick adds as much as can be to what those before it cover."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.kernels.dispatch import dispatch, operation

BLOCK = 32  # candidates that are scored again at once on a CPU


@torch.no_grad()
def greedy_coverage(
    covers: Tensor, k: int, weight: Tensor | None = None, valid: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Pick `k` of N candidates, each with the largest gain (SCOPE, arXiv 2510.24214; MMTok, arXiv 2508.18264).

    covers: [B, N, R], any float dtype, finite: how far candidate v covers u; below 0 counts as 0. 0 <= k <= N.
    weight: [B, N] >= 0 or None for 1. valid: [B, N] bool or None for all: others come last, in their order.
    With c_u the most that a pick covers u, 0 at first, the gain of v is weight_v * sum_u max(0, covers_vu - c_u). It
    never grows, so on a CPU only the best of what was scored before an earlier pick is scored again. Rounding is
    monotone where the order of a sum does not change, so the picks are those of scoring all. Ties go to the lower
    index.
    Returns [B, k] long, in the order of picking, all distinct. Never waits for the device.
    backend: "auto", "torch" or "triton", see `dispatch`.
    """
    covers = covers.detach().float().contiguous()
    if weight is None:
        weight = covers.new_ones(covers.shape[:2])
    if valid is None:
        valid = torch.ones_like(weight, dtype=torch.bool)
    return dispatch(coverage_picks, backend, covers, weight.detach().float(), valid, k)


@operation(lambda covers, weight, valid, k: covers.new_empty(len(covers), k, dtype=torch.long))
def coverage_picks(covers: Tensor, weight: Tensor, valid: Tensor, k: int) -> Tensor:
    """`greedy_coverage` in plain torch. Which candidates are scored again is known on the host alone, so that on other
    devices, and in compiled code, all are."""
    if covers.device.type == "cpu" and not torch.compiler.is_compiling():
        picks = [torch.tensor(_lazy(*picture, k), dtype=torch.long) for picture in zip(covers, weight, valid)]
        return torch.stack(picks) if picks else torch.empty(0, k, dtype=torch.long)
    return _full(covers, weight, valid, k)


def first_scores(covers: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """[..., N] of each candidate before anything is picked; -1 for those that are not valid."""
    return torch.where(valid, covers.clamp(min=0).sum(-1) * weight, -1.0)


def _full(covers: Tensor, weight: Tensor, valid: Tensor, k: int) -> Tensor:
    picture = torch.arange(len(covers), device=covers.device)
    score, covered, picks = first_scores(covers, weight, valid), covers.new_zeros(len(covers), covers.shape[2]), []
    for _ in range(k):
        pick = score.argmax(1)  # the lower index of equal ones
        picks.append(pick)
        covered = torch.maximum(covered, covers[picture, pick])
        gain = (covers - covered[:, None]).clamp_(min=0).sum(2) * weight
        score = torch.where(score >= 0, gain, score).scatter(1, pick[:, None], -torch.inf)
    return torch.stack(picks, 1) if picks else score.new_empty(len(score), 0, dtype=torch.long)


def _lazy(covers: Tensor, weight: Tensor, valid: Tensor, k: int) -> list[int]:
    """The picks of one picture, covers [N, R]."""
    bound = first_scores(covers, weight, valid)  # below 0 for what is picked, or scored with the coverage as it is
    scored, best = torch.full_like(bound, -1.0), -1.0
    covered, rows, picks = covers.new_zeros(covers.shape[1]), covers.new_empty(0, covers.shape[1]), []
    while len(picks) < k:
        most, stale = bound.topk(min(BLOCK, len(bound)))
        if max(best, float(most[0])) <= 0:  # nothing can be gained any more
            rest = valid.clone()
            rest[picks] = False
            return [*picks, *rest.nonzero().squeeze(1).tolist(), *(~valid).nonzero().squeeze(1).tolist()][:k]
        if float(most[0]) < best:
            pick = int(scored.argmax())  # the lower index of equal ones
            picks.append(pick)
            torch.maximum(covered, covers[pick], out=covered)
            scored[pick] = -1.0
            bound, best = torch.maximum(bound, scored), -1.0
            scored.fill_(-1.0)
            continue
        if float(most[-1]) < 0:
            stale = stale[most >= 0]
        rows = torch.index_select(covers, 0, stale, out=rows.resize_(0))
        gain = rows.sub_(covered).relu_().sum(1).mul_(weight[stale])
        scored[stale], bound[stale], best = gain, -1.0, max(best, float(gain.max()))
    return picks
