"""Attention of a tree of drafts: all of them see the cache, and each of the drafts those above it."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.kernels.dispatch import dispatch, operation

BLOCK = 2048  # columns of the cache at a time: their logits stay in a CPU's cache
LOWEST = torch.finfo(torch.float32).min


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tensor,
    scaling: float,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of N new tokens over what is cached, and among themselves as a tree says; fp32 inside.

    query [B, H, N, d]; key, value [B, G, L + N, d] after RoPE, the new tokens' last. H is a multiple of G: head h reads
        the keys of group h // (H/G). The heads of a group are rows of one matrix, so that no key is copied.
    tree: [N, N] bool, [i, j]: whether the i-th new token sees the j-th. Each sees at least itself.
    valid: [B, L] bool, or [B, G, L], the cached columns that are no padding; None where all are.
    Returns [B, H, N, d] in the query's type. Cache and drafts are summed apart, block by block, and merged by the
    log-sum-exp of each (as in FlashAttention). backend: "auto", "torch" or "triton", see `dispatch`.
    """
    return dispatch(attend_tree, backend, query, key, value, tree, scaling, valid)


def _shapes(query: Tensor, key: Tensor, value: Tensor, tree: Tensor, scaling: float, valid: Tensor | None) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


@operation(_shapes)
def attend_tree(
    query: Tensor, key: Tensor, value: Tensor, tree: Tensor, scaling: float, valid: Tensor | None
) -> Tensor:
    """`tree_attention` in plain torch."""
    batch, heads, n, width = query.shape
    groups, past = key.shape[1], key.shape[2] - n
    rows = query.reshape(batch, groups, heads // groups * n, width).float() * scaling  # [B, G, R, d]
    with torch.autocast(key.device.type, enabled=False):
        hidden = ~tree.repeat(heads // groups, 1)  # [R, N]
        out, top, total = _part(rows, key[:, :, past:], value[:, :, past:], hidden)
        for start in range(0, past, BLOCK):
            columns = slice(start, min(past, start + BLOCK))
            hidden = None
            if valid is not None:
                hidden = ~valid[..., columns].view(batch, -1, 1, columns.stop - start)  # [B, 1 or G, 1, block]
            more, other, added = _part(rows, key[:, :, columns], value[:, :, columns], hidden)
            higher = torch.maximum(top, other)
            ours, theirs = (top - higher).exp_(), (other - higher).exp_()
            out, total, top = out * ours + more * theirs, total * ours + added * theirs, higher
        out = (out / total).to(query.dtype)
    return out.view(batch, heads, n, value.shape[3])


def _part(rows: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of some columns: the weighted values [B, G, R, d], the highest logit, and the sum of weights [B, G, R, 1].

    Weights are relative to the highest logit. Where all columns are hidden that is the lowest number, and merging
    gives the part no weight."""
    logits = rows @ key.float().transpose(2, 3)  # [B, G, R, columns]
    if hidden is not None:
        logits = logits.masked_fill_(hidden, LOWEST)
    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top).exp_()
    return weights @ value.float(), top, weights.sum(-1, keepdim=True)
