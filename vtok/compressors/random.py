"""Baseline: tokens drawn at random."""

from dataclasses import dataclass

import torch

from vtok.stages.pre_llm import PreLLM
from vtok.types import Selection, VisualTokens, keep_count


@dataclass(frozen=True, kw_only=True)
class Random(PreLLM):
    """Keep tokens drawn without replacement.

    keep: fraction or count of the tokens that enter the language model, per picture.
    seed: the draw depends on it and on the number of tokens alone, so that a rollout and a training forward of the
        same picture keep the same tokens.
    Differs from the paper: there is none; a baseline.
    """

    name = "random"
    paper = "baseline"
    by_grid = True

    seed: int = 0

    def select(self, tokens: VisualTokens) -> Selection:
        b, n, _ = tokens.features.shape
        generator = torch.Generator().manual_seed(self.seed)
        index = torch.randperm(n, generator=generator)[: keep_count(n, self.keep)].to(tokens.features.device)
        return Selection.of_indices(index.expand(b, -1), n)
