"""VisionZip: the tokens with most of the encoder's attention stay, the rest is merged into a few contextual ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from vtok.options import EncoderLayer, In
from vtok.stages.pre_llm import PreLLM
from vtok.tower import Layer
from vtok.types import Selection, VisualTokens, keep_count, ranks, share
from vtok.views import Views, unit

IMPORTANCE = {"cls": "cls_probs", "received": "encoder_attention"}  # name -> need


@dataclass(frozen=True, kw_only=True)
class VisionZip(PreLLM):
    """Dominant tokens by attention, contextual tokens by key similarity (Section 3.2), view by view: a thumbnail, each
    crop and each frame gets its share of the count, in proportion to its tokens.

    keep: fraction or count, per picture, of dominant and contextual tokens together.
    contextual: the part of them that is contextual, in [0, 1); the paper's 10 of 64, 20 of 128 and 30 of 192.
    layer: of the encoder, whose attention and keys count; None, the one whose output the
        projector reads, is the paper's (the last but one of LLaVA's CLIP).
    importance: "cls", the head-mean of the CLS token's attention; "received", for encoders without CLS as in the paper,
        the head-mean of the attention that a token gets from all others. Of several patches a token (pixel shuffle) the
        sum.
    merging: "mean", a contextual token becomes the mean of its target and of those merged into it; "add", as in the
        released code, the target plus the mean of the others, about twice as long.
    official: keys and merging as in the released code: keys are the mean over heads, and merging is "add". On pictures
        without padding (LLaVA-1.5) it then keeps and merges what that code does.
    The targets lie evenly among the tokens that are not dominant; each other one goes to the target of the most similar
    key. The mean, taken in fp32, stands at the target's place.
    Differs from the paper: features are merged behind the projector instead of before it; keys are compared with their
    heads next to each other, where the released code takes their mean (`official`); the CLS token itself, which the
    released code hands on, is no visual token here and stays out. That code also hands on dominant tokens before
    contextual ones under consecutive positions, where tokens keep their order and positions here (`renumber`); of
    LLaVA-NeXT's pictures it drops the newlines and may choose padding, where newlines stay here and padding is gone.
    """

    name = "visionzip"
    needs = frozenset({"cls_probs", "encoder_keys", "encoder_mean_keys"})
    paper = "VisionZip: Longer is Better but Not Necessary in Vision Language Models, arXiv 2412.04467"
    optional = {"cls_probs": {"importance": "received"}}
    hints = {"cls_probs": "For encoders without CLS there is importance='received'."}
    merges = True
    examples = ({"keep": 0.4}, {"keep": 0.4, "importance": "received"}, {"keep": 0.4, "official": True})

    contextual: Annotated[float, In("[0, 1)")] = 10 / 64
    layer: EncoderLayer = None
    importance: Literal["cls", "received"] = "cls"
    merging: Literal["mean", "add"] = "mean"
    official: bool = False

    @property
    def keys(self) -> str:
        """The need that tokens are compared by."""
        return "encoder_mean_keys" if self.official else "encoder_keys"

    @property
    def needs_now(self) -> frozenset[str]:
        return frozenset({IMPORTANCE[self.importance], self.keys})

    @property
    def encoder_layers(self) -> dict[str, tuple[Layer, ...]]:
        return dict.fromkeys(sorted(self.needs_now), (self.layer,))

    def counts(self, sizes: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """How many dominant and how many contextual tokens each view has, of views with `sizes` tokens."""
        kept = share(keep_count(sum(sizes), self.keep), sizes)
        merged = [min(max(0, k - 1), math.floor(k * self.contextual + 0.5)) for k in kept]
        return [k - m for k, m in zip(kept, merged)], merged

    def select(self, tokens: VisualTokens) -> Selection:
        x, device = tokens.features, tokens.features.device
        views = Views.of(tokens.layout, device)
        dominant, contextual = self.counts(views.sizes)
        with torch.no_grad():
            score = views.patches(tokens.read(IMPORTANCE[self.importance], self.layer)).float().sum(3)  # [B, V, T]
            score = score.nan_to_num(0.0).masked_fill(~views.valid, -math.inf)
            keys = unit(unit(views.patches(tokens.read(self.keys, self.layer))).mean(3))  # [B, V, T, C]
            on_device = lambda numbers: torch.stack([torch.full((), i, device=device) for i in numbers])[:, None]
            top = ranks(score) < on_device(dominant)  # [B, V, T]
            rest = views.valid & ~top
            n_rest = [size - d for size, d in zip(views.sizes, dominant)]
            step = on_device([max(1, n // max(1, m)) for n, m in zip(n_rest, contextual)])  # [V, 1]
            order = rest.cumsum(-1) - 1
            targets = rest & (order % step == 0) & (order // step < on_device(contextual))
            slots = max(contextual)
            if slots == 0:
                return Selection(views.collect(top), n_kept=sum(dominant))
            place, member = assign(keys, targets, rest & ~targets, slots)  # [B, V, S], [B, V, T, S]
        merged = views.spread(x)  # [B, V, T, D]
        wide = place[..., None].expand(-1, -1, -1, x.shape[2])
        own = merged.gather(2, wide).float()  # [B, V, S, D]
        count = member.sum(2)[..., None]  # [B, V, S, 1]
        sums = member.transpose(2, 3) @ merged.float()
        if self.merging == "mean" and not self.official:
            of_own = of_each = 1 / (1 + count)
        else:
            of_own, of_each = torch.ones_like(count), 1 / count.clamp(min=1)
        merged = merged.scatter(2, wide, (own * of_own + sums * of_each).to(x.dtype))
        t = views.valid.shape[1]
        into = torch.where(top | targets, torch.arange(t, device=device), -1)
        gone = member.sum(3) > 0
        into = torch.where(gone, place.gather(2, member.argmax(3)), into)  # [B, V, T] within the view
        token_at = torch.zeros(views.valid.numel(), dtype=torch.long, device=device)
        token_at = token_at.index_copy(0, views.place, torch.arange(x.shape[1], device=device)).view(-1, t)
        weight = torch.ones_like(score).scatter(2, place, of_own.squeeze(3))
        weight = torch.where(gone, (member @ of_each).squeeze(3), weight)
        token = token_at.expand_as(into).gather(2, into.clamp(min=0))
        return Selection(
            views.collect(top | targets),
            n_kept=sum(dominant) + sum(contextual),
            features=views.collect(merged),
            merged_into=views.collect(torch.where(into < 0, into, token)),
            weight=views.collect(weight),
        )


def assign(keys: Tensor, targets: Tensor, others: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Give each of `others` to the target with the most similar key, ties to the earlier.

    keys: [..., T, C] of unit length. targets, others: [..., T] bool. slots: S, at least the largest number of targets.
    Returns place [..., S], the targets in order and behind them other tokens, to which nothing is given, and member
    [..., T, S], 1.0 or 0.0. Where there is no target nothing is given away."""
    place = targets.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :slots]
    there = targets.gather(-1, place)  # [..., S]
    wide = place[..., None].expand(*place.shape, keys.shape[-1])
    similar = keys @ keys.gather(-2, wide).transpose(-2, -1)  # [..., T, S]
    similar = similar.masked_fill(~there[..., None, :], -math.inf)
    best = torch.zeros_like(similar).scatter_(-1, similar.argmax(-1, keepdim=True), 1.0)
    return place, best * (others[..., None] & there[..., None, :])
