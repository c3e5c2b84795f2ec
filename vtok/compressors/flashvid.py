"""FlashVID: of each frame tokens stay that are attended to and differ, the others are merged along trees in time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Annotated

import torch
from torch import Tensor

from vtok.compressor import Compressor
from vtok.compressors.fastv import FastV
from vtok.density import clusters
from vtok.kernels.farthest_points import farthest_points
from vtok.options import AtLeast1, EncoderLayer, Fraction, In, Keep, Part
from vtok.safe_layer import FullDepth
from vtok.segments import Segments
from vtok.stages.pre_llm import PreLLM
from vtok.tower import Layer
from vtok.types import Selection, VisualTokens, ranks, sum_of_members
from vtok.views import attention_by_frame, clip_shape, finite, unit

PAPER = "FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging, "
PAPER += "arXiv 2602.08024"
Cosine = Annotated[float, In("[-1, 1]")]


@dataclass(frozen=True, kw_only=True)
class FlashVIDMerge(PreLLM):
    """The part of FlashVID before the language model. In each frame most of the count goes to tokens far from each
    other, distances weighted by the encoder's attention. Each other token links to the most similar one of the frame
    before, within a segment; such trees become the mean of their tokens, and the trees that begin in a frame are
    clustered by density.

    keep: the fraction of a clip's tokens (or a count) that is planned for, the same in each frame and rounded up. What
        stays goes by the content, as the number of clusters is rounded up in each frame: up to one token a frame more,
        or less where no token is left to be merged.
    alpha: the part of a frame's count that goes to attended tokens, rounded up.
    tau: tokens link whose cosine is above it. Where fewer than the plan would stay, only the most similar ones link.
    segment_tau: a segment ends where the cosine of the means of a frame and the next is below it.
    segments: how many there are at least, as far as there are frames: the released code has 4 for Qwen's models and 8
        for LLaVA's.
    event: distances are also weighted by a token's product with the means of its segment's frames (ADTS v2 of the
        released code, which its scripts for Qwen leave off); below 0 it counts as 0, where it would repel there.
    layer: of the encoder, whose attention counts: what a token gets from all others, head-mean.
    A tree's mean stands where its first token stands, a cluster's where its centre does. A picture of one view is a
    clip of one frame.
    Differs from the paper: in nothing that it says. The released code divides the sum of a tree by one more than the
    children of its root, whatever hangs below these, so that deep trees enter too long; here it is the mean. A segment
    of one frame there also clusters the tokens that it keeps, so that places come twice; here none does. Ties of
    densities go to the earlier token, where it adds random numbers; each clip of a batch is compressed, where it takes
    one clip a call; LLaVA-OneVision's pooled tokens have the attention of the patch in their middle.
    """

    name = "flashvid_merge"
    needs = frozenset({"frames", "encoder_attention"})
    paper = PAPER
    adaptive = True
    merges = True
    examples = ({"keep": 0.4, "tau": 0.3}, {"keep": 0.4, "tau": 0.3, "segments": 1, "segment_tau": 0.0, "event": True})

    alpha: Part = 0.7
    tau: Cosine = 0.8
    segment_tau: Cosine = 0.9
    segments: AtLeast1 = 4
    event: bool = False
    layer: EncoderLayer = -1

    @property
    def encoder_layers(self) -> dict[str, tuple[Layer, ...]]:
        return {"encoder_attention": (self.layer,)}

    def plan(self, t: int, p: int) -> tuple[int, int]:
        """How many tokens of each of t frames of p are planned for, and how many of them are attended ones."""
        ratio = self.keep if isinstance(self.keep, float) else self.keep / (t * p)
        count = min(p, math.ceil(p * ratio - 1e-9))
        return count, math.ceil(count * self.alpha - 1e-9)

    def select(self, tokens: VisualTokens) -> Selection:
        (t, p), n = clip_shape(tokens.layout), tokens.layout.n
        with torch.no_grad(), torch.autocast(tokens.features.device.type, enabled=False):
            x = finite(tokens.features).unflatten(1, (t, p))  # [B, T, P, D]
            count, attended = self.plan(t, p)
            segments = Segments.of(x, self.segment_tau, self.segments)
            weight = attention_by_frame(tokens, self.layer)
            if self.event:
                weight = weight * relevance(x, segments)
            chosen = diverse(x, weight, attended)
            root = trees(unit(x), ~chosen, segments, self.tau, p - count)
            into, weight = merged(x, root, ~chosen, segments, count - attended)
        features = sum_of_members(tokens.features, into, weight)
        keep = into == torch.arange(n, device=into.device)
        return Selection(keep, features=features, merged_into=into, weight=weight)


def relevance(x: Tensor, segments: Segments) -> Tensor:
    """[B, T, P] the product of each token of x [B, T, P, D] with the mean of its segment, at least 0."""
    frames = x.mean(2)  # [B, T, D]
    mean = (segments.same.float() @ frames) / segments.length[..., None]
    return (x * mean[:, :, None]).sum(-1).clamp(min=0)


def diverse(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """[B, T, P] bool: `count` tokens of each frame of x [B, T, P, D] that are far from each other.

    weight: [B, T, P], by which the distances of each are multiplied."""
    picks = farthest_points(x.flatten(0, 1), count, weight.flatten(0, 1))  # [B * T, count]
    chosen = torch.zeros(weight.shape, dtype=torch.bool, device=x.device)
    return chosen.flatten(0, 1).scatter(1, picks, True).view(weight.shape)


def trees(x: Tensor, free: Tensor, segments: Segments, tau: float, links: int) -> Tensor:
    """[B, N] the root of each token among the N = T * P, itself where it is one.

    x: [B, T, P, D] of unit length. free: [B, T, P] bool, the tokens that may be in a tree. links: how many there may be
    in a segment for each of its frames; the most similar ones then, ties to the earlier.
    """
    b, t, p, _ = x.shape
    own = torch.arange(t * p, device=x.device).view(t, p).expand(b, -1, -1)
    similar, parent = [x.new_full((b, p), -torch.inf)], [own[:, 0]]
    for before, here in zip(range(t), range(1, t)):
        best = (x[:, here] @ x[:, before].mT).masked_fill(~free[:, None, before], -torch.inf).max(2)  # over [B, P, P]
        similar.append(best.values)
        parent.append(own[:, before].gather(1, best.indices))
    similar, parent = torch.stack(similar, 1), torch.stack(parent, 1)
    starts = torch.cat([segments.index.new_ones(b, 1), segments.index.diff(dim=1)], 1) > 0  # [B, T]
    linked = free & (similar > tau) & ~starts[..., None]
    sizes = torch.zeros_like(segments.length).scatter_add(1, segments.index, torch.full_like(segments.index, p))
    score = similar.masked_fill(~linked, -torch.inf).flatten(1)
    rank = ranks(score, segments.index.repeat_interleave(p, 1), sizes).view(linked.shape)
    linked &= rank < (segments.length * links)[..., None]
    root = torch.where(linked, parent, own).flatten(1)
    for _ in range((t - 1).bit_length()):  # each step doubles how far up a tree it is
        root = root.gather(1, root)
    return root


def merged(x: Tensor, root: Tensor, free: Tensor, segments: Segments, spare: int) -> tuple[Tensor, Tensor]:
    """For each of the N tokens the one that it goes into, or -1, and its weight there, [B, N] each.

    x: [B, T, P, D]. root: of `trees`. free: [B, T, P] bool, those in a tree; others stay as they are. spare: how many
    means of trees are planned for in each frame; each frame has its share of a segment's by how many begin in it.
    """
    b, t, p, _ = x.shape
    own = torch.arange(t * p, device=x.device)
    is_root = (free.flatten(1) & (root == own)).view(b, t, p)
    size = torch.zeros_like(root).scatter_add(1, root, torch.ones_like(root))  # of each tree
    of_token = 1 / size.gather(1, root)
    means = sum_of_members(x.flatten(1, 2), root, of_token).view(x.shape)
    roots = is_root.sum(2)  # [B, T]
    all_roots = segments.total(roots)
    share = (roots * segments.length * spare + all_roots - 1) // all_roots.clamp(min=1)  # rounded up
    centre = clusters(means, share.minimum(roots), valid=is_root)  # [B, T, P]
    centre = torch.where(centre < 0, -1, centre + own.view(t, p)[:, :1]).flatten(1)
    trees_of = torch.zeros_like(root).scatter_add(1, centre.clamp(min=0), is_root.flatten(1).long())
    centre = centre.gather(1, root)
    weight = of_token / trees_of.gather(1, centre.clamp(min=0)).clamp(min=1)
    free = free.flatten(1)
    return torch.where(free, centre, own), torch.where(free, weight, 1.0)


@dataclass(frozen=True, kw_only=True)
class FlashVID(FastV):
    """`FlashVIDMerge` before the language model, and `FastV` late in it.

    keep: r of the paper, the mean over the decoder's layers of a clip's tokens (or a count) that is planned for: more
        enter it, fewer leave it.
    expansion: how many times as many enter it.
    layer: K of the paper, after how many decoder layers, or which part of them, tokens are dropped: 20 of 28; for
        Qwen3-VL the released code has 28 of 36, with remain=0.1.
    remain: which part of those that entered remains then, rounded down, where the paper rounds up. With 1.25, 20 of 28
        and 0.3 the mean is exactly `keep`.
    alpha, tau, segment_tau, segments, event: see `FlashVIDMerge`.
    encoder_layer: its `layer`.
    Differs from the paper: see the two.
    """

    name = "flashvid"
    stage = "pre_llm+llm"
    probed = "fastv"
    needs = frozenset({"frames", "encoder_attention", "attention"})
    paper = PAPER
    adaptive = True
    merges = True
    examples = ({"keep": 0.4, "tau": 0.3, "layer": 2},)

    keep: Keep = field(default=0.25)
    expansion: Annotated[float, In(">= 1")] = 1.25
    layer: FullDepth = 20 / 28
    remain: Fraction = 0.3
    alpha: Part = 0.7
    tau: Cosine = 0.8
    segment_tau: Cosine = 0.9
    segments: AtLeast1 = 4
    event: bool = False
    encoder_layer: EncoderLayer = -1

    def parts(self) -> tuple[Compressor, ...]:
        shared = {f.name: getattr(self, f.name) for f in fields(FlashVIDMerge) if f.init and hasattr(self, f.name)}
        before = FlashVIDMerge(**shared | {"keep": self._entering(), "layer": self.encoder_layer})
        own = {f.name: getattr(self, f.name) for f in fields(FastV) if f.init}
        return before, FastV(**own | {"keep": 1.0 if self.is_identity else self.remain})

    def _entering(self) -> float | int:
        if isinstance(self.keep, int):
            return math.ceil(self.keep * self.expansion - 1e-9)
        return min(1.0, self.keep * self.expansion)

    def with_budget(self, budget: float, n_layers: int) -> FlashVID:
        """The layer as it is, and `keep` such that the plan is within the budget."""
        full = self.full_layers(n_layers)
        mean = self.expansion * (full + self.remain * (n_layers - full)) / n_layers
        keep = budget / mean
        return replace(self, keep=keep if keep < 1 else float(budget))  # 1.0 would leave the decoder alone
