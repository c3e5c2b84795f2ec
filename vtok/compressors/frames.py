"""Baseline: fewer frames."""

from dataclasses import dataclass

import torch

from vtok.stages.pre_llm import PreLLM
from vtok.types import Layout, Selection, VisualTokens, keep_count
from vtok.views import clip_shape


@dataclass(frozen=True, kw_only=True)
class Frames(PreLLM):
    """Keep evenly spaced frames whole, as if the clip had been sampled more rarely.

    keep: fraction of the frames, rounded down; a count is of tokens, of which as many whole frames stay as they fill.
        At least one.
    A picture of one view is a clip of one frame: it stays whole. All frames are encoded, so the encoder's time stays.
    Differs from the paper: there is none; a baseline, and one that many methods for clips do not beat.
    """

    name = "frames"
    needs = frozenset({"frames"})
    paper = "baseline"
    by_grid = True
    examples = ({"keep": 0.5},)

    def n_frames(self, layout: Layout) -> int:
        frames, of_frame = clip_shape(layout)
        if isinstance(self.keep, int):
            return min(frames, max(1, self.keep // of_frame))
        return keep_count(frames, self.keep)

    def count(self, layout: Layout) -> int:
        return self.n_frames(layout) * clip_shape(layout)[1]

    def select(self, tokens: VisualTokens) -> Selection:
        (t, p), k = clip_shape(tokens.layout), self.n_frames(tokens.layout)
        device = tokens.features.device
        frame = (2 * torch.arange(k, device=device) + 1) * t // (2 * k)  # [K], centred: floor((i + 0.5) T / K)
        index = frame[:, None] * p + torch.arange(p, device=device)
        return Selection.of_indices(index.flatten().expand(len(tokens.features), -1), t * p)
