"""How many keys repeat each key, without the matrix of similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.kernels.dispatch import dispatch, operation

BLOCK = 2**24  # similarities (64 MiB) that exist at once in torch; in Triton none do


@torch.no_grad()
def redundancy_counts(keys: Tensor, valid: Tensor, threshold: float, backend: str = "auto") -> Tensor:
    """How many other valid keys have a cosine above `threshold` with each valid key (TCC, arXiv 2407.14439).

    keys: [B, N, C], any float dtype; compared by cosine in fp32, also under autocast. valid: [B, N] bool; other keys
    may hold anything. The cosine with a vector of zeros, or with one that is not finite, is 0. Rounding lifts none
    above 1, so above a threshold of 1 there is nothing.
    backend: "auto", "torch" or "triton", see `dispatch`.
    Returns [B, N] long, 0 for keys that are not valid.
    """
    return dispatch(close_keys, backend, keys.detach(), valid, float(threshold))


@operation(lambda keys, valid, threshold: keys.new_empty(keys.shape[:2], dtype=torch.long))
def close_keys(keys: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """`redundancy_counts` in plain torch, some rows of the matrix at a time."""
    batch, n, _ = keys.shape
    unit = keys.float()
    unit = (unit / unit.norm(dim=-1, keepdim=True).clamp(min=1e-12)).nan_to_num(0.0)
    block = max(1, BLOCK // max(1, batch * n))
    counts = torch.zeros(batch, n, dtype=torch.long, device=keys.device)
    with torch.autocast(keys.device.type, enabled=False):
        for start in range(0, n, block):
            cosine = (unit[:, start : start + block] @ unit.mT).clamp_(max=1.0)  # [B, block, N]
            close = (cosine > threshold) & valid[:, None]
            close.diagonal(start, 1, 2).fill_(False)  # itself
            counts[:, start : start + block] = close.sum(-1)
    return counts.masked_fill_(~valid, 0)
