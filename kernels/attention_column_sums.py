"""Column sums of attention over some queries, without the attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.kernels.attention_rows import softmax_rows
from vtok.kernels.dispatch import dispatch, operation

BLOCK = 64  # queries whose rows are in memory at a time in torch; in Triton none are


def attention_column_sums(
    query: Tensor, key: Tensor, rows: Tensor, scaling: float, valid: Tensor, backend: str = "auto"
) -> Tensor:
    """[B, L] the attention that each key gets from some queries: head mean, summed over the queries, in fp32.

    query [B, H, Q, d], key [B, Hkv, L, d], scaling and valid as in `attention_rows`. rows: [B, R] indices among the L
    keys, each >= L - Q and with a valid key at or before it, or -1 for none, which adds nothing.
    backend: "auto", "torch" or "triton", see `dispatch`; torch alone has a gradient.
    """
    return dispatch(softmax_column_sums, backend, query, key, rows, scaling, valid)


@operation(lambda query, key, rows, scaling, valid: key.new_empty(valid.shape, dtype=torch.float32))
def softmax_column_sums(query: Tensor, key: Tensor, rows: Tensor, scaling: float, valid: Tensor) -> Tensor:
    """`attention_column_sums` in plain torch."""
    total = torch.zeros(valid.shape, dtype=torch.float32, device=key.device)
    for part in rows.split(BLOCK, 1):
        held = part.clamp(min=key.shape[2] - query.shape[2])
        weights = softmax_rows(query, key, held, scaling, valid).mean(1)  # [B, r, L]
        total += torch.where(part[..., None] >= 0, weights, 0.0).sum(1)
    return total
