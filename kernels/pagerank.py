"""PageRank of tokens on a layer's causal attention, without the attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # query rows whose softmax exists at once
CACHE = 2**26  # up to this many values (256 MiB) the softmax is kept between iterations instead of made again


@torch.no_grad()
def pagerank(
    query: Tensor,
    key: Tensor,
    scaling: float,
    valid: Tensor,
    anchor: Tensor,
    tau: float = 0.1,
    iters: int = 5,
    damping: float = 0.0,
    head_reduce: str = "rms",
    block: int = BLOCK,
) -> Tensor:
    """Importance of each token by power iteration on M = softmax(logits / tau) (AIM, arXiv 2412.03248, Eq. 3).

    query [B, H, Q, d], key [B, Hkv, L, d] after RoPE; the queries are the last Q of the keys. Only those last Q take
    part, and of them the valid ones up to `anchor`: n a sample. valid [B, L] bool, anchor [B] among the L keys.
    u starts at 1/n and becomes u M (1 - damping) + damping / n, `iters` times, in each head; heads are then reduced
    by root mean square ("rms") or mean ("mean"). tau > 0. Returns [B, L] fp32, zero for what takes no part.

    A block of rows is [B, H, block, Q]; nothing of size Q x Q outlives it, unless it is small (`CACHE`).
    """
    batch, heads, n_queries, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    past = length - n_queries
    place = torch.arange(n_queries, device=key.device)
    part = valid[:, past:] & (place <= (anchor - past)[:, None])  # [B, Q]
    q = query.float().view(batch, groups, heads // groups, n_queries, width)
    k = key[:, :, past:].float().transpose(2, 3)[:, :, None]  # [B, Hkv, 1, d, Q]

    def rows(start: int) -> Tensor:
        """[B, Hkv, H/Hkv, block, Q] of M, zero in rows that take no part."""
        end = min(start + block, n_queries)
        logits = (q[:, :, :, start:end] @ k[..., :end]) * (scaling / tau)
        seen = part[:, None, :end] & part[:, start:end, None] & (place[:end] <= place[start:end, None])  # [B, b, end]
        logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
        return torch.where(part[:, None, None, start:end, None], logits.softmax(-1), 0.0)

    starts = range(0, n_queries, block)
    small = batch * heads * n_queries * n_queries // 2 <= CACHE
    kept = [rows(start) for start in starts] if small else None
    share = part / part.sum(1, keepdim=True).clamp(min=1)  # [B, Q], 1/n
    u = share[:, None, None].expand(-1, groups, heads // groups, -1)  # [B, Hkv, H/Hkv, Q]
    for _ in range(iters):
        flow = torch.zeros_like(u)
        for i, start in enumerate(starts):
            m = kept[i] if small else rows(start)
            moved = u[..., None, start : start + m.shape[3]] @ m  # [B, Hkv, H/Hkv, 1, end]
            flow[..., : m.shape[4]] += moved.squeeze(-2)
        u = flow * (1 - damping) + damping * share[:, None, None]
    u = u.flatten(1, 2)  # [B, H, Q]
    score = u.square().mean(1).sqrt() if head_reduce == "rms" else u.mean(1)
    return torch.nn.functional.pad(score * part, (past, 0))
