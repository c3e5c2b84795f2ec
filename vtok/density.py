"""Clusters around density peaks (DPC-kNN): centres are dense points that lie far from any denser one."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.types import ranks

NEIGHBOURS = 7  # by which the density of a point is told, where a method does not say


def distances(x: Tensor) -> Tensor:
    """[..., N, N] between points x [..., N, D], over sqrt(D). What is not finite counts as zero."""
    x = x.float().nan_to_num(0.0, 0.0, 0.0)
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") * x.shape[-1] ** -0.5


def peaks(apart: Tensor, k: int, valid: Tensor, at_most: Tensor | None = None) -> Tensor:
    """[..., N] how much each point is a centre: its density times its distance to the next denser point, -inf for
    points that are not `valid` [..., N]. apart: of `distances`.

    Density is exp of minus the mean squared distance to the k nearest valid points, itself among them, or to `at_most`
    [...] of these. Of equally dense points the earlier counts as denser. The densest has the largest distance that
    there is."""
    pair = valid[..., None, :] & valid[..., None]
    counts = valid.sum(-1) if at_most is None else valid.sum(-1).minimum(at_most)
    counts = counts.clamp(min=1, max=k)[..., None]  # [..., 1]
    near = apart.masked_fill(~pair, torch.inf).topk(min(k, apart.shape[-1]), dim=-1, largest=False).values
    counted = torch.arange(near.shape[-1], device=apart.device) < counts
    dense = (-torch.where(counted[..., None, :], near.square(), 0.0).sum(-1) / counts).exp()  # 0 where not valid
    index = torch.arange(dense.shape[-1], device=dense.device)
    level, above = dense[..., None, :] == dense[..., None], dense[..., None, :] > dense[..., None]
    denser = pair & (above | (level & (index < index[:, None])))  # [..., N, N] whether the second is denser
    far = apart.masked_fill(~pair, 0.0).flatten(-2).amax(-1)[..., None]
    nearest = apart.masked_fill(~denser, torch.inf).amin(-1).minimum(far)
    return (nearest * dense).masked_fill(~valid, -torch.inf)


def clusters(x: Tensor, n: int | Tensor, k: int = NEIGHBOURS, valid: Tensor | None = None) -> Tensor:
    """[..., N] long: of each point x [..., N, D] the centre of its cluster, the nearest of `n` centres, ties to the
    earlier; -1 for points that are not `valid` [..., N], and where there are no centres. A centre is its own.

    n: how many, one number or [...], at most as many as are valid. Of fewer clusters than k, density is told by as
    many neighbours as there are clusters."""
    valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if valid is None else valid
    n, apart = torch.as_tensor(n, device=x.device), distances(x)
    score = peaks(apart, k, valid, n)
    centre = valid & (ranks(score) < n[..., None])
    nearest = apart.masked_fill(~centre[..., None, :], torch.inf).argmin(-1)
    nearest = torch.where(centre, torch.arange(x.shape[-2], device=x.device), nearest)
    return torch.where(valid & (n > 0)[..., None], nearest, -1)
