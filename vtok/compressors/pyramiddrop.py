"""PyramidDrop: at the end of each stage of decoder layers, a fixed share of the visual tokens that are left stays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated

from torch import Tensor

from vtok.errors import InvalidValue
from vtok.kernels.attention_rows import attention_rows
from vtok.options import Fraction, In
from vtok.stages.llm import InLLM
from vtok.types import Attention


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(InLLM):
    """The decoder is cut into equal stages; after each but the last, the share `keep` of what the stage had stays,
    by the head-mean attention of the last instruction token (Section 3.2).

    keep: lambda of the paper, as a fraction: after stage s, keep ** s of the tokens that entered remain.
    stages: S of the paper. The first ones are a layer shorter where the depth is no multiple.
    anchor: whose attention counts, see `InLLM`; "prompt_end" is the paper's.
    Differs from the paper: scores are the attention of each stage's last layer; the official code computes them
    with the queries and keys of the layer that follows, on all that stage had, and numbers the positions of what is
    left anew in each stage, where tokens keep their own here. Neither is an option yet.
    """

    name = "pyramiddrop"
    needs = frozenset({"attention"})
    paper = "PyramidDrop, arXiv 2410.17247"

    keep: Fraction = 0.5
    stages: Annotated[int, In(">= 2")] = 4

    def starts(self, n_layers: int) -> list[int]:
        """The first layer of each stage but the first."""
        if self.stages > n_layers:
            raise InvalidValue(f"stages must be at most the number of decoder layers, {n_layers}, got {self.stages}.")
        return [s * n_layers // self.stages for s in range(1, self.stages)]

    def schedule(self, n_layers: int) -> dict[int, float | int]:
        return {start - 1: self.keep**s for s, start in enumerate(self.starts(n_layers), start=1)}

    def score(self, attention: Attention) -> Tensor:
        rows = attention_rows(
            attention.query, attention.key, attention.anchor[:, None], attention.scaling, attention.valid
        )  # [B, H, 1, L]
        return rows.mean(1).squeeze(1)

    def mean_keep(self, n_layers: int) -> float:
        """Mean over layers of the share of visual tokens present."""
        edges = [0, *self.starts(n_layers), n_layers]
        return sum(self.keep**s * (end - start) for s, (start, end) in enumerate(pairwise(edges))) / n_layers

    def with_budget(self, budget: float, n_layers: int) -> PyramidDrop:
        """Lambda solved for; with more stages where the first one alone would be above the budget."""
        self.starts(n_layers)  # refuses more stages than layers
        fitting = (replace(self, stages=s) for s in range(self.stages, n_layers + 1))
        found = next((x for x in fitting if x.starts(n_layers)[0] < budget * n_layers), None)
        if found is None:
            raise InvalidValue(
                f"The first of {n_layers} layers sees all tokens, so the mean is above {1 / n_layers:.3f}; a budget of "
                f"{budget} cannot be met. Raise it, or drop tokens before the language model."
            )
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            fits = replace(found, keep=middle).mean_keep(n_layers) <= budget
            low, high = (middle, high) if fits else (low, middle)
        return replace(found, keep=1.0 if budget == 1 else low)
