"""SCOPE: tokens that cover the others best, weighed by the attention that the encoder pays them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from vtok.kernels.greedy_coverage import greedy_coverage
from vtok.options import EncoderLayer, In
from vtok.stages.pre_llm import PreLLM
from vtok.tower import Layer
from vtok.types import Selection, VisualTokens, keep_count, share
from vtok.views import Views, unit

IMPORTANCE = {"cls": "cls_probs", "received": "encoder_attention"}  # name -> need


@dataclass(frozen=True, kw_only=True)
class Scope(PreLLM):
    """Greedy: each pick is the token whose gain in coverage times its saliency to the power of `alpha` is the largest.
    What is covered of a token is its largest cosine with a pick, at least 0.

    keep: fraction or count, per picture.
    alpha: 0 is coverage alone.
    importance: what saliency is: "cls", the head-mean of the CLS token's attention; "received", for encoders without
        CLS, the head-mean of the attention that a token gets from all others. Of several patches a token (pixel
        shuffle) the sum.
    layer: of the encoder, whose attention counts, and the hidden state that "encoder" compares; None, the one whose
        output the projector reads, is the paper's.
    features: what is compared: "projected", as tokens enter the language model, or "encoder", as they enter the
        projector, the paper's; of several patches a token the mean.
    per_view: True, each view (a thumbnail, a crop, a frame) is covered alone, and gets its share of the count in
        proportion to its tokens; False, all of a picture or clip is one set.
    Differs from the paper: `features`; the official code sums in half precision, where equal sums are common, and
    cosines of zeros are no number; several pictures of a batch each get their own count there divided by how many
    there are; of LLaVA-NeXT's pictures it drops the newlines, may choose padding and renumbers positions (`renumber`),
    where newlines and positions stay here and padding is gone. Its variant that adds saliency to the gain is left out:
    gains are a thousand times as large, so that it is coverage alone.
    """

    name = "scope"
    needs = frozenset({"cls_probs", "encoder_attention", "encoder_states"})
    paper = "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs, arXiv 2510.24214"
    slow = True
    optional = {"cls_probs": {"importance": "received"}}
    hints = {"cls_probs": "For encoders without CLS there is importance='received'."}
    examples = (
        {"keep": 0.4},
        {"keep": 0.4, "importance": "received", "features": "encoder", "per_view": False},
    )

    alpha: Annotated[float, In(">= 0")] = 1.0
    importance: Literal["cls", "received"] = "cls"
    layer: EncoderLayer = None
    features: Literal["projected", "encoder"] = "projected"
    per_view: bool = True

    @property
    def needs_now(self) -> frozenset[str]:
        states = {"encoder_states"} if self.features == "encoder" else set()
        return frozenset({IMPORTANCE[self.importance]} | states)

    @property
    def encoder_layers(self) -> dict[str, tuple[Layer, ...]]:
        return dict.fromkeys(sorted(self.needs_now), (self.layer,))

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Selection:
        views = Views.of(tokens.layout, tokens.features.device)
        total = keep_count(tokens.layout.n, self.keep)
        counts = share(total, views.sizes) if self.per_view else [total]
        saliency = views.patches(tokens.read(IMPORTANCE[self.importance], self.layer)).float().sum(3)  # [B, V, T]
        if self.features == "encoder":
            x = views.patches(tokens.read("encoder_states", self.layer)).float().mean(3)  # [B, V, T, C]
        else:
            x = views.spread(tokens.features)
        x, saliency = unit(x) * views.valid[..., None], saliency.nan_to_num(0.0).clamp(min=0)
        valid = views.valid.expand(len(x), -1, -1)
        sets = (len(x) * len(counts), -1)  # each is covered alone
        picks = salient_cover(
            x.reshape(*sets, x.shape[3]), saliency.reshape(sets), valid.reshape(sets), self.alpha, max(counts)
        )
        device = x.device
        mine = torch.stack([torch.full((), count, device=device) for count in counts])[:, None]  # [V, 1]
        kept = (torch.arange(picks.shape[1], device=device) < mine).repeat(len(x), 1)
        keep = torch.zeros(valid.reshape(sets).shape, dtype=torch.bool, device=device).scatter_(1, picks, kept)
        return Selection(views.collect(keep.view(valid.shape)), n_kept=total)


def salient_cover(x: Tensor, saliency: Tensor, valid: Tensor, alpha: float, k: int) -> Tensor:
    """[S, k] the first picks of each set, in order. x: [S, T, C] of length 1 or 0. saliency: [S, T] >= 0. valid: [S, T]
    bool, the tokens that there are."""
    with torch.autocast(x.device.type, enabled=False):
        return greedy_coverage(x @ x.mT, k, saliency**alpha, valid)
