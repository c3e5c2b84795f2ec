"""EVS: the tokens of a clip that changed most since the frame before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.stages.pre_llm import PreLLM
from vtok.types import Layout, Selection, VisualTokens, keep_count
from vtok.views import clip_shape, unit


@dataclass(frozen=True, kw_only=True)
class EVS(PreLLM):
    """The first frame stays whole; of the others the tokens stay that are least similar to the token at their place in
    the frame before, over the whole clip.

    keep: fraction (or count) of a clip's tokens that enter the language model, 1 - q of the paper; never less than one
        frame. A clip of at most 1 / keep frames keeps its first alone.
    A picture of one view is a clip of one frame: it stays whole, as where serving engines have the method.
    Slow change is not seen, since the frame before is looked at whether it was kept or not.
    Differs from the paper: in nothing that we know of.
    """

    name = "evs"
    needs = frozenset({"frames"})
    paper = "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference, arXiv 2510.14624"
    examples = ({"keep": 0.5},)

    def count(self, layout: Layout) -> int:
        _, of_frame = clip_shape(layout)
        return max(of_frame, keep_count(layout.n, self.keep))

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Selection:
        change = changes(tokens.features.unflatten(1, clip_shape(tokens.layout))).flatten(1)  # [B, N]
        order = change.argsort(dim=1, descending=True, stable=True)  # ties to the earlier
        return Selection.of_indices(order[:, : self.count(tokens.layout)], tokens.layout.n)


def changes(x: Tensor) -> Tensor:
    """1 - cosine of each token of x [B, T, P, D] and the one at its place in the frame before, [B, T, P]; infinite in
    the first frame. Half the squared distance at length 1, which is exactly 0 where nothing changed."""
    x = unit(x)
    change = (x[:, 1:] - x[:, :-1]).square().sum(-1) / 2
    return torch.cat([torch.full_like(x[:, :1, :, 0], math.inf), change], 1)
