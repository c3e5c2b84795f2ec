"""FastVID: attended tokens of each frame, and dense ones of every fourth, into which a segment's others are merged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtok.density import distances, peaks
from vtok.options import AtLeast1, EncoderLayer, In, Part
from vtok.segments import Segments
from vtok.stages.pre_llm import PreLLM
from vtok.tower import Layer
from vtok.types import Layout, Selection, VisualTokens, ranks, sum_of_members
from vtok.views import attention_by_frame, clip_shape, finite, unit

NEIGHBOURS = 4  # by which density is told


@dataclass(frozen=True, kw_only=True)
class FastVID(PreLLM):
    """Of each frame the tokens with most of the encoder's attention stay. The rest of a segment's count are targets, in
    every fourth frame from its last one backwards, chosen there by density; each other token of the segment goes into
    the most similar target.

    keep: r of the paper, the fraction of a clip's tokens that enter the language model (or a count), rounded down in
        each frame, to one at least.
    context: d of the paper, the part of a frame's count that is spent on targets, rounded down.
    every: p of the paper, how many frames apart targets are.
    beta: a target keeps this weight against the mean of the tokens that go into it, itself among them, or
        1 / (their number + 1) if that is more.
    tau: a segment ends where the cosine of the means of a frame and the next is below it. 0.84 for Qwen2.5-VL in the
        released code.
    segments: how many there are at least, as far as there are frames.
    layer: of the encoder, whose attention counts: what a token gets from all others, head-mean.
    A picture of one view is a clip of one frame, and has its targets in itself.
    Differs from the paper: a token goes into one target, the most similar of its segment, where the released code gives
    it to one of each frame that has targets; that is the same in segments of up to four frames. The count is exact,
    also where a segment does not divide, of which the released code drops the rest, and where it does not fit: above
    keep=0.4545 the frames with targets would need more tokens than they have, and the released code fails; here what is
    over goes to attended tokens of the other frames.
    Ties of densities go to the earlier token, where it adds random numbers. Frames are compared by the means of their
    tokens, and attention is what tokens get in the encoder, where the code for LLaVA takes both from SigLIP's pooling
    head; its second threshold for Qwen2.5-VL, which leaves frames without tokens, is not here.
    """

    name = "fastvid"
    needs = frozenset({"frames", "encoder_attention"})
    paper = "FastVID: Dynamic Density Pruning for Fast Video Large Language Models, arXiv 2503.11187"
    merges = True
    examples = ({"keep": 0.4}, {"keep": 0.5, "every": 2, "tau": 0.3, "segments": 1})

    context: Part = 0.4
    every: AtLeast1 = 4
    beta: Part = 0.6
    tau: Annotated[float, In("[-1, 1]")] = 0.9
    segments: AtLeast1 = 8
    layer: EncoderLayer = -1

    @property
    def encoder_layers(self) -> dict[str, tuple[Layer, ...]]:
        return {"encoder_attention": (self.layer,)}

    def of_frame(self, layout: Layout) -> int:
        """How many tokens stay for each frame."""
        t, p = clip_shape(layout)
        count = self.keep // t if isinstance(self.keep, int) else math.floor(p * self.keep + 1e-9)
        return min(p, max(1, count))

    def count(self, layout: Layout) -> int | None:
        return None if self.adaptive_now else clip_shape(layout)[0] * self.of_frame(layout)

    def select(self, tokens: VisualTokens) -> Selection:
        (t, p), n = clip_shape(tokens.layout), tokens.layout.n
        with torch.no_grad(), torch.autocast(tokens.features.device.type, enabled=False):
            x = finite(tokens.features).unflatten(1, (t, p))  # [B, T, P, D]
            segments = Segments.of(x, self.tau, self.segments)
            count = self.of_frame(tokens.layout)
            context = math.floor(count * self.context + 1e-9)
            attended, targets = shares(segments, count - context, context, p, self.every)
            top = ranks(attention_by_frame(tokens, self.layer)) < attended[..., None]
            score = peaks(distances(x), NEIGHBOURS, ~top)
            target = ~top & (ranks(score) < targets[..., None])
            into = nearest(unit(x), target, segments, context * t)  # [B, T, P]
            into = torch.where(top, torch.arange(n, device=into.device).view(t, p), into).flatten(1)
            members = torch.zeros_like(into).scatter_add(1, into.clamp(min=0), (into >= 0).long())
            weight = weights(into, members.gather(1, into.clamp(min=0)), self.beta)
        features = sum_of_members(tokens.features, into, weight)
        keep = into == torch.arange(n, device=into.device)
        return Selection(keep, n_kept=count * t, features=features, merged_into=into, weight=weight)


def shares(segments: Segments, attended: int, context: int, p: int, every: int) -> tuple[Tensor, Tensor]:
    """How many attended tokens and how many targets each frame of p tokens has, [B, T] long each.

    attended, context: how many of each are planned for in every frame. A segment's targets are shared evenly over its
    frames that have any, the later ones first; what does not fit there over the attended of the others, the earlier
    ones first.
    """
    length, t = segments.length, segments.length.shape[1]
    frame = torch.arange(t, device=length.device)
    earlier = (segments.same & (frame < frame[:, None])).sum(2)  # [B, T] frames of the segment before each
    later = length - 1 - earlier
    has, holders = later % every == 0, (length + every - 1) // every
    total = context * length
    targets = total // holders + (later // every < total % holders)
    targets = torch.where(has, targets.clamp(max=p - attended), 0)
    over, others = total - segments.total(targets), (length - holders).clamp(min=1)
    place = earlier - (segments.same & has[:, None] & (frame < frame[:, None])).sum(2)  # among those without targets
    return attended + torch.where(has, 0, over // others + (place < over % others)), targets


def nearest(x: Tensor, target: Tensor, segments: Segments, most: int) -> Tensor:
    """[B, T, P] for each token the most similar target of its segment, ties to the earlier; itself for a target, -1
    where there is none.

    x: [B, T, P, D] of unit length. target: [B, T, P] bool, at most `most` of a clip.
    """
    t, p = target.shape[1:]
    place = target.flatten(1).byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # [B, K], targets first
    if most == 0:
        return torch.full(target.shape, -1, device=x.device)
    there = target.flatten(1).gather(1, place)
    rows = x.flatten(1, 2).gather(1, place[..., None].expand(-1, -1, x.shape[3])).mT  # [B, D, K]
    segment = segments.index.gather(1, place // p).masked_fill(~there, -1)  # [B, K]
    found = []
    for frame in range(t):
        similar = (x[:, frame] @ rows).masked_fill((segment != segments.index[:, frame, None])[:, None], -torch.inf)
        best = similar.max(2)  # over [B, P, K]
        found.append(torch.where(best.values > -torch.inf, place.gather(1, best.indices), -1))
    return torch.where(target, torch.arange(t * p, device=x.device).view(t, p), torch.stack(found, 1))


def weights(into: Tensor, members: Tensor, beta: float) -> Tensor:
    """[B, N] the weight of each token in the one that it goes into. members: [B, N] how many go there, itself among
    them."""
    members = members.clamp(min=1)
    own = (1 / (members + 1)).clamp(min=beta)
    mean = (1 - own) / members
    return mean + torch.where(into == torch.arange(into.shape[1], device=into.device), own, 0.0)
