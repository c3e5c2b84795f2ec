"""DivPrune: keep the tokens that lie farthest from each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtok.kernels.farthest_points import farthest_points
from vtok.stages.pre_llm import PreLLM
from vtok.types import Selection, VisualTokens, keep_count


@dataclass(frozen=True, kw_only=True)
class DivPrune(PreLLM):
    """Greedy max-min diversity by cosine distance among the tokens as they enter the language model (Algorithm 1).

    keep: fraction or count of the tokens, per picture. Crops and thumbnail, or the frames of a clip, are one set.
    Differs from the paper: the count is rounded down where the official code rounds to the nearest; kept tokens keep
    their positions, where the official code renumbers them; LLaVA-NeXT's newlines stay and are no candidates; a token
    is picked once, while the official code can pick one of several equal tokens again.
    """

    name = "divprune"
    paper = "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, arXiv 2503.02175"

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Selection:
        n = tokens.features.shape[1]
        return Selection.of_indices(farthest_points(tokens.features, keep_count(n, self.keep)), n)
