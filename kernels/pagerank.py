"""PageRank of tokens on a layer's causal attention, without the attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # query rows whose softmax is made at once
CACHE = 2**24  # values of softmax (64 MiB) that may be kept between iterations; sets how many heads go together
ALONE = 2**26  # the same (256 MiB) where a single head of the batch needs more: up to some 11,000 tokens


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

    Heads do not depend on each other, so as many go together as `CACHE` has room for; where one head of the batch
    needs more than `ALONE`, M is made again for each iteration, a block of rows [B, 1, block, Q] at a time. All is
    fp32, also under autocast: tau multiplies a rounding error of the logits tenfold.
    """
    batch, heads, n_queries, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    each, past = heads // groups, length - n_queries  # heads of one group share their keys
    part = valid[:, past:] & (torch.arange(past, length, device=key.device) <= anchor[:, None])  # [B, Q]
    query = query.view(batch, groups, each, n_queries, width)
    per_head = batch * n_queries * n_queries // 2
    fits = max(1, CACHE // max(1, per_head))  # heads
    scores = []
    with torch.autocast(key.device.type, enabled=False):
        for g in range(0, groups, max(1, fits // each)):
            group = slice(g, g + max(1, fits // each))
            for h in range(0, each, fits):
                q, k = query[:, group, h : h + fits].float() * (scaling / tau), key[:, group, past:].float()
                u = _iterate(q, k, part, iters, damping, block, keep=per_head <= ALONE)
                scores.append(u.flatten(1, 2))  # [B, some of H, Q]
    u = torch.cat(scores, 1)  # [B, H, Q]
    score = u.square().mean(1).sqrt() if head_reduce == "rms" else u.mean(1)
    return torch.nn.functional.pad(score, (past, 0))


def _iterate(q: Tensor, k: Tensor, part: Tensor, iters: int, damping: float, block: int, keep: bool) -> Tensor:
    """u of each head, [B, G, E, Q], from q [B, G, E, Q, d] and k [B, G, Q, d] with part [B, Q]."""
    batch, groups, each, length, _ = q.shape
    place = torch.arange(length, device=q.device)
    q = q.masked_fill(~part[:, None, None, :, None], 0.0)  # padding may hold anything, also NaN
    k = k.masked_fill(~part[:, None, :, None], 0.0).transpose(2, 3)  # [B, G, d, Q]

    def rows(start: int) -> Tensor:
        """[B, G, E, b, end] of M. A row that takes no part sees itself too, and holds nothing to pass on."""
        end = min(start + block, length)
        logits = q[:, :, :, start:end].flatten(2, 3) @ k[..., :end]  # [B, G, E * b, end]
        row, column = place[start:end, None], place[:end]
        seen = ((column <= row) & part[:, None, :end]) | (column == row)  # [B, b, end]
        logits = logits.view(batch, groups, each, end - start, end)
        return logits.masked_fill_(~seen[:, None, None], -torch.inf).softmax(-1)

    starts = range(0, length, block)
    kept = [rows(start) for start in starts] if keep else None
    share = (part / part.sum(1, keepdim=True).clamp(min=1))[:, None, None]  # [B, 1, 1, Q], 1/n
    u = share.expand(-1, groups, each, -1)
    for _ in range(iters):
        flow = torch.zeros_like(u)
        for i, start in enumerate(starts):
            m = kept[i] if keep else rows(start)
            held = u[..., None, start : start + m.shape[3]]  # [B, G, E, 1, b]
            flow[..., : m.shape[4]] += (held @ m).squeeze(-2)
        u = flow * (1 - damping) + damping * share
    return u
