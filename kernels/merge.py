"""Merge the tokens of a group into one: their mean, weighted by how many tokens each stands for already."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vtok.kernels.dispatch import dispatch, operation


def merge(x: Tensor, group: Tensor, n: int, size: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The mean of each group of tokens, and how many tokens it stands for (ToMe, arXiv 2210.09461, Section 3).

    x: [B, N, D], any float dtype. group: [B, N] long, the group of each token, below n, or -1 for none.
    size: [B, N] fp32, how many tokens each stands for (whole numbers), or None where each stands for itself.
    Returns means [B, n, D] in x's dtype, taken in fp32 at least and rounded once, and sizes [B, n] fp32. A group
    without members is 0, of size 0. Members are added in a fixed order, so that a mean is the same each time.
    Gradient flows to x. backend: "auto", "torch" or "triton", see `dispatch`.
    """
    return dispatch(group_means, backend, x, group, n, None if size is None else size.detach())


def sizes(size: Tensor, group: Tensor, n: int) -> Tensor:
    """[B, n] how many tokens each group stands for, from the `size` [B, N] of its members; as in `merge`."""
    total = size.new_zeros(len(size), n + 1)  # the last for those of no group
    total = total.scatter_add(1, group.where(group >= 0, n), size)  # whole numbers: exact in any order
    return total[:, :n].contiguous()


def members(group: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The B * N tokens, group by group, and at which each group begins [B * n + 1]; last come those of no group."""
    batch = len(group)
    apart = group + n * torch.arange(batch, device=group.device)[:, None]
    key, order = torch.where(group < 0, batch * n, apart).flatten().sort(stable=True)
    return order, torch.searchsorted(key, torch.arange(batch * n + 1, device=group.device))


def _shapes(x: Tensor, group: Tensor, n: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), n, x.shape[2]), x.new_empty(len(x), n, dtype=torch.float32)


@operation(_shapes, differentiable=True)
def group_means(x: Tensor, group: Tensor, n: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """`merge` in plain torch."""
    order, starts = members(group, n)
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)  # [B * N, D]
    weights = None if size is None else size.flatten()[order].to(wide.dtype)
    sums = F.embedding_bag(order, wide, starts, mode="sum", per_sample_weights=weights)[:-1]
    total = sizes(torch.ones(group.shape, device=x.device) if size is None else size.float(), group, n)
    mean = sums.unflatten(0, total.shape) / total.masked_fill(total == 0, 1.0)[..., None]
    return mean.to(x.dtype), total
