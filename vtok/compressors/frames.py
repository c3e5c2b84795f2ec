"""Baseline: fewer frames, before the language model (`frames`) or before the encoder (`sampled_frames`)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.options import Fraction
from vtok.stages.patches import Patches
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
        (t, p), device = clip_shape(tokens.layout), tokens.features.device
        frame = spaced(t, self.n_frames(tokens.layout), device)
        index = frame[:, None] * p + torch.arange(p, device=device)
        return Selection.of_indices(index.flatten().expand(len(tokens.features), -1), t * p)


@dataclass(frozen=True, kw_only=True)
class SampledFrames(Patches):
    """Encode evenly spaced frames alone, so that the encoder's time falls with their number. Positions and timestamps
    stay those of the whole clip.

    keep: fraction of the frames, rounded down, at least one. Frames that were encoded together (two, in Qwen-VL) are
        one here.
    A picture is a clip of one frame: it stays whole.
    Differs from the paper: there is none; a baseline.
    """

    name = "sampled_frames"
    needs = frozenset({"patch_list", "frames"})
    paper = "baseline"
    by_grid = True
    examples = ({"keep": 0.5},)

    keep: Fraction = 0.25

    def anchors(self, pixels: Tensor) -> Tensor:
        t, rows, cols, _ = pixels.shape
        kept = spaced(t, keep_count(t, self.keep), pixels.device)
        apart = (torch.arange(t, device=pixels.device)[:, None] - kept).abs()  # [T, K]
        nearest = kept[apart.argmin(1)]  # ties to the earlier
        place = torch.arange(rows * cols, device=pixels.device).view(rows, cols)
        return nearest[:, None, None] * rows * cols + place


def spaced(t: int, k: int, device: torch.device | None = None) -> Tensor:
    """[k] of t frames, evenly spaced and centred: floor((i + 0.5) t / k)."""
    return (2 * torch.arange(k, device=device) + 1) * t // (2 * k)
