"""GlobalCom2: the thumbnail says how much of each crop to keep, and helps to say what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.errors import Unsupported
from vtok.options import In, Positive
from vtok.stages.pre_llm import PreLLM
from vtok.types import Layout, Plane, Selection, VisualTokens, keep_count, ranks, share


@dataclass(frozen=True, kw_only=True)
class GlobalCom2(PreLLM):
    """Each crop keeps a share that grows with its part of the thumbnail's attention, and in it the tokens
    that score best locally and globally (Sections 3.2 and 3.3).

    keep: R of the paper, the fraction of the thumbnail's and of the crops' tokens; or a count per picture,
        split over both in proportion to their sizes. A picture of one view (an InternVL picture of one tile, a banner
        whose crops are padding alone) is compressed as a thumbnail is: its tokens that score best.
    tau: temperature of the shares over crops; works from 5 to 20 with logits.
    alpha: weight of the thumbnail's score against the crop's own, in [0, 1].
    score_source: "cls_logits", the encoder's CLS attention before softmax, as the official code takes it;
        "cls_probs", after softmax, with which shares are all but equal; "neg_cos_mean", for encoders without
        CLS: how little a token looks like the mean of its view.
    allocation: "softmax_sum", shares by the thumbnail's attention; "uniform", `keep` of every crop.
    exact_count: the crops keep floor(R * tokens) together, by largest remainder, so that the grid alone fixes
        the count (ours); False rounds each crop down, as the official code does: the content has a say in it.
    budget_map: which thumbnail patches speak for a crop. "centred": those whose centre lies in it, scaled as
        if all crops had equally many (ours); "official": equal parts of the thumbnail, wrong where padding
        cuts the outer crops. The same where nothing is padded and the grid divides the thumbnail.
    renumber: kept tokens get consecutive positions, as in the official code, instead of their own.
    Differs from the paper: kept tokens stay in raster order, the thumbnail's too; crops keep an exact total, and their
    shares allow for padding (`exact_count`, `budget_map`), so that few pictures keep exactly the official set; the
    official code leaves a picture of one view whole, of which the paper says nothing. Three faults of the official code
    cannot occur, as the sequence holds no padding and keeps all separators: tokens that slide into padding, newlines
    for rows of padding, and scores that come from another picture of the batch.
    """

    name = "globalcom2"
    needs = frozenset({"crops", "cls_attention"})
    paper = "Global Compression Commander, arXiv 2501.05179"
    examples = ({"keep": 0.3}, {"keep": 0.3, "score_source": "neg_cos_mean"})

    optional = {"cls_attention": {"score_source": "neg_cos_mean"}}
    hints = {"cls_attention": "For encoders without CLS there is score_source='neg_cos_mean'."}

    tau: Positive = 10.0
    alpha: Annotated[float, In("[0, 1]")] = 0.5
    score_source: Literal["cls_logits", "cls_probs", "neg_cos_mean"] = "cls_logits"
    allocation: Literal["softmax_sum", "uniform"] = "softmax_sum"
    exact_count: bool = True
    budget_map: Literal["centred", "official"] = "centred"

    @property
    def adaptive_now(self) -> bool:
        return not self.exact_count and not self.is_identity

    @property
    def needs_now(self) -> frozenset[str]:
        return self.needs if self.score_source.startswith("cls") else self.needs - {"cls_attention"}

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Selection:
        layout, (b, n, _), device = tokens.layout, tokens.features.shape, tokens.features.device
        if layout.modality == "video":
            raise Unsupported("globalcom2 compresses pictures; a video has no thumbnail and crops.")
        kinds = [plane.kind for plane in layout.planes]
        if sum(plane.size > 0 for plane in layout.planes) == 1:
            (view,) = (plane for plane in layout.planes if plane.size)
            score, broken = self._scores(tokens, view, None, kinds[0] == "crops")
            kept = keep_count(n, self.keep)
            return Selection(ranks(score.masked_fill(broken, -math.inf)) < kept, n_kept=kept)
        if sorted(kinds) != ["crops", "thumbnail"]:
            raise Unsupported(f"globalcom2 needs a thumbnail and its crops, got {', '.join(kinds)}.")
        thumbnail, crops = sorted(layout.planes, key=lambda plane: plane.kind, reverse=True)
        behind = kinds[0] == "crops"  # the thumbnail is; below it comes first

        if isinstance(self.keep, int):
            k_thumb, k_crops = share(keep_count(n, self.keep), [thumbnail.size, crops.size])
            ratio = k_crops / crops.size
        else:
            k_thumb, k_crops = keep_count(thumbnail.size, self.keep), keep_count(crops.size, self.keep)
            ratio = self.keep

        crop_of, sizes = crop_index(crops, device), crop_sizes(crops, device)  # [n], [C] without padding
        score, broken = self._scores(tokens, thumbnail, crops, behind)  # [B, N], [B, N]
        parts = [thumbnail.size, crops.size]
        (thumb, local), (broken_thumb, broken_local) = score.split(parts, 1), broken.split(parts, 1)
        if self.allocation == "uniform":
            ratios = torch.full_like(score[:, :1], ratio).expand(b, len(sizes))
        else:
            membership = speaks_for(thumbnail, crops, self.budget_map, device)
            ratios = crop_ratios(thumb, membership, sizes, ratio, self.tau, even=self.budget_map == "centred")
        wanted = ratios * sizes  # [B, C]
        counts = allocate(wanted, sizes, k_crops) if self.exact_count else (wanted + 1e-9).long()

        large = global_map(thumb.view(b, thumbnail.rows, thumbnail.cols), crops)  # [B, n]
        joint = token_scores(local, large, crop_of, len(sizes), self.alpha)
        in_thumb = ranks(thumb.masked_fill(broken_thumb, -math.inf)) < k_thumb
        in_crops = ranks(joint.masked_fill(broken_local, -math.inf), crop_of, sizes) < counts[:, crop_of]
        keep = torch.cat([in_crops, in_thumb] if behind else [in_thumb, in_crops], 1)
        return Selection(keep, n_kept=k_thumb + k_crops if self.exact_count else None)

    def count(self, layout: Layout) -> int | None:
        if self.adaptive_now:
            return None
        views = [plane for plane in layout.planes if plane.size]
        if isinstance(self.keep, int):
            return keep_count(layout.n, self.keep)
        return sum(keep_count(plane.size, self.keep) for plane in views)

    def _scores(
        self, tokens: VisualTokens, thumbnail: Plane, crops: Plane | None, behind: bool
    ) -> tuple[Tensor, Tensor]:
        """[B, N] finite score of each token within its own view, the thumbnail's first, and [B, N] bool, where it was
        not finite. `crops` is None where they have no tokens; `behind` says where the thumbnail's view is."""
        if self.score_source == "neg_cos_mean":
            features = tokens.features.roll(thumbnail.size, 1) if behind else tokens.features
            similar = cos_to_mean(features[:, : thumbnail.size])
            if crops is not None:
                mosaic = features[:, thumbnail.size :].unflatten(1, (crops.rows, crops.cols))  # [B, rows, cols, D]
                similar = torch.cat([similar, cos_to_view_mean(mosaic, crops).flatten(1)], 1)
            broken = ~similar.isfinite()
            return -_wide(similar).masked_fill(broken, 1.0), broken
        a = tokens.cls_attention
        if a is None:
            raise Unsupported("globalcom2 got no cls_attention. " + self.hints["cls_attention"])
        views = sum(plane.views for plane in tokens.layout.planes)
        patches = a.shape[2] // thumbnail.size  # of a token: 4 behind a 2x2 pixel shuffle
        alike = all(math.prod(plane.view_shape) == thumbnail.size for plane in tokens.layout.planes)
        if a.shape[1:] != (views, patches * thumbnail.size) or not alike:
            raise Unsupported(
                f"globalcom2 expected the CLS attention of {views} views over the patches of {thumbnail.size} tokens "
                f"each, got {tuple(a.shape[1:])}."
            )
        a = _wide(a.to(tokens.features.device))  # [B, V, P]; the encoder may be on another device
        a = a.unflatten(2, (thumbnail.size, patches)).mean(3)  # a token's logit is the mean of its patches'
        a = a.roll(1, 1) if behind else a
        broken = ~a.isfinite()
        lowest = a.masked_fill(broken, math.inf).amin(-1, keepdim=True)  # [B, V, 1]
        a = torch.where(broken, lowest.nan_to_num(posinf=0.0), a)
        if self.score_source == "cls_probs":
            a = a.softmax(-1)
        place = torch.arange(thumbnail.size, device=a.device)  # [P]
        if crops is not None:
            place = torch.cat([place, thumbnail.size + mosaic_index(crops, a.device)])  # [N] among the V * P
        return a.flatten(1).index_select(1, place), broken.flatten(1).index_select(1, place)


def _wide(x: Tensor) -> Tensor:
    """In fp64, in which sums of hundreds of logits keep their digits; Apple's GPUs have none."""
    return x.float() if x.device.type == "mps" else x.double()


# The index maps are made on the device: a copy from the host would wait for it.
def crop_index(crops: Plane, device: torch.device | None = None) -> Tensor:
    """[n] the crop, row-major, in which each token of the crops' plane lies."""
    y = crops.mosaic_rows(device) // crops.crop_shape[0]
    x = crops.mosaic_cols(device) // crops.crop_shape[1]
    return (y[:, None] * crops.crop_grid[1] + x).flatten()


def mosaic_index(crops: Plane, device: torch.device | None = None) -> Tensor:
    """[n] where each token of the crops' plane is in the crops put one after the other, padding included."""
    rows, cols = crops.crop_shape
    inside = (crops.mosaic_rows(device) % rows)[:, None] * cols + crops.mosaic_cols(device) % cols
    return crop_index(crops, device) * rows * cols + inside.flatten()


def crop_sizes(crops: Plane, device: torch.device | None = None) -> Tensor:
    """[C] how many tokens each crop has without padding."""

    def axis(places: Tensor, shape: int, grid: int) -> Tensor:
        return torch.searchsorted(places, torch.arange(grid + 1, device=device) * shape).diff()

    high = axis(crops.mosaic_rows(device), crops.crop_shape[0], crops.crop_grid[0])
    wide = axis(crops.mosaic_cols(device), crops.crop_shape[1], crops.crop_grid[1])
    return (high[:, None] * wide).flatten()


def speaks_for(thumbnail: Plane, crops: Plane, budget_map: str, device: torch.device | None = None) -> Tensor:
    """[S*S] the crop whose share each thumbnail patch raises. The thumbnail has no padding."""

    def axis(side: int, valid: int, offset: int, shape: int, grid: int) -> Tensor:
        at = torch.arange(side, device=device)
        if budget_map == "official":
            return (at // max(side // grid, 1)).clamp(max=grid - 1)
        # the centre, (at + 0.5) * valid / side + offset patches from the mosaic's edge, in whole numbers
        return ((2 * at + 1) * valid + 2 * side * offset) // (2 * side * shape)

    (rows, cols), (top, left), (high, wide) = crops.crop_grid, crops.offset, crops.crop_shape
    y = axis(thumbnail.rows, crops.span[0], top, high, rows)
    x = axis(thumbnail.cols, crops.span[1], left, wide, cols)
    return (y[:, None] * cols + x).flatten()


def crop_ratios(score: Tensor, membership: Tensor, sizes: Tensor, keep: float, tau: float, even: bool = True) -> Tensor:
    """What each crop keeps of its tokens: keep * (1 + p - 1/C), p = softmax(thumbnail / tau), at most 1.

    score: [B, S*S] of the thumbnail's patches. membership: [S*S] the crop that each speaks for. sizes: [C].
    even: a crop's thumbnail score is the mean of its patches times S*S/C: their sum, where all crops have
        equally many. Logits mean something up to a constant only, and sums (False, official) over unequal
        numbers of patches compare that constant. Crops of padding alone then take no part.
    [B, C]. Sums to C * keep before the clip, where no crop is padding alone.
    """
    score = _wide(score)
    total = group_sums(score, membership, len(sizes))  # [B, C]
    present, n_present = torch.ones_like(sizes, dtype=torch.bool), len(sizes)
    if even:
        present = sizes > 0
        n_present = present.to(score).sum()  # C, but for crops of padding alone
        patches = group_sums(torch.ones_like(score[:1]), membership, len(sizes))  # [1, C]
        mean = torch.where(patches > 0, total / patches, score.mean(1, keepdim=True))
        total = mean * (score.shape[1] / n_present)
    p = (total / tau).masked_fill(~present, -math.inf).softmax(-1)
    return (keep * (1 + p - 1 / n_present)).clamp(max=1.0).masked_fill(~present, 0.0)


def allocate(wanted: Tensor, sizes: Tensor, total: int) -> Tensor:
    """[B, C] whole counts in proportion to `wanted` [B, C] that sum to `total` and exceed no `sizes` [C].

    What the sizes cut off goes to the crops that have room, in proportion too. Rounded by largest remainder,
    ties to the lower index. `total` is at most the sum of the sizes."""
    size = sizes.to(wanted)  # [C]
    weight = torch.where(size > 0, wanted.clamp(min=1e-9), 0.0)  # [B, C]
    # The sum of min(scale * weight, size) is concave in the scale: the least of C lines, one for each number
    # of full crops. So the scale at which it reaches `total` is the largest of those at which the lines do.
    order = torch.where(size > 0, size / weight, 0.0).argsort(dim=1, stable=True)  # as they fill up
    full = size[order].cumsum(1) - size[order]  # [B, C] tokens of those before, which are full
    slope = weight.gather(1, order).flip(1).cumsum(1).flip(1)  # [B, C]
    scale = ((total - full) / slope).amax(1, keepdim=True)  # [B, 1]
    quota = torch.minimum(scale * weight, size)
    counts = (quota + 1e-9).floor()
    remainder = ((quota - counts) * 1e9).round()  # equal in spite of rounding errors
    remainder = remainder.masked_fill(counts >= size, -math.inf)
    return (counts + (ranks(remainder) < total - counts.sum(1, keepdim=True))).long()


def global_map(score: Tensor, crops: Plane) -> Tensor:
    """[B, S, S] scores of the thumbnail, bilinearly at the places of the crops' plane, [B, n]."""
    size = (crops.rows, crops.cols)
    return F.interpolate(score[:, None], size=size, mode="bilinear", align_corners=False).flatten(1)


def token_scores(local: Tensor, large: Tensor, crop_of: Tensor, n_crops: int, alpha: float) -> Tensor:
    """[B, n] alpha * global + (1 - alpha) * local score, each of unit L2 norm within its crop."""

    def unit(s: Tensor) -> Tensor:
        return s / group_sums(s.square(), crop_of, n_crops).sqrt().clamp(min=1e-12)[:, crop_of]

    return alpha * unit(large) + (1 - alpha) * unit(local)


def cos_to_mean(x: Tensor) -> Tensor:
    """[B, n] cosine of each token of `x` [B, n, D] and their mean, fp32; NaN where a token is not finite."""
    x = x.float()
    norm = x.norm(dim=-1)  # [B, n]
    finite = norm.isfinite()[..., None]
    mean = x.where(finite, 0.0).sum(1, keepdim=True)  # [B, 1, D], as only the direction counts
    return (x * mean).sum(-1) / (norm * mean.norm(dim=-1)).clamp(min=1e-12)


def cos_to_view_mean(x: Tensor, crops: Plane) -> Tensor:
    """`cos_to_mean` within each crop of the crops' plane `x` [B, rows, cols, D]. [B, rows, cols].

    Loops over the crops: sums by index would come out in another order, and so differ, each time on a GPU."""
    out = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    of_rows, of_cols = crops.crop_slices
    for rows in of_rows:
        for cols in of_cols:
            crop = x[:, rows, cols]
            out[:, rows, cols] = cos_to_mean(crop.flatten(1, 2)).unflatten(1, crop.shape[1:3])
    return out


def group_sums(values: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """[B, G] sums of `values` [B, n] over the members of each `group` [n], the same in each run."""
    return values @ (group[:, None] == torch.arange(n_groups, device=group.device)).to(values)
