"""SnapKV: the columns that the prompt's last queries attend to, and their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vtok.engine.columns import Columns
from vtok.errors import InvalidValue
from vtok.kernels.attention_rows import attention_rows
from vtok.kernels.compact_sequence import kept_last
from vtok.options import AtLeast1, In, Keep
from vtok.stages.kv import KV


@dataclass(frozen=True, kw_only=True)
class SnapKV(KV):
    """Score: attention of the prompt's last `window` queries, summed, pooled over neighbours, mean over the heads of a
    group (Section 4). The window's columns stay.

    window: queries that vote. Half of the budget at most, which is ours: a budget below the window has no meaning in
        the paper.
    kernel: columns over which scores are pooled, odd.
    pooling: "average", as the paper and its code's default, or "max", as in its runs on LongBench.
    Differs from the paper: a group of query heads that shares keys has one set of columns, by the mean of its scores,
        where the official code stores the cache once a query head.
    Not good for: questions that come later, on the same cache: the window must hold the question.
    """

    name = "snapkv"
    paper = "SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469"
    examples = ({}, {"keep": 8, "window": 4, "kernel": 3}, {"pooling": "max", "window": 2})

    keep: Keep = 0.25
    window: AtLeast1 = 32
    kernel: Annotated[int, In(">= 1"), "an odd number"] = 5
    pooling: Literal["average", "max"] = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise InvalidValue(f"kernel must be odd, got {self.kernel}: a column is in the middle of its neighbours.")

    @property
    def least(self) -> int:
        return 2

    def _window(self, seen: Columns) -> Tensor:
        """[B] queries that vote."""
        return (seen.budget // 2).clamp(min=1, max=self.window)

    def score(self, seen: Columns) -> Tensor:
        rows = seen.rows[:, -self.window :]  # the prompt ends at the right
        behind = (rows >= 0).flip(1).cumsum(1).flip(1)  # valid queries from each on
        votes = (rows >= 0) & (behind <= self._window(seen)[:, None])  # [B, W]
        return self.pooled(seen, rows, votes)

    def pooled(self, seen: Columns, rows: Tensor, votes: Tensor) -> Tensor:
        """[B, G, L] from the attention of the queries in columns rows [B, W] that vote."""
        query, key, _, valid = seen.apart
        groups = seen.valid.shape[1]
        held = rows.clamp(min=seen.key.shape[2] - seen.query.shape[2]).repeat_interleave(groups, 0)
        attention = attention_rows(query, key, held, seen.scaling, valid)  # [B * G, H / G, W, L]
        counted = votes.repeat_interleave(groups, 0)[:, None, :, None]
        sums = attention.masked_fill(~counted, 0.0).sum(2).view(*seen.valid.shape[:2], -1, seen.valid.shape[2])
        sums = sums.masked_fill((self.stays(seen) | ~seen.valid)[:, :, None], 0.0).flatten(0, 1)  # [B * G, H / G, L]
        pool = F.avg_pool1d if self.pooling == "average" else F.max_pool1d
        order = kept_last(valid, valid.shape[1])[:, None].expand_as(sums)  # padding between two prompts is no neighbour
        pooled = pool(sums.gather(2, order), self.kernel, stride=1, padding=self.kernel // 2)
        pooled = torch.empty_like(pooled).scatter_(2, order, pooled)
        return pooled.mean(1).view(seen.valid.shape)

    def stays(self, seen: Columns) -> Tensor:
        return seen.last(self._window(seen))
