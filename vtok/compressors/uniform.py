"""Baseline: evenly spaced tokens."""

from dataclasses import dataclass

import torch

from vtok.stages.pre_llm import PreLLM
from vtok.types import Selection, VisualTokens, keep_count


@dataclass(frozen=True, kw_only=True)
class Uniform(PreLLM):
    """Keep every (1/keep)-th token in raster order.

    keep: fraction or count of the tokens that enter the language model, per picture.
    Differs from the paper: there is none; a baseline.
    """

    name = "uniform"
    paper = "baseline"
    by_grid = True

    def select(self, tokens: VisualTokens) -> Selection:
        b, n, _ = tokens.features.shape
        k = keep_count(n, self.keep)
        index = (torch.arange(k, device=tokens.features.device) * n + n // 2) // k  # [K], centred, distinct
        return Selection.of_indices(index.expand(b, k), n)
