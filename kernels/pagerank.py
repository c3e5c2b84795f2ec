"""PageRank of tokens on a layer's causal attention, without the attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.kernels.dispatch import dispatch, operation

# of the torch twin; Triton keeps no row
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
    backend: str = "auto",
) -> Tensor:
    """Importance of each token by power iteration on M = softmax(logits / tau) (AIM, arXiv 2412.03248, Eq. 3).

    query [B, H, Q, d], key [B, Hkv, L, d] after RoPE; the queries are the last Q of the keys. Only those last Q take
    part, and of them the valid ones up to `anchor`: n a sample. valid [B, L] bool, anchor [B] among the L keys.
    u starts at 1/n and becomes u M (1 - damping) + damping / n, `iters` times, in each head; heads are then reduced
    by root mean square ("rms") or mean ("mean"). tau > 0. Returns [B, L] fp32, zero for what takes no part.
    backend: "auto", "torch" or "triton", see `dispatch`.

    All is fp32, also under autocast: tau multiplies a rounding error of the logits tenfold.
    """
    past = key.shape[2] - query.shape[2]
    part = valid[:, past:] & (torch.arange(past, key.shape[2], device=key.device) <= anchor[:, None])  # [B, Q]
    held = query.detach(), key.detach()[:, :, past:], part
    u = dispatch(power_iteration, backend, *held, scaling / tau, iters, float(damping))
    score = u.square().mean(1).sqrt() if head_reduce == "rms" else u.mean(1)
    return torch.nn.functional.pad(score, (past, 0))


@operation(lambda query, key, part, scaling, iters, damping: query.new_empty(query.shape[:3], dtype=torch.float32))
def power_iteration(query: Tensor, key: Tensor, part: Tensor, scaling: float, iters: int, damping: float) -> Tensor:
    """[B, H, Q] u of each head, see `pagerank`: query [B, H, Q, d], key [B, Hkv, Q, d], of which part [B, Q] take part.

    Heads do not depend on each other, so as many go together as `CACHE` has room for; where one head of the batch
    needs more than `ALONE`, M is made again for each iteration, a block of rows [B, 1, BLOCK, Q] at a time.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    each = heads // groups  # heads of one group share their keys
    query = query.view(batch, groups, each, length, width)
    per_head = batch * length * length // 2
    fits = max(1, CACHE // max(1, per_head))  # heads
    parts = []
    with torch.autocast(key.device.type, enabled=False):
        for g in range(0, groups, max(1, fits // each)):
            group = slice(g, g + max(1, fits // each))
            for h in range(0, each, fits):
                q, k = query[:, group, h : h + fits].float() * scaling, key[:, group].float()
                u = _iterate(q, k, part, iters, damping, keep=per_head <= ALONE)
                parts.append(u.flatten(1, 2))  # [B, some of H, Q]
    return torch.cat(parts, 1)


def _iterate(q: Tensor, k: Tensor, part: Tensor, iters: int, damping: float, keep: bool) -> Tensor:
    """u of each head, [B, G, E, Q], from q [B, G, E, Q, d] and k [B, G, Q, d] with part [B, Q]."""
    batch, groups, each, length, _ = q.shape
    place = torch.arange(length, device=q.device)
    q = q.masked_fill(~part[:, None, None, :, None], 0.0)  # padding may hold anything, also NaN
    k = k.masked_fill(~part[:, None, :, None], 0.0).transpose(2, 3)  # [B, G, d, Q]

    def rows(start: int) -> Tensor:
        """[B, G, E, b, end] of M. A row that takes no part sees itself too, and holds nothing to pass on."""
        end = min(start + BLOCK, length)
        logits = q[:, :, :, start:end].flatten(2, 3) @ k[..., :end]  # [B, G, E * b, end]
        row, column = place[start:end, None], place[:end]
        seen = ((column <= row) & part[:, None, :end]) | (column == row)  # [B, b, end]
        logits = logits.view(batch, groups, each, end - start, end)
        return logits.masked_fill_(~seen[:, None, None], -torch.inf).softmax(-1)

    starts = range(0, length, BLOCK)
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
