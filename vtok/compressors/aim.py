"""AIM: similar tokens are merged before the language model, unimportant ones dropped layer by layer inside it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from vtok.compressor import Compressor
from vtok.errors import InvalidValue
from vtok.kernels.attention_column_sums import attention_column_sums
from vtok.kernels.bipartite_match import bipartite_match
from vtok.kernels.merge import merge as merge_groups
from vtok.kernels.pagerank import pagerank
from vtok.options import AtLeast1, Depth, In, Keep, Positive
from vtok.stages.llm import InLLM
from vtok.stages.pre_llm import PreLLM
from vtok.types import Attention, Layout, Selection, VisualTokens, keep_count, share

PAPER = "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning, arXiv 2412.03248"


@dataclass(frozen=True, kw_only=True)
class AIMMerge(PreLLM):
    """Merge each even token into its most similar odd one, in rounds that halve the tokens (Section 3.1).

    keep: fraction or count, per picture, of the tokens after merging. A clip's frames are merged each alone, and so are
        a thumbnail and its crops.
    weighting: "plain" averages averages, as the official code does; "size" weights by how many tokens each stands for.
    official: which tokens merge is as in the released code. There those that found no partner come first behind each
        round, the most similar ahead, so that the next round pairs others; and round i merges at most t // 2^i of t.
    Differs from the paper: the last round merges as many as bring each plane exactly to its count; a merged token
    stands where its odd token stood; tokens keep raster order, also between rounds unless `official`; features are
    compared after the projector, also for LLaVA-1.5, where the official code compares the encoder's keys before it.
    """

    name = "aim_merge"
    paper = PAPER
    merges = True

    weighting: Literal["plain", "size"] = "plain"
    official: bool = False

    def counts(self, layout: Layout) -> list[int]:
        """How many tokens of each plane stay."""
        if isinstance(self.keep, int):
            return share(keep_count(layout.n, self.keep), [plane.size for plane in layout.planes])
        return [keep_count(plane.size, self.keep) for plane in layout.planes]

    def count(self, layout: Layout) -> int:
        return sum(self.counts(layout))

    def select(self, tokens: VisualTokens) -> Selection:
        features, layout = tokens.features, tokens.layout
        b, n, d = features.shape
        counts = self.counts(layout)
        keep, merged, into, weights = [], [], [], []
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, (plane, count) in enumerate(zip(layout.planes, counts)):
            by_size.setdefault((plane.size, count), []).append(i)
        order = torch.empty(n, dtype=torch.long)  # where each token went when planes of one size were put together
        done = 0
        for (size, count), members in by_size.items():
            places = torch.cat([torch.arange(layout.starts[i], layout.starts[i] + size) for i in members])
            order[places] = torch.arange(done, done + len(places))
            done += len(places)
            x = features[:, places.to(features.device)].view(b * len(members), size, d)
            alive, y, target, weight = merge(x, count, self.weighting, self.official)
            base = places.view(len(members), size)[:, :1].to(features.device)  # [m, 1] first token of each plane
            target = target.view(b, len(members), size)
            keep.append(alive.view(b, -1))
            merged.append(y.reshape(b, -1, d))
            weights.append(weight.view(b, -1))
            into.append(torch.where(target < 0, target, target + base).view(b, -1))
        order = order.to(features.device)
        return Selection(
            torch.cat(keep, 1)[:, order],
            n_kept=sum(counts),
            features=torch.cat(merged, 1)[:, order],
            merged_into=torch.cat(into, 1)[:, order],
            weight=torch.cat(weights, 1)[:, order],
        )


def merge(
    x: Tensor, count: int, weighting: str = "plain", official: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge x [B, t, D] in rounds of at most half of what is left, down to `count` tokens, 0 <= count <= t.

    Returns alive [B, t] bool, features [B, t, D] (dead rows as they were), into [B, t]: the living token that stands
    for each, and weight [B, t]: the share of each in that. Gradient flows from a living row to all that it stands for.
    With count 0 nothing lives and into is -1. Means are taken in fp32 and rounded to x's dtype once, at the end.
    """
    b, t, d = x.shape
    if count == 0:
        nothing = torch.full((b, t), -1, device=x.device)
        return x.new_zeros(b, t, dtype=torch.bool), x, nothing, torch.zeros(b, t, device=x.device)
    place = torch.arange(t, device=x.device).expand(b, t)  # [B, left] where each living token stands
    row = place  # [B, t] which of them stands for each token
    features, size, weight = x.float(), None, torch.ones(b, t, device=x.device)
    most = t  # that a round merges
    while place.shape[1] > count:
        left, most = place.shape[1], max(1, most // 2 if official else most)
        r = min(left // 2, left - count, most)
        source, target = bipartite_match(features, left // 2 if official else r)
        order = _order(left, source, r, official)  # [B, left]
        source, target = source[:, :r], target[:, :r]
        group = torch.empty_like(order).scatter_(1, order, torch.arange(left, device=x.device).expand(b, -1))
        # the new row of each that stays, and of what it is merged into
        group = group.scatter(1, source, group.gather(1, target))
        features, total = merge_groups(features, group, left - r, size)
        of_one = (features.new_ones(b, left) if size is None else size) / total.gather(1, group)  # [B, left] its share
        weight = weight * of_one.gather(1, row)
        size = total if weighting == "size" else None
        place = place.gather(1, order[:, : left - r])
        row = group.gather(1, row)
    alive = torch.zeros(b, t, dtype=torch.bool, device=x.device).scatter_(1, place, True)
    merged = x.scatter(1, place[..., None].expand(-1, -1, d), features.to(x.dtype))
    return alive, merged, place.gather(1, row), weight


def _order(left: int, source: Tensor, r: int, official: bool) -> Tensor:
    """[B, left] the tokens in the order in which the next round finds them, the first `r` of `source` behind all.

    source: [B, at least r] even tokens, the most similar first; all but one that is over, where `official`."""
    index = torch.arange(left, device=source.device)
    key = index.expand(len(source), -1)
    if official:  # even tokens in the order of their similarity, then odd ones
        key = torch.where(index % 2 == 1, left + index, left - 1).expand(len(source), -1)
        key = key.scatter(1, source, torch.arange(source.shape[1], device=source.device).expand_as(source))
    return key.scatter(1, source[:, :r], 3 * left).argsort(dim=1, stable=True)


@dataclass(frozen=True, kw_only=True)
class AIMPrune(InLLM):
    """Drop visual tokens by PageRank on the attention of a run of decoder layers, until none is left (Section 3.2).

    start, end: layers l1 and l2 of the paper, as fractions of the depth or as absolute layers (int). All visual tokens
        are present up to layer l1, 1 - (l - l1 + 1) / (l2 - l1) of them after each layer l from l1 on, none after
        layer l2 - 1. The defaults are the paper's 14 and 22 of 28 layers; for Vicuna's 32 it has start=13, end=21.
        A start at the last layer or later drops nothing.
    tau, iters, damping, head_reduce: of the PageRank, as in the official code; the paper gives none of them.
    votes: "all", the paper's PageRank, in which each token of the prompt votes. It does not know the question: in most
        of SmolLM2's layers it finds what an answer needs no better than chance (docs/probe.md). "instruction", ours:
        the attention that the text behind the first visual token pays, as in `schedule`.
    anchor: the token at which the prompt ends, see `InLLM`; later tokens have no vote.
    Under a `budget` the whole schedule moves, and with it the layer from which on no visual token is left: in a decoder
    of 8 layers a budget of 0.5 leaves none from layer 4 on, before such a model has read the picture.
    Differs from the paper: dropped tokens are gone, so they do not vote in later layers (the official code masks them
    and lets them vote). Several pictures a sample share one ranking. What goes wrong in the official code does not
    here: positions that jump back while decoding, NaN and dropped text with left padding, one sample's text length
    for the whole batch, a fixed depth, logits rounded to half precision.
    """

    name = "aim_prune"
    slow = True
    several_turns = False  # all tokens up to the anchor rank the others
    needs = frozenset({"attention"})
    paper = PAPER
    examples = ({"start": 1, "end": 3},)

    keep: float = field(default=1.0, init=False, repr=False)  # the schedule says it
    start: Depth = 0.5
    end: Depth = 22 / 28
    tau: Positive = 0.1
    iters: AtLeast1 = 5
    damping: Annotated[float, In("[0, 1]")] = 0.0
    head_reduce: Literal["rms", "mean"] = "rms"
    votes: Literal["all", "instruction"] = "all"

    is_identity: ClassVar[bool] = False

    def layers(self, n_layers: int) -> tuple[int, int]:
        """(l1, l2) for a decoder of `n_layers`."""
        first, last = (v if isinstance(v, int) else round(v * n_layers) for v in (self.start, self.end))
        if isinstance(self.start, float) and isinstance(self.end, float) and self.start < self.end:
            last = max(last, first + 1)  # few layers: two fractions may round to one layer
        if first >= last:
            raise InvalidValue(
                f"Of {n_layers} layers, start={self.start} is layer {first} and end={self.end} layer {last}: "
                f"the end must come after the start."
            )
        return first, last

    def schedule(self, n_layers: int) -> dict[int, float | int]:
        first, last = self.layers(n_layers)
        return {layer: max(0.0, 1 - (layer - first + 1) / (last - first)) for layer in range(first, last)}

    def score(self, attention: Attention) -> Tensor:
        if self.votes == "instruction":
            return attention_column_sums(
                attention.query, attention.key, attention.instruction, attention.scaling, attention.valid
            )
        return pagerank(
            attention.query,
            attention.key,
            attention.scaling,
            attention.valid,
            attention.anchor,
            self.tau,
            self.iters,
            self.damping,
            self.head_reduce,
        )

    def mean_keep(self, n_layers: int) -> float:
        """Mean over layers of the fraction of visual tokens present."""
        schedule, present, total = self.schedule(n_layers), 1.0, 0.0
        for layer in range(n_layers):
            total += present
            present = schedule.get(layer, present)
        return total / n_layers

    def with_budget(self, budget: float, n_layers: int) -> AIMPrune:
        """The latest start, with as many pruning layers as now, whose mean is within the budget."""
        first, last = self.layers(n_layers)
        for start in range(n_layers, -1, -1):
            moved = replace(self, start=start, end=start + last - first)
            if moved.mean_keep(n_layers) <= budget:
                return moved
        raise InvalidValue(
            f"aim_prune with {last - first} pruning layers of {n_layers} keeps at least "
            f"{moved.mean_keep(n_layers):.3f} on average, more than a budget of {budget}. Merge before ('aim'), or "
            f"bring start and end together."
        )


@dataclass(frozen=True, kw_only=True)
class AIM(AIMPrune):
    """`AIMMerge` before the language model and `AIMPrune` in it, with the parameters of both.

    keep: the merge's ratio; the schedule comes on top.
    weighting, official: of the merge, see `AIMMerge`.
    Differs from the paper: see the two.
    """

    name = "aim"
    stage = "pre_llm+llm"
    merges = True
    slow = False  # merging leaves few tokens to score
    examples = ({"keep": 0.5, "start": 1, "end": 3},)

    keep: Keep = field(default=0.25)
    weighting: Literal["plain", "size"] = "plain"
    official: bool = False

    def parts(self) -> tuple[Compressor, ...]:
        own = {f.name: getattr(self, f.name) for f in fields(AIMPrune) if f.init}
        return (AIMMerge(keep=self.keep, weighting=self.weighting, official=self.official), AIMPrune(**own))

    def with_budget(self, budget: float, n_layers: int) -> AIM:
        """The schedule as it is, and the merge's `keep` such that the two together are within the budget."""
        mean = AIMPrune.mean_keep(self, n_layers)
        return replace(self, keep=min(1.0, budget / mean))
