"""Token-level correlation-guided compression: each crop keeps as many tokens as it holds information."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from vtok.errors import InvalidValue
from vtok.kernels.redundancy_counts import redundancy_counts
from vtok.options import AtLeast0, AtLeast1, EncoderLayer, In, Keep, check
from vtok.stages.pre_llm import PreLLM
from vtok.tower import Layer
from vtok.types import Layout, Plane, Selection, VisualTokens, keep_count, ranks
from vtok.views import Views, unit

IMPORTANCE = {"cls": "cls_probs", "received": "encoder_attention"}  # name -> need
BLOCK = 1 << 24  # similarities held at once


@dataclass(frozen=True, kw_only=True)
class TCC(PreLLM):
    """A thumbnail stays whole. Of every other view (crop, frame, only picture): the less its patches repeat each other,
    the more tokens are drawn by the attention of a low layer; those that stand out in a deep layer's attention join
    them; the rest is folded into its neighbours among the kept ones. The paper's text is not at hand, only its figure
    and accounts of it: what these leave open is marked (ours).

    keep: None, the paper: the content alone decides. A fraction or a count bounds it (ours): at most that much of the
        picture enters. The crops give way first, in proportion to what they wanted, down to their proportional part of
        the bound, then the thumbnail; outliers stay longest, then the tokens that were drawn first.
    sim_threshold: alpha, the cosine of two patches' keys above which one repeats the other, in [-1, 1] (ours; see
        `calibrate`).
    count_threshold: beta; a patch that more than this many others repeat is redundant. A float is a fraction of the
        view's patches (ours).
    low_layer, deep_layer: of the encoder; the third of 24 layers, and the one whose
        output the projector reads (ours).
    importance: "cls", the head-mean of the CLS token's attention over the patches; "received", for encoders without
        CLS, a pseudo-CLS: the column means of the attention matrix (ours).
    sample: "multinomial", drawn without replacement with that probability; "topk", the most probable.
    seed: of the draw. Each view draws by a seed of its own, made of this and its number, so that neither the batch nor
        another view changes it.
    iqr_factor, iqr_eps: what stands out is above Q3 + max(iqr_factor * (Q3 - Q1), iqr_eps * the view's mean), so that
        the rounding errors of even attention do not (ours).
    merge, k: "weighted": a kept token becomes the mean of its `k` most similar tokens by key, itself among them,
        weighted by the deep layer's attention (ours); "none": it stays as it is.
    min_tokens: that each view draws at least, if it has so many (ours).
    Where several patches make a token (pixel shuffle, 2x2 merger) their probabilities are added, a token stands out
    where one of its patches does, and the number drawn is that share of the tokens, rounded up. Padding takes no part.
    Differs from the paper: features are gathered and merged behind the projector instead of before it; beyond what is
    marked above nothing can be said, as no code was released.
    """

    name = "tcc"
    needs = frozenset({"encoder_keys", "cls_probs"})
    paper = "Token-level Correlation-guided Compression (TCC), arXiv 2407.14439"
    optional = {"cls_probs": {"importance": "received"}}
    hints = {"cls_probs": "For encoders without CLS there is importance='received'."}
    adaptive = True
    merges = True
    examples = (
        {"keep": 0.5, "sim_threshold": 0.5, "low_layer": 0},
        {"keep": 0.5, "sim_threshold": 0.5, "low_layer": 0, "importance": "received"},
        {"keep": 0.5, "sim_threshold": 0.5, "low_layer": 0, "importance": "received", "merge": "none"},
    )

    keep: Keep | None = None
    sim_threshold: Annotated[float, In("[-1, 1]")] = 0.9
    count_threshold: Annotated[float, In("[0, 1]", ints=False), "a fraction of the patches"] | AtLeast0 = 0.05
    low_layer: EncoderLayer = 2 / 23
    deep_layer: EncoderLayer = None
    importance: Literal["cls", "received"] = "cls"
    sample: Literal["multinomial", "topk"] = "multinomial"
    seed: AtLeast0 = 0
    iqr_factor: Annotated[float, In(">= 0")] = 1.5
    iqr_eps: Annotated[float, In(">= 0")] = 1e-3
    merge: Literal["weighted", "none"] = "weighted"
    k: AtLeast1 = 32
    min_tokens: AtLeast0 = 1

    @property
    def needs_now(self) -> frozenset[str]:
        return frozenset({IMPORTANCE[self.importance], "encoder_keys"})

    @property
    def replays(self) -> bool:
        return self.merge == "none"  # a token is in the means of several

    @property
    def encoder_layers(self) -> dict[str, tuple[Layer, ...]]:
        both = tuple(dict.fromkeys((self.low_layer, self.deep_layer)))
        return {"encoder_keys": (self.low_layer,), IMPORTANCE[self.importance]: both}

    def with_budget(self, budget: float, n_layers: int) -> TCC:
        """The same thresholds, and the budget as the bound `keep`: never above it, below it where the content is poor.
        `calibrate` moves the threshold instead."""
        return replace(self, keep=float(budget))

    def select(self, tokens: VisualTokens) -> Selection:
        views = Views.of(tokens.layout, tokens.features.device)
        with torch.no_grad():
            kept = self.choose(tokens, views)  # [B, V, T]
        if self.merge == "none":
            return Selection(views.collect(kept))
        keys = unit(views.patches(tokens.read("encoder_keys", self.low_layer))).mean(3)
        weight = self._attention(tokens, views, self.deep_layer).sum(3)
        x = views.spread(tokens.features)
        merged, into = fold(x, unit(keys), weight, views.valid, kept, self.k)
        whole = whole_views(tokens.layout, views)[:, None]  # [V, 1]
        t = views.valid.shape[1]
        into = torch.where(whole, torch.where(kept, torch.arange(t, device=into.device), -1), into)
        token = torch.zeros(views.valid.numel(), dtype=torch.long, device=into.device)
        token = token.index_copy(0, views.place, torch.arange(len(views.place), device=into.device)).view(-1, t)
        token = token.expand_as(into).gather(2, into.clamp(min=0))
        return Selection(
            views.collect(kept),
            features=views.collect(torch.where(whole[..., None], x, merged.to(x.dtype))),
            merged_into=views.collect(torch.where(into < 0, into, token)),
        )

    def choose(self, tokens: VisualTokens, views: Views) -> Tensor:
        """[B, V, T] bool, the kept tokens of each view."""
        keys = views.patches(tokens.read("encoder_keys", self.low_layer))  # [B, V, T, G, C]
        low = self._attention(tokens, views, self.low_layer)  # [B, V, T, G]
        deep = self._attention(tokens, views, self.deep_layer)
        valid, group = views.valid, low.shape[3]
        patches = valid[..., None].expand(-1, -1, group).flatten(1)  # [V, T * G]
        n_patches, n_tokens = patches.sum(-1), valid.sum(-1)  # [V]

        repeats = near_duplicates(keys.flatten(2, 3), patches, self.sim_threshold)  # [B, V, T * G]
        beta = self.count_threshold
        if isinstance(beta, float):
            beta = (beta * n_patches + 0.5).floor()[:, None]
        redundant = ((repeats > beta) & patches).sum(-1)  # [B, V]
        wanted = ((n_patches - redundant) * n_tokens + n_patches - 1) // n_patches.clamp(min=1)  # rounded up
        wanted = torch.maximum(wanted, n_tokens.clamp(max=self.min_tokens))

        probability = low.sum(3)  # [B, V, T]
        drawn = probability
        if self.sample == "multinomial":
            noise = gumbel(*valid.shape, self.seed, low.device)
            drawn = probability.clamp(min=torch.finfo(torch.float32).tiny).log() + noise
        rank = ranks(drawn.masked_fill(~valid, -math.inf))
        local = rank < wanted[..., None]
        outlying = outliers(deep.flatten(2), patches, self.iqr_factor, self.iqr_eps).unflatten(-1, (-1, group)).any(-1)
        kept = (local | outlying | whole_views(tokens.layout, views)[:, None]) & valid
        if self.keep is None:
            return kept
        first = torch.where(outlying, 2 + deep.sum(3), 1 - rank / rank.shape[-1])  # attention adds up to 1
        counts = self._bounded(kept.sum(-1), tokens.layout, views)  # [B, V]
        return kept & (ranks(first.masked_fill(~kept, -math.inf)) < counts[..., None])

    def _attention(self, tokens: VisualTokens, views: Views, layer: Layer) -> Tensor:
        """[B, V, T, G] fp32 attention to each patch, zero on padding, 1 in all."""
        a = views.patches(tokens.read(IMPORTANCE[self.importance], layer)).float()
        a = a.nan_to_num(0.0, 0.0, 0.0) * views.valid[..., None]
        return a / a.sum((2, 3), keepdim=True).clamp(min=1e-12)

    def _bounded(self, counts: Tensor, layout: Layout, views: Views) -> Tensor:
        """[B, V] what `keep` leaves of `counts`."""
        n = sum(views.sizes)
        limit = keep_count(n, self.keep)
        whole = whole_views(layout, views)  # [V]
        thumbnails = sum(plane.size for plane in layout.planes if _stays_whole(plane, layout))
        of_crops = max(limit - thumbnails, limit * (n - thumbnails) // n)
        crops = cut(counts.masked_fill(whole, 0), torch.full_like(counts[:, :1], of_crops))
        left = limit - crops.sum(1, keepdim=True)
        return crops + cut(counts.masked_fill(~whole, 0), left)


def _stays_whole(plane: Plane, layout: Layout) -> bool:
    return plane.kind == "thumbnail" and any(other.kind != "thumbnail" for other in layout.planes)


def whole_views(layout: Layout, views: Views) -> Tensor:
    """[V] bool, the views that stay whole: a thumbnail, if there is more of the picture."""
    flags = [_stays_whole(plane, layout) for plane in layout.planes for _ in range(plane.views)]
    return torch.stack([torch.full((), flag, device=views.place.device) for flag in flags])


def near_duplicates(keys: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """[..., P] long: how many other valid patches have a key whose cosine with each valid patch's is above `threshold`.

    keys: [..., P, C]. valid: [P] bool, or of more of their dimensions; the count of others is 0."""
    shape = keys.shape[:-1]
    rows = keys.reshape(-1, *keys.shape[-2:]), valid.expand(shape).reshape(-1, shape[-1])
    return redundancy_counts(*rows, threshold).view(shape)


def outliers(a: Tensor, valid: Tensor, factor: float, eps: float) -> Tensor:
    """[..., P] bool: a > Q3 + max(factor * (Q3 - Q1), eps * mean), of the valid entries; a [..., P] >= 0."""
    a = a.float().masked_fill(~valid, math.nan)
    low, high = a.nanquantile(a.new_tensor([0.25, 0.75]), dim=-1, keepdim=True)
    margin = torch.maximum(factor * (high - low), eps * a.nanmean(-1, keepdim=True))
    return a > high + margin  # NaN is not


def gumbel(views: int, tokens: int, seed: int, device: torch.device | None = None) -> Tensor:
    """[V, T] standard Gumbel noise. The largest of log p + noise are a draw from p without replacement.

    Made on the CPU, so that every device draws the same, each view by a generator of its own."""
    rows = []
    for view in range(views):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + view)
        rows.append(-torch.empty(tokens).exponential_(generator=generator).log())
    return torch.stack(rows).to(device)


def cut(counts: Tensor, total: Tensor) -> Tensor:
    """[B, V] `counts`, where they are more brought down in proportion to `total` [B, 1], by largest remainder, ties to
    the lower index."""
    whole = counts.sum(1, keepdim=True)
    share, rest = counts * total // whole.clamp(min=1), counts * total % whole.clamp(min=1)
    share = share + (ranks(rest) < total - share.sum(1, keepdim=True))
    return torch.where(whole <= total, counts, share)


def fold(x: Tensor, keys: Tensor, weight: Tensor, valid: Tensor, kept: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weighted means of each token's `k` most similar tokens, itself among them.

    x: [..., T, D]. keys: [..., T, C], of unit length. weight: [..., T] >= 0. valid: [..., T] bool, no others take part.
    kept: [..., T] bool. Similarity ties go to the lower index. Returns the means [..., T, D] in fp32, through which
    gradient flows to `x`, and into [..., T] long: a kept token itself; of another the kept token that it is most
    similar to among those in whose mean it is, or -1. Rows are taken in blocks."""
    t = x.shape[-2]
    step = max(1, BLOCK // max(1, keys[..., 0].numel()))
    places = torch.arange(t, device=x.device)
    valid = valid.expand(keys.shape[:-1])
    weight = weight.clamp(min=1e-12)  # tokens without any attention have equal parts
    values = x.float()
    means, best, into = [], torch.full_like(weight, -math.inf), torch.full_like(places, -1).expand(valid.shape)
    for start in range(0, t, step):
        row = places[start : start + step, None]
        with torch.no_grad():
            similar = keys[..., start : start + step, :] @ keys.transpose(-2, -1)  # [..., r, T]
            similar = similar.masked_fill(~valid[..., None, :], -math.inf).masked_fill(row == places, math.inf)
            order = similar.argsort(dim=-1, descending=True, stable=True)[..., :k]
            member = torch.zeros_like(similar, dtype=torch.bool).scatter_(-1, order, True)
            member &= valid[..., None, :] | (row == places)
            part = weight[..., None, :] * member
            part = part / part.sum(-1, keepdim=True)
            serves = member & kept[..., start : start + step, None]
            value, at = similar.masked_fill(~serves, -math.inf).max(-2)  # [..., T]
            into = torch.where(value > best, at + start, into)
            best = torch.maximum(value, best)
        means.append(part @ values)
    return torch.cat(means, -2), torch.where(kept, places, into)


@dataclass(frozen=True, kw_only=True)
class _Listener(TCC):
    """Keeps every token, and notes what `TCC` would see of it."""

    seen: list[VisualTokens] = field(default_factory=list)

    def select(self, tokens: VisualTokens) -> Selection:
        b, n, _ = tokens.features.shape
        self.seen.append(replace(tokens, features=tokens.features.new_empty(b, n, 0)))
        return Selection(torch.ones(b, n, dtype=torch.bool, device=tokens.features.device), n_kept=n)


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    keep: float,
    compressor: TCC | None = None,
    steps: int = 24,
) -> TCC:
    """The compressor with the largest `sim_threshold` at which, of the visual tokens of given pictures, at most `keep`
    enter the language model, in (0, 1). All else stays as it is.

    model: unpatched. batches: its inputs, such as the processor makes, on its device; each is run once.
    compressor: what to start from, the default one if left out. steps: of the bisection; the larger the threshold, the
    more tokens stay. Raises `InvalidValue` if no threshold brings so few, and says how few can be had.
    """
    import vtok

    check(Annotated[float, In("(0, 1)", ints=False), "a fraction"], keep, "keep")
    compressor = TCC() if compressor is None else compressor
    options = {f.name: getattr(compressor, f.name) for f in fields(compressor) if f.init}
    listener = _Listener(**{**options, "keep": None})
    with torch.no_grad(), vtok.patch(model, listener):
        for inputs in batches:
            model(**inputs)
    if not listener.seen:
        raise InvalidValue("There is no picture in these batches.")

    @torch.no_grad()
    def share(threshold: float) -> float:
        kept = whole = 0
        for tokens in listener.seen:
            views = Views.of(tokens.layout, tokens.features.device)
            chosen = replace(compressor, sim_threshold=threshold).choose(tokens, views)
            kept, whole = kept + int(chosen.sum()), whole + len(chosen) * tokens.layout.n
        return kept / whole

    low, high = -1.0, 1.0
    if (least := share(low)) > keep:
        raise InvalidValue(
            f"These pictures keep at least {least:.3f} of their tokens at any sim_threshold: thumbnails, min_tokens, "
            f"outliers. Raise keep, or bound the pictures with TCC(keep={keep})."
        )
    if share(high) <= keep:
        return replace(compressor, sim_threshold=high)
    for _ in range(steps):
        middle = (low + high) / 2
        if share(middle) <= keep:
            low = middle
        else:
            high = middle
    return replace(compressor, sim_threshold=low)
