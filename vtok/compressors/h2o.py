"""H2O: a cache of heavy hitters, the columns with the most attention so far, and of the latest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtok.engine.columns import Columns
from vtok.options import AtLeast0, Keep, Part
from vtok.stages.kv import KV


@dataclass(frozen=True, kw_only=True)
class H2O(KV):
    """Score: the attention that a column got from all queries so far, summed over them and the heads of its group
    (Section 4). While answering, each new column pushes out the one with the lowest.

    keep: of the prompt's columns, heavy hitters and latest together; the paper's 0.1 and 0.1.
    recent: how much of that are the latest columns, a fraction. Less where `sinks` leave less.
    sinks: first columns that stay in any case. The paper has none.
    Differs from the paper: scores are each row's own, where the official code sums them over the batch; a group of
        query heads that shares keys has one set of columns.
    Not good for: answers that lie early in a long prompt, as columns that few queries saw have low sums.
    """

    name = "h2o"
    paper = "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv 2306.14048"
    bounded = True
    examples = ({}, {"keep": 6, "sinks": 1}, {"visual": 0.3, "keep": 0.9})

    keep: Keep = 0.2
    recent: Part = 0.5
    sinks: AtLeast0 = 0

    @property
    def least(self) -> int:
        return self.sinks + 1

    def score(self, seen: Columns) -> Tensor:
        return seen.before + seen.attention_sums()

    def stays(self, seen: Columns) -> Tensor:
        return seen.recent(self.recent, self.sinks) | (seen.place < self.sinks)
