"""VidCom2: frames that differ from the clip keep more, and in each the tokens that differ most from both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.options import Positive
from vtok.stages.pre_llm import PreLLM
from vtok.types import Layout, Selection, VisualTokens, keep_count, ranks
from vtok.views import clip_shape, finite, unit

SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)  # variances of the Gaussians


@dataclass(frozen=True, kw_only=True)
class VidCom2(PreLLM):
    """A token is common where it lies near the mean of the clip and that of its frame, by Gaussians over the channels
    that vary least. A frame of uncommon tokens gets more of the count, and in it the least common tokens stay.

    keep: R of the paper, the fraction (or count) of a clip's tokens that enter the language model; at least as many as
        it has frames.
    temperature: of the softmax that shares the count over frames; a smaller one gives the most unusual frame up to
        twice its part.
    A picture of one view is a clip of one frame: its least common tokens stay, for which the method was not made.
    Differs from the paper: the count is exact, as where vLLM has the method: behind the shares of the frames, the most
    common of the kept tokens of the clip go, or the least common of the dropped ones come back, so a frame can end with
    none. In the released code the total goes by the content. That code also leaves batches whole without a word, and
    moves a frame's newlines behind its tokens; here each clip of a batch is compressed, and separators stay in place.
    """

    name = "vidcom2"
    needs = frozenset({"frames"})
    paper = (
        "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models, "
        "arXiv 2505.14454"
    )
    examples = ({"keep": 0.3},)

    temperature: Positive = 0.01

    def count(self, layout: Layout) -> int:
        frames, _ = clip_shape(layout)
        return max(min(frames, layout.n), keep_count(layout.n, self.keep))

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Selection:
        shape = clip_shape(tokens.layout)
        k = self.count(tokens.layout)
        ratio = self.keep if isinstance(self.keep, float) else k / tokens.layout.n
        of_clip, of_frame = commonness(tokens.features.unflatten(1, shape))  # [B, T, P]
        counts = frame_counts(of_clip, ratio, self.temperature)  # [B, T]
        common = of_clip + of_frame
        chosen = ranks(-common) < counts[..., None]
        order = common.flatten(1).argsort(dim=1, stable=True)  # least common first
        order = order.gather(1, (~chosen).flatten(1).gather(1, order).byte().argsort(dim=1, stable=True))
        return Selection.of_indices(order[:, :k], tokens.layout.n)


def commonness(x: Tensor) -> tuple[Tensor, Tensor]:
    """How near each token of x [B, T, P, D] is to the mean of its clip, and to that of its frame: [B, T, P] each, in
    (0, 5]. What is not finite counts as zero."""
    x = finite(x)
    steady = x.flatten(1, 2).var(1, correction=0).argsort(dim=1, stable=True)[:, : x.shape[-1] // 2]  # [B, D // 2]
    x = unit(x.gather(3, steady[:, None, None].expand(*x.shape[:3], -1)))
    of_frame = x.mean(2, keepdim=True)  # [B, T, 1, D // 2], not of unit length
    return gaussians(x, of_frame.mean(1, keepdim=True)), gaussians(x, of_frame)


def gaussians(x: Tensor, centre: Tensor) -> Tensor:
    """The sum over `SCALES` s of exp(-|x - centre|^2 / 2 s), x [..., D]."""
    distance = (x - centre).square().sum(-1)
    return sum((distance / (-2 * scale)).exp() for scale in SCALES)


def frame_counts(of_clip: Tensor, keep: float, temperature: float) -> Tensor:
    """How many tokens each frame is to keep, [B, T] long, at least 1. of_clip: `commonness` in the clip, [B, T, P]."""
    share = (-of_clip.mean(2) / temperature).softmax(1)  # [B, T]
    scale = (keep * (1 + share - 1 / share.shape[1])).clamp(max=1.0)
    return (scale * of_clip.shape[2]).round().long().clamp(min=1)
