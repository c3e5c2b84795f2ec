"""Many questions about one picture in one sequence, each blind to the others, as attention and as tensors.

A question sees the picture and itself, and its positions start right after the picture. So each is trained just as it
is asked at inference, at a tenth of the cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from recipes.loop import dtype_on

IGNORE = -100
PREFIX, PADDING = -2, -1  # in place of a question's number

Encoded = tuple[tuple[int, ...], int]  # token ids of a question and its answer, and how many of them are the question


def attend(query, key, value, mask=None):
    """Softmax attention of scaled queries; `mask` is additive."""
    if mask is None and query.dtype is torch.float32:
        return F.scaled_dot_product_attention(query, key, value, scale=1.0)
    scores = query @ key.transpose(-1, -2)  # [B, H, Q, K]
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


def packed_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention as plain tensor operations: on CPU in bfloat16 twice as fast, both ways, as SDPA's kernel. Without a
    mask in float32 the kernel takes half as long.

    `attention_mask`, if any, is additive [B, 1, Q, P + Q] and tells what the last Q tokens see; the P before
    them form the prefix, which is causal and never looks at them.
    """
    query = query * scaling
    if key.shape[1] < query.shape[1]:  # heads that share keys
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if attention_mask is None:  # a vision tower
        return attend(query, key, value).transpose(1, 2), None
    start = query.shape[2] - attention_mask.shape[2]
    causal = torch.full((start, start), float("-inf"), dtype=attention_mask.dtype, device=query.device).triu(1)
    prefix = attend(query[:, :, :start], key[:, :, :start], value[:, :, :start], causal)
    asked = attend(query[:, :, start:], key, value, attention_mask)
    module.watched = {}
    for head in getattr(module, "taught", ()):
        seen = query[:, head, start:] @ key[:, head].transpose(-1, -2) + attention_mask[:, 0]
        module.watched[head] = seen.float().log_softmax(-1)  # [B, Q, P + Q]
    return torch.cat([prefix, asked], dim=2).transpose(1, 2), None


AttentionInterface.register("zoo_packed", packed_attention)


def visible(block: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """The mask that `packed_attention` reads, [B, 1, Q, P + Q].

    block: [B, Q] number of the question a token belongs to, PADDING elsewhere. prefix: [B, P] PREFIX, and PADDING
    after a shorter one.
    """
    everything = torch.cat([prefix, block], dim=1)
    places = torch.arange(everything.shape[1], device=block.device)
    start = prefix.shape[1]
    seen = (block[:, :, None] == everything[:, None]) | (everything[:, None] == PREFIX)  # [B, Q, P + Q]
    seen &= places[start:, None] >= places
    dtype = dtype_on(block.device)
    return torch.zeros(seen.shape, dtype=dtype, device=block.device).masked_fill(~seen, float("-inf"))[:, None]


def pack(rows: list[list[Encoded]], looks: list[list[np.ndarray]], pad: int) -> dict[str, torch.Tensor]:
    """Questions of B pictures as tensors.

    looks: for each question what to look at, for each token of its answer, bool [tokens, N of this picture].
    Returns ids, block, offset (place of a token in its question), targets (next token inside answers, else IGNORE), all
    [B, Q], and focus, bool [B, Q, N]: visual tokens that show what the target is about.
    """
    length = max(sum(len(ids) for ids, _ in row) for row in rows)
    length = -(-length // 32) * 32  # few lengths: a new shape costs a kernel compilation
    out = {name: torch.full((len(rows), length), n) for name, n in (("ids", pad), ("block", PADDING))}
    out |= {"offset": torch.zeros_like(out["ids"]), "targets": torch.full_like(out["ids"], IGNORE)}
    focus = np.zeros((len(rows), length, max(look[0].shape[1] for look in looks)), dtype=bool)
    for b, row in enumerate(rows):
        at = 0
        for n, (ids, prompt) in enumerate(row):
            end, ids = at + len(ids), torch.tensor(ids)
            out["ids"][b, at:end] = ids
            out["block"][b, at:end] = n
            out["offset"][b, at:end] = torch.arange(len(ids))
            out["targets"][b, at + prompt - 1 : end - 1] = ids[prompt:]
            focus[b, at + prompt - 1 : end - 1, : looks[b][n].shape[1]] = looks[b][n]
            at = end
    return out | {"focus": torch.from_numpy(focus)}


def teach(layers, heads: Iterable[tuple[int, int]]) -> None:
    """Have `packed_attention` keep what these (layer, head) look at, for `focus_loss`."""
    for layer, head in heads:
        attention = layers[layer].self_attn
        attention.taught = (*getattr(attention, "taught", ()), head)


def focus_loss(layers, heads: Sequence[tuple[int, int]], first: int, wanted: torch.Tensor) -> torch.Tensor:
    """How little the taught heads attend, before a word of an answer is said, to what they should.

    heads: (layer, head) that `teach` was told. wanted: bool [B, Q, N] columns from `first` on, which counts from the
    end if negative.
    """
    some, loss = wanted.any(-1), torch.zeros((), device=wanted.device)
    for layer, head in heads if some.any() else ():
        seen = layers[layer].self_attn.watched[head][..., first:][..., : wanted.shape[-1]]
        loss = loss - seen[some].masked_fill(~wanted[some], float("-inf")).logsumexp(-1).mean()
    return loss / max(1, len(heads))


def share_loss(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against an even share among all that is true; rows where nothing is are left out.

    scores: [..., names]; truth: bool of the same shape.
    """
    some = truth.any(-1)
    if not some.any():
        return 0.0 * scores.float().sum()  # so that what has nothing to learn from is trained by nothing
    share = truth[some].float()
    return F.cross_entropy(scores[some].float(), share / share.sum(-1, keepdim=True))
