"""Clusters around density peaks (DPC-kNN): centres are dense points that lie far from any denser one."""

from __future__ import annotations

import torch
from torch import Tensor


def density(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of points x [..., n, D]: exp of minus the mean squared distance to the k nearest, itself among them, [..., n];
    and all distances over sqrt(D), [..., n, n]."""
    x = x.float().nan_to_num(0.0, 0.0, 0.0)
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") * x.shape[-1] ** -0.5
    nearest = apart.topk(min(k, x.shape[-2]), dim=-1, largest=False).values
    return (-nearest.square().mean(-1)).exp(), apart


def peaks(dense: Tensor, apart: Tensor, n: int) -> Tensor:
    """[..., n] the points whose density times distance to the next denser point is largest, best first; ties to the
    lower index. The densest one has the largest distance that there is. dense, apart: as `density` gives them."""
    index = torch.arange(dense.shape[-1], device=dense.device)
    level, above = dense[..., None, :] == dense[..., None], dense[..., None, :] > dense[..., None]
    denser = above | (level & (index < index[:, None]))  # [..., n, n] whether the second is denser than the first
    far = apart.flatten(-2).amax(-1)[..., None]
    nearest = apart.masked_fill(~denser, torch.inf).amin(-1).minimum(far)
    return (nearest * dense).argsort(dim=-1, descending=True, stable=True)[..., :n]


def clusters(x: Tensor, n: int, k: int = 7) -> tuple[Tensor, Tensor]:
    """The centres of n clusters of points x [..., N, D], [..., n] ascending, and for each point which of them is
    nearest, [..., N] as 0 .. n-1; ties to the earlier. A centre is its own. Of fewer clusters than k, density is told
    by as many neighbours as there are clusters."""
    dense, apart = density(x, min(k, n))
    centres = peaks(dense, apart, n).sort(-1).values
    wide = centres[..., None, :].expand(*apart.shape[:-1], -1)
    member = apart.gather(-1, wide).argmin(-1)
    own = torch.arange(centres.shape[-1], device=x.device).expand_as(centres)
    return centres, member.scatter(-1, centres, own)
