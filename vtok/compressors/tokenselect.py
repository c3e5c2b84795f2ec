"""TokenSelect: each token of an answer attends to the columns that its heads vote for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from vtok.engine.decoder import Seen
from vtok.options import AtLeast0, AtLeast1, In, Keep
from vtok.stages.attend import Attend
from vtok.types import best, keep_count, keep_counts


@dataclass(frozen=True, kw_only=True)
class TokenSelect(Attend):
    """Votes: each head's softmax of q k over the candidate columns, summed over heads (Equation 7). All heads of a
    layer attend to the first columns, the best candidates and the latest columns. Nothing leaves the cache.

    keep: how many of the candidates, a count, or a fraction of all columns.
    initial: first columns, in any case. latest: newest ones, in any case, the token itself among them.
    chunk: so many tokens of the prompt choose together, by their mean query, among what is before them, and read that
        and each other; counted from the prompt's end. The paper's is 512. none: the prompt is read whole.
    theta: a choice is used again for the next tokens while the cosine of their query to its own is at least this,
        for all rows of a batch; to know costs a wait for the device in each layer. none: choose for each token, as
        beside a method that evicts at each token.
    Differs from the paper: the prompt is read whole unless `chunk` is given; columns keep their positions;
        query heads share keys as transformers lays them out, where the official kernel mixes groups up.
    Not good for: memory, as the cache stays whole; short prompts, which are attended to whole.
    """

    name = "tokenselect"
    paper = "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs, arXiv 2411.02886"
    examples = ({"keep": 4, "initial": 2, "latest": 3}, {"keep": 0.2, "initial": 1, "latest": 2, "theta": None})

    keep: Keep = 2048
    initial: AtLeast0 = 128
    latest: AtLeast1 = 512
    chunk: AtLeast1 | None = None
    theta: Annotated[float, In("[-1, 1]")] | None = 0.9

    def most(self, length: float) -> int:
        return self.initial + keep_count(int(length), self.keep) + self.latest

    def select(self, seen: Seen, valid: Tensor, before: tuple | None) -> tuple[Tensor | None, int, tuple | None]:
        length, query = seen.key.shape[2], seen.query.flatten(1).float()  # [B, H * d]
        ends, most = self.initial + self.latest, self.most(length)
        if most >= length:
            return None, length, None
        place, behind = valid.cumsum(1) - 1, valid.flip(1).cumsum(1).flip(1) - 1
        always = valid & ((place < self.initial) | (behind < self.latest))
        follows = before is not None and before[1].shape[1] == length - 1  # else columns were evicted since
        if follows and bool((F.cosine_similarity(query, before[0]) >= self.theta).all()):
            query, vote = before[0], F.pad(before[1], (0, 1))
        else:
            vote = votes(seen.query, seen.key, valid & ~always)
        total = ends + keep_counts(valid.sum(1), self.keep)  # [B]
        score = vote.masked_fill(always, torch.inf).masked_fill(~valid, -torch.inf)
        again = (query, vote) if self.theta is not None else None
        return valid & best(score, total[:, None], most), most, again


def votes(query: Tensor, key: Tensor, candidates: Tensor) -> Tensor:
    """[B, L] the sum over heads of softmax(q k) over the candidates [B, L] bool, 0 for others; no scaling (Equation 7).

    query: [B, H, 1, d]. key: [B, G, L, d]."""
    batch, groups = key.shape[:2]
    logits = query.reshape(batch, groups, -1, query.shape[3]).float() @ key.float().transpose(2, 3)  # [B, G, H / G, L]
    logits = logits.flatten(1, 2).masked_fill(~candidates[:, None], -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0).sum(1)
