"""Greedy choice under a determinantal point process: good tokens that span as large a volume as can be."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.kernels.dispatch import dispatch, operation

CACHE = 2**26  # values of L (256 MiB) that may exist at once; sets how many pictures go together
SPENT = 1e-5  # of its own L_vv: what is left of a token that lies in the span of the picks, but for rounding


@torch.no_grad()
def greedy_dpp(features: Tensor, k: int, quality: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Pick `k` of N tokens, each so that the determinant of L over the picks grows most (fast greedy MAP, arXiv
    1709.05135).

    features: [B, N, D], any float dtype. quality: [B, N] >= 0 or None for 1. L_uv = quality_u cos(u, v) quality_v, in
    fp32, also under autocast. The cosine with a vector of zeros, or with one that is not finite, is 0. 0 <= k <= N.
    Where nothing is left of a token but rounding (`SPENT`), it comes behind all others, those of higher quality first:
    beyond the rank of L the determinant is 0 whatever is picked. Ties go to the lower index.
    Returns [B, k] long, in the order of picking, all distinct. Never waits for the device.
    backend: "auto", "torch" or "triton", see `dispatch`. Triton picks where one picture's L fits in `CACHE`; else a row
    of it is made for each pick.
    """
    batch, n, _ = features.shape
    if backend == "triton" and n * n > CACHE:
        raise InvalidValue(f"backend='triton' picks among at most {math.isqrt(CACHE)} points, got {n}: use 'auto'.")
    rows = features.detach().float()
    quality = rows.new_ones(batch, n) if quality is None else quality.detach().float()
    length = rows.norm(dim=-1)
    whole = length.isfinite() & (length > 1e-12)
    diagonal = torch.where(whole, quality.square(), 0.0)  # exactly: rounding must not say which token is the first
    if not k or not batch:
        return torch.empty(batch, k, dtype=torch.long, device=rows.device)
    # what is no number stays in the columns of its own tokens, which are spent from the beginning
    rows = rows * torch.where(whole, quality / length, 0.0)[..., None]
    with torch.autocast(features.device.type, enabled=False):
        if n * n <= CACHE:
            size = max(1, CACHE // (n * n))
            parts = zip(rows.split(size), diagonal.split(size))
            return torch.cat([dispatch(dpp_picks, backend, _kernel(*part), k) for part in parts])
        picture = torch.arange(batch, device=rows.device)
        row = lambda point: (rows @ rows[picture, point][..., None]).squeeze(2)
        return _greedy(row, diagonal, k)


def _kernel(rows: Tensor, diagonal: Tensor) -> Tensor:
    kernel = rows @ rows.mT
    kernel.diagonal(0, 1, 2).copy_(diagonal)
    return kernel


@operation(lambda kernel, k: kernel.new_empty(len(kernel), k, dtype=torch.long))
def dpp_picks(kernel: Tensor, k: int) -> Tensor:
    """[B, k] the picks, from all of L [B, N, N]."""
    picture = torch.arange(len(kernel), device=kernel.device)
    return _greedy(lambda point: kernel[picture, point], kernel.diagonal(0, 1, 2), k)


def _greedy(row: Callable[[Tensor], Tensor], diagonal: Tensor, k: int) -> Tensor:
    """row: [B] -> [B, N], of L. diagonal: [B, N], of it. O(k^2 N) beside the rows."""
    batch, n = diagonal.shape
    least = SPENT * diagonal
    spent = diagonal / diagonal.amax(1, keepdim=True).clamp(min=1e-30) - 2  # below all that is not, by quality
    left = diagonal  # [B, N] the square of what each token adds to the volume
    factor = diagonal.new_zeros(batch, k, n)  # rows of the Cholesky factor of L
    taken = torch.zeros_like(diagonal, dtype=torch.bool)
    picks = []
    for i in range(k):
        pick = torch.where(left > least, left, spent).masked_fill(taken, -torch.inf).argmax(1)
        at = pick[:, None]
        share = factor[:, :i].gather(2, at[:, None].expand(-1, i, -1))  # [B, i, 1]
        rest = row(pick) - (share.mT @ factor[:, :i]).squeeze(1)
        here = left.gather(1, at)
        rest = torch.where(here > least.gather(1, at), rest / here.clamp(min=1e-30).sqrt(), 0.0)
        factor[:, i] = rest
        left = left - rest.square()
        taken = taken.scatter(1, at, True)
        picks.append(pick)
    return torch.stack(picks, 1)
