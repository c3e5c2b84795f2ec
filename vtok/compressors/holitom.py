"""HoliTom: a clip is cut into windows whose still places are worth most; these are merged, of the rest the tokens stay
that the encoder attends to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtok.density import clusters
from vtok.options import EncoderLayer, In, Part
from vtok.stages.pre_llm import PreLLM
from vtok.tower import Layer
from vtok.types import Selection, VisualTokens, ranks, sum_of_members
from vtok.views import attention_by_frame, clip_shape, unit


@dataclass(frozen=True, kw_only=True)
class HoliTom(PreLLM):
    """Windows of frames are those in which most tokens are still. In a window, a still place becomes the mean of its
    frames, and still places are clustered by density; of the others each frame keeps those with most of the encoder's
    attention.

    keep: r of the paper, the fraction of a clip's tokens (or a count) that is planned for. What stays goes by the
        content: a still clip keeps less, and numbers are rounded up in each frame.
    tau: a place is still from a frame to the next where the cosine of its tokens is above it. The paper's 0.8, and 0.65
        at keep=0.1.
    beta: the weight of a cluster's centre against the mean of its other members, in [0, 1].
    layer: of the encoder, whose attention counts: what a token gets from all others, head-mean.
    A merged token stands at the place of its centre in the first frame of its window. A picture of one view is a clip
    of one frame: the tokens with most attention stay.
    Differs from the paper: without the merging inside the decoder, which averages one token after the other, so that
    all depends on their order; `fastv` composes. Ties
    of densities go to the earlier token, where the released code adds random numbers; LLaVA-OneVision's pooled tokens
    have the attention of the patch in their middle; each clip of a batch has attention of its own, which the released
    code overwrites. Its contextual part for moving places, which raises there and which the paper sets to 0, is not
    here.
    """

    name = "holitom"
    needs = frozenset({"frames", "encoder_attention"})
    paper = "HoliTom: Holistic Token Merging for Fast Video Large Language Models, arXiv 2505.21334"
    adaptive = True
    merges = True
    examples = ({"keep": 0.3, "tau": 0.5},)

    tau: Annotated[float, In("[-1, 1]")] = 0.8
    beta: Part = 0.6
    layer: EncoderLayer = -1

    @property
    def encoder_layers(self) -> dict[str, tuple[Layer, ...]]:
        return {"encoder_attention": (self.layer,)}

    def select(self, tokens: VisualTokens) -> Selection:
        shape, n = clip_shape(tokens.layout), tokens.layout.n
        with torch.no_grad():
            x = tokens.features.unflatten(1, shape)  # [B, T, P, D]
            score = attention_by_frame(tokens, self.layer)  # [B, T, P]
            ratio = self.keep if isinstance(self.keep, float) else min(1.0, self.keep / n)
            still = runs(x, self.tau if ratio < 1 else math.inf)  # [B, T, P]
            table = longest(still).tolist()  # a wait for the device: of windows only the content knows
            parts = [self._merge(*each, ratio) for each in zip(x, score, still, table)]
            into, weight = (torch.stack(part) for part in zip(*parts))
        kept = into == torch.arange(n, device=into.device)
        features = sum_of_members(tokens.features, into, weight)
        return Selection(kept, features=features, merged_into=into, weight=weight)

    def _merge(self, x: Tensor, score: Tensor, still: Tensor, table: Sequence, ratio: float) -> tuple[Tensor, Tensor]:
        """For each token of a clip [T, P, D] the one that it goes into, or -1, and its weight there, each [T * P]."""
        t, p, _ = x.shape
        found, saved = windows(table)
        share = min(1.0, ratio / (1 - saved / (t * p)))
        static, count = torch.zeros_like(still, dtype=torch.bool), []
        for first, last in found:
            if last > first:
                static[first : last + 1] = still[last] >= last - first
            n_static = table[last][last - first] if last > first else 0
            count += [math.ceil((p - n_static) * share - 1e-9)] * (last - first + 1)
        place = torch.arange(t * p, device=x.device).view(t, p)
        top = ranks(score.masked_fill(static, -math.inf)) < torch.tensor(count, device=x.device)[:, None]
        into, weight = torch.where(top & ~static, place, -1), torch.ones(t, p, device=x.device)
        for first, last in found:
            n = table[last][last - first] if last > first else 0
            if (left := max(round(n * share), int(n == p))) == 0:  # a window keeps something
                continue
            at = torch.nonzero_static(static[first], size=n).squeeze(1)  # [n] still places
            mean = x[first : last + 1, at].float().mean(0)
            centre = clusters(mean, left)
            into[first : last + 1, at] = place[first, at[centre]]
            weight[first : last + 1, at] = weights(centre, self.beta) / (last - first + 1)
        return into.flatten(), weight.flatten()


def runs(x: Tensor, tau: float) -> Tensor:
    """How many frames before each token of x [B, T, P, D] its place has been still, [B, T, P] long; 0 in the first."""
    x = unit(x)
    moved = (x[:, 1:] * x[:, :-1]).sum(-1) <= tau
    frame = torch.arange(x.shape[1], device=x.device)[None, :, None]
    began = torch.cat([moved.new_ones(len(x), 1, x.shape[2]), moved], 1)
    return frame - torch.where(began, frame, 0).cummax(1).values


def longest(still: Tensor) -> Tensor:
    """[B, T, T] how many places have been still for at least so many frames before each frame. still: of `runs`."""
    t = still.shape[1]
    return torch.stack([(still >= length).sum(2) for length in range(t)], 2)


def windows(table: Sequence[Sequence[int]]) -> tuple[list[tuple[int, int]], int]:
    """The first and last frames of the windows that save most tokens, and how many: in a window of n + 1 frames each
    place that is still throughout saves n. Of equal ones the shorter last window. table: of `longest`, one clip's."""
    best, length = [0], []  # behind so many frames: what is saved, and how long the last window is
    for last in range(len(table)):
        options = [(best[last], 1)]
        options += [(best[last - n] + table[last][n] * n, n + 1) for n in range(1, last + 1)]
        most = max(saved for saved, _ in options)
        best.append(most)
        length.append(next(n for saved, n in options if saved == most))
    found, end = [], len(table)
    while end > 0:
        found.append((end - length[end - 1], end - 1))
        end -= length[end - 1]
    return found[::-1], best[-1]


def weights(centre: Tensor, beta: float) -> Tensor:
    """[n] the weight of each point in its cluster: beta for the centre, what is left for the others, in equal parts; a
    centre alone counts whole. centre [n]: of `clusters`."""
    others = torch.bincount(centre, minlength=len(centre))[centre] - 1  # in the cluster, beside its centre
    own = centre == torch.arange(len(centre), device=centre.device)
    return torch.where(own, torch.where(others > 0, beta, 1.0), (1 - beta) / others.clamp(min=1))
