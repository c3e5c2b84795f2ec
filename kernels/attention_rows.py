"""Softmax rows of chosen queries against all keys, without the rest of the attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.kernels.dispatch import dispatch, operation


def attention_rows(
    query: Tensor, key: Tensor, rows: Tensor, scaling: float, valid: Tensor, backend: str = "auto"
) -> Tensor:
    """Attention probabilities of chosen queries, causal and padding-aware, in fp32.

    query [B, H, Q, d] and key [B, Hkv, L, d] after RoPE; the queries are the last Q of the L keys.
    rows: [B, R] indices among the L keys, each >= L - Q. valid: [B, L] bool.
    Returns [B, H, R, L]; a row sees the valid keys at or before itself. Autocast does not reach in.
    backend: "auto", "torch" or "triton", see `dispatch`; torch alone has a gradient.
    """
    return dispatch(softmax_rows, backend, query, key, rows, scaling, valid)


def _shapes(query: Tensor, key: Tensor, rows: Tensor, scaling: float, valid: Tensor) -> Tensor:
    return key.new_empty(*query.shape[:2], rows.shape[1], key.shape[2], dtype=torch.float32)


@operation(_shapes)
def softmax_rows(query: Tensor, key: Tensor, rows: Tensor, scaling: float, valid: Tensor) -> Tensor:
    """`attention_rows` in plain torch."""
    batch, heads, n_queries, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    index = (rows - (length - n_queries))[:, None, :, None].expand(-1, heads, -1, width)
    chosen = query.gather(2, index).float()  # [B, H, R, d]
    chosen = chosen.view(batch, groups, -1, width)  # heads of one group share their keys: [B, Hkv, H/Hkv * R, d]
    with torch.autocast(key.device.type, enabled=False):
        logits = (chosen @ key.float().transpose(2, 3)).mul_(scaling).view(batch, heads, rows.shape[1], length)
    seen = valid[:, None, :] & (torch.arange(length, device=key.device) <= rows[..., None])  # [B, R, L]
    return logits.masked_fill_(~seen[:, None], -torch.inf).softmax(-1)  # in place: memory is what takes time here
