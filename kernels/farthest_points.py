"""Spread-out points: greedy max-min selection by cosine distance, weighted where asked."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.kernels.dispatch import dispatch, operation

CACHE = 2**26  # similarities (256 MiB) that may exist at once; sets how many pictures go together
BLOCK = 1024  # rows of the similarity matrix that are made at once where all would be too many


@torch.no_grad()
def farthest_points(features: Tensor, k: int, weight: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Pick `k` of N points such that each pick is as far as can be from those before it (DivPrune, arXiv 2503.02175).

    features: [B, N, D], any float dtype; compared by cosine in fp32, also under autocast. 0 <= k <= N.
    The first pick is the point whose nearest other point is farthest; each further one is the unpicked point whose
    nearest picked point is farthest. Ties go to the lower index. The cosine with a vector of zeros, or with
    one that holds a NaN, is 0.
    weight: [B, N] finite numbers of at least 0 by which the distances 1 - cosine of each point are multiplied (the
    selection by attention and diversity of FlashVID, arXiv 2602.08024).
    Returns [B, k] long, in the order of picking. Never waits for the device.
    backend: "auto", "torch" or "triton", see `dispatch`. Triton picks where one picture's similarities fit in `CACHE`.

    One product of the features with themselves says everything. Where one picture's similarities would not fit in
    `CACHE`, they are made a block of rows at a time for the first pick, and for each further pick its row again.
    """
    n = features.shape[1]
    if backend == "triton" and n * n > CACHE:
        raise InvalidValue(f"backend='triton' picks among at most {math.isqrt(CACHE)} points, got {n}: use 'auto'.")
    unit = features.detach().float()
    unit = (unit / unit.norm(dim=-1, keepdim=True).clamp(min=1e-12)).nan_to_num(0.0)
    with torch.autocast(features.device.type, enabled=False):
        size = max(1, CACHE // (n * n))
        weights = [None] * len(unit) if weight is None else weight.detach().float().split(size)
        parts = [_pick(part, w, k, backend) for part, w in zip(unit.split(size), weights)] if k and len(unit) else []
    return torch.cat(parts) if parts else torch.empty(len(unit), k, dtype=torch.long, device=unit.device)


def _pick(unit: Tensor, weight: Tensor | None, k: int, backend: str) -> Tensor:
    b, n, _ = unit.shape
    block = n if n * n <= CACHE else BLOCK
    picture = torch.arange(b, device=unit.device)
    closest = []  # [B, n] similarity of each point to its nearest other one
    for start in range(0, n, block):
        rows = unit[:, start : start + block] @ unit.mT  # [B, block, n]
        rows.diagonal(start, 1, 2).fill_(-torch.inf)
        closest.append(rows.amax(2))

    def row(point: Tensor) -> Tensor:
        """[B, n] the similarities to one point of each picture, -inf to itself."""
        if block == n:
            return rows[picture, point]
        return (unit @ unit[picture, point][..., None]).squeeze(2).scatter_(1, point[:, None], -torch.inf)

    first = _near(torch.cat(closest, 1), weight).argmin(1)
    # where two points are each other's nearest they tie, and rounding of the one product or the other may not decide
    partner = row(first).argmax(1)
    tie = row(partner).argmax(1) == first
    if weight is not None:
        tie &= weight[picture, first] == weight[picture, partner]
    first = torch.where(tie, torch.minimum(first, partner), first)
    return dispatch(greedy_picks, backend, rows, first, k, weight) if block == n else _greedy(row, first, k, weight)


@operation(lambda similarity, first, k, weight: first.new_empty(len(first), k))
def greedy_picks(similarity: Tensor, first: Tensor, k: int, weight: Tensor | None) -> Tensor:
    """[B, k] `first` and the picks after it, from all similarities [B, N, N], which are -inf on the diagonal."""
    picture = torch.arange(len(first), device=first.device)
    return _greedy(lambda point: similarity[picture, point], first, k, weight)


def _greedy(row: Callable[[Tensor], Tensor], first: Tensor, k: int, weight: Tensor | None) -> Tensor:
    picks, near = [first], None  # near: [B, N] similarity to the nearest picked point, +inf once picked
    for _ in range(k - 1):
        here = row(picks[-1])
        near = (here if near is None else torch.maximum(near, here)).scatter_(1, picks[-1][:, None], torch.inf)
        picks.append(_near(near, weight).argmin(1))
    return torch.stack(picks, 1)


def _near(similarity: Tensor, weight: Tensor | None) -> Tensor:
    """[B, N] what is least for the next pick: minus its weighted distance. As it is where infinite."""
    if weight is None:
        return similarity
    return torch.where(similarity.isinf(), similarity, weight * (similarity - 1))
