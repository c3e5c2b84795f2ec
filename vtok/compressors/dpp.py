"""DPP: keep the tokens that span the largest volume."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtok.kernels.greedy_dpp import greedy_dpp
from vtok.stages.pre_llm import PreLLM
from vtok.types import Selection, VisualTokens, keep_count


@dataclass(frozen=True, kw_only=True)
class DPP(PreLLM):
    """Greedy: each pick raises the determinant of the kept tokens' cosines most. CDPruner without its condition, the
    question, and so the same for any.

    keep: fraction or count of the tokens, per picture. Crops and thumbnail, or the frames of a clip, are one set.
    The first pick is the first token, since all are of length 1.
    Differs from the paper: see `CDPruner`, of which it is a row in the table of ablations.
    """

    name = "dpp"
    paper = "Beyond Attention or Similarity (CDPruner), arXiv 2506.10967"
    slow = True

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Selection:
        n = tokens.layout.n
        return Selection.of_indices(greedy_dpp(tokens.features, keep_count(n, self.keep)), n)
