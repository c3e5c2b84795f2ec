"""GlobalCom2: the thumbnail says how much of each crop to keep, and helps to say what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.compressor import Compressor
from vtok.errors import InvalidValue
from vtok.selection import Plane, Selection, VisualTokens, keep_count, share

SOURCES = ("cls_logits", "cls_probs", "neg_cos_mean")


@dataclass(frozen=True, kw_only=True)
class GlobalCom2(Compressor):
    """Each crop keeps a share that grows with its part of the thumbnail's attention, and in it the tokens that score
    best locally and globally (Sections 3.2 and 3.3).

    keep: R of the paper, the fraction of the thumbnail's and the crops' tokens; or a count per picture over both.
    tau: temperature of the shares over crops; works from 5 to 20 with logits.
    alpha: weight of the thumbnail's score against the crop's own, in [0, 1].
    score_source: "cls_logits", the encoder's CLS attention before softmax, as the official code takes it; "cls_probs"
        after softmax, with which shares are all but equal; "neg_cos_mean", for encoders without CLS: how little a token
        looks like the mean of its view.
    exact_count: the crops keep floor(R * tokens) together, by largest remainder, so that the count is fixed by the
        grid; False rounds each crop down, as the official code does, and loses up to a token a crop.
    budget_map: which thumbnail patches speak for a crop. "centred": those whose centre lies in it; "official": equal
        parts of the thumbnail, which is wrong where padding cuts the outer crops.
    renumber: kept tokens get consecutive positions, as in the official code, instead of their own.
    Differs from the paper: kept tokens stay in raster order, the thumbnail's too; rows of padding have no newline, and
    kept tokens their true place and, in batches, their own picture's scores, where the official code errs.
    """

    name = "globalcom2"
    stage = "pre_llm"
    needs = frozenset({"crops", "cls_attention"})
    paper = "Global Compression Commander, arXiv 2501.05179"

    hints = {"cls_attention": "For encoders without CLS there is score_source='neg_cos_mean'."}

    tau: float = 10.0
    alpha: float = 0.5
    score_source: str = "cls_logits"
    exact_count: bool = True
    budget_map: str = "centred"
    renumber: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0:
            raise InvalidValue(f"tau must be > 0, got {self.tau!r}")
        if not 0 <= self.alpha <= 1:
            raise InvalidValue(f"alpha must be in [0, 1], got {self.alpha!r}")
        if self.score_source not in SOURCES:
            raise InvalidValue(f"score_source must be one of {SOURCES}, got {self.score_source!r}")
        if self.budget_map not in ("centred", "official"):
            raise InvalidValue(f"budget_map must be 'centred' or 'official', got {self.budget_map!r}")

    @property
    def needs_now(self) -> frozenset[str]:
        return self.needs if self.score_source.startswith("cls") else self.needs - {"cls_attention"}

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Selection:
        thumbnail, crops = tokens.layout.planes
        b, device = tokens.features.shape[0], tokens.features.device
        n_crops = crops.crop_grid[0] * crops.crop_grid[1]
        crop_of = crop_index(crops)  # [n] crop of each crop token
        sizes = torch.bincount(crop_of, minlength=n_crops).to(device)  # [n_crops], without padding
        crop_of = crop_of.to(device)
        thumb_score, crop_score = self._scores(tokens, thumbnail, crops, crop_of)  # [B, S*S], [B, n]
        if isinstance(self.keep, int):
            k_thumb, k_crops = share(keep_count(tokens.layout.n, self.keep), [thumbnail.size, crops.size])
            ratio = k_crops / crops.size
        else:
            k_thumb, ratio = keep_count(thumbnail.size, self.keep), self.keep
            k_crops = keep_count(crops.size, self.keep)

        membership = speaks_for(thumbnail, crops, self.budget_map).to(device)
        ratios = crop_ratios(thumb_score, membership, n_crops, ratio, self.tau)  # [B, n_crops]
        if self.exact_count:
            counts = allocate(ratios * sizes, sizes, k_crops)
        else:
            counts = (ratios * sizes + 1e-9).long()

        large = global_map(thumb_score.view(b, thumbnail.rows, thumbnail.cols), crops)  # [B, n]
        norm = lambda s: s / crop_norms(s, crop_of, n_crops).clamp(min=1e-12)[:, crop_of]
        score = self.alpha * norm(large) + (1 - self.alpha) * norm(crop_score)
        keep = torch.cat([ranks(thumb_score) < k_thumb, ranks(score, crop_of, sizes) < counts[:, crop_of]], 1)
        return Selection(keep, n_kept=k_thumb + k_crops if self.exact_count else None)

    def _scores(
        self, tokens: VisualTokens, thumbnail: Plane, crops: Plane, crop_of: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of the thumbnail's tokens and of the crops' tokens, each within its own view. fp32."""
        if self.score_source == "neg_cos_mean":
            x = tokens.features.float()  # [B, N, D]
            view = torch.cat([torch.zeros(thumbnail.size, dtype=torch.long, device=crop_of.device), 1 + crop_of])
            n_views = 1 + crops.crop_grid[0] * crops.crop_grid[1]
            mean = x.new_zeros(x.shape[0], n_views, x.shape[2]).index_add(1, view, x)  # its direction is what counts
            score = -F.cosine_similarity(x, mean[:, view], dim=-1)
        else:
            a = tokens.cls_attention.float()  # [B, V, P]
            if self.score_source == "cls_probs":
                a = a.softmax(-1)
            score = torch.cat([a[:, 0], a[:, 1:].flatten(1)[:, mosaic_index(crops).to(a.device)]], 1)
        lowest = torch.where(score.isfinite(), score, torch.inf).amin(1, keepdim=True).nan_to_num(posinf=0.0)
        score = torch.where(score.isfinite(), score, lowest)  # broken tokens go first
        return score[:, : thumbnail.size], score[:, thumbnail.size :]


def crop_index(crops: Plane) -> Tensor:
    """[n] the crop, row-major, in which each token of the crops' plane lies."""
    y = (torch.arange(crops.rows) + crops.offset[0]) // crops.crop_shape[0]
    x = (torch.arange(crops.cols) + crops.offset[1]) // crops.crop_shape[1]
    return (y[:, None] * crops.crop_grid[1] + x).flatten()


def mosaic_index(crops: Plane) -> Tensor:
    """[n] where each token of the crops' plane is in the crops put one after the other, padding included."""
    rows, cols = crops.crop_shape
    y, x = torch.arange(crops.rows) + crops.offset[0], torch.arange(crops.cols) + crops.offset[1]
    inside = (y % rows)[:, None] * cols + x % cols
    return crop_index(crops) * rows * cols + inside.flatten()


def speaks_for(thumbnail: Plane, crops: Plane, budget_map: str) -> Tensor:
    """[S*S] the crop whose share each thumbnail patch raises. The thumbnail shows the picture without padding."""

    def axis(side: int, valid: int, offset: int, shape: int, grid: int) -> Tensor:
        if budget_map == "official":
            return (torch.arange(side) // max(side // grid, 1)).clamp(max=grid - 1)
        centre = (torch.arange(side) + 0.5) * valid / side + offset  # on the padded mosaic, in patches
        return (centre / shape).long().clamp(max=grid - 1)

    (rows, cols), (top, left), (high, wide) = crops.crop_grid, crops.offset, crops.crop_shape
    y = axis(thumbnail.rows, crops.rows, top, high, rows)
    x = axis(thumbnail.cols, crops.cols, left, wide, cols)
    return (y[:, None] * cols + x).flatten()


def crop_ratios(score: Tensor, membership: Tensor, n_crops: int, keep: float, tau: float) -> Tensor:
    """What each crop keeps of its tokens: keep * (1 + p - 1/n), p = softmax(sum of thumbnail scores / tau), at most 1.

    score [B, S*S], membership [S*S] -> [B, n_crops]. Sums to n_crops * keep before the clip. In fp64, as sums of
    hundreds of logits are."""
    total = score.new_zeros(score.shape[0], n_crops, dtype=torch.float64).index_add(1, membership, score.double())
    p = (total / tau).softmax(-1)
    return (keep * (1 + p - 1 / n_crops)).clamp(max=1.0)


def allocate(wanted: Tensor, sizes: Tensor, total: int) -> Tensor:
    """Whole counts near `wanted` [B, C] that sum to `total` <= sum of sizes and exceed no `sizes` [C].

    Scaled to the total, rounded down, then one more for the largest remainders (ties to the lower index); what the
    sizes cut off goes to the crops that have room. [B, C] long."""
    wanted = wanted * (total / wanted.sum(1, keepdim=True).clamp(min=1e-12))
    counts = torch.minimum(wanted.floor(), sizes.to(wanted))
    for _ in range(len(sizes)):  # each round fills a crop or ends the rest
        rest = total - counts.sum(1, keepdim=True)  # [B, 1]
        room = sizes - counts
        weight = torch.where(room > 0, wanted.clamp(min=1e-6), 0.0)
        add = rest * weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
        counts = counts + torch.minimum(add.floor(), room)
    rest = total - counts.sum(1, keepdim=True)
    remainder = torch.where(sizes > counts, wanted - counts, -torch.inf)
    return (counts + (ranks(remainder) < rest)).long()


def global_map(score: Tensor, crops: Plane) -> Tensor:
    """[B, S, S] scores of the thumbnail, bilinearly at the places of the crops' plane, [B, n]."""
    return F.interpolate(score[:, None], size=(crops.rows, crops.cols), mode="bilinear", align_corners=False).flatten(1)


def crop_norms(score: Tensor, crop_of: Tensor, n_crops: int) -> Tensor:
    """L2 norm of `score` [B, n] within each crop, [B, n_crops]."""
    return score.new_zeros(score.shape[0], n_crops).index_add(1, crop_of, score.square()).sqrt()


def ranks(score: Tensor, group: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
    """Rank of each entry of `score` [B, n], best first, ties to the lower index; within its `group` [n], of which there
    are as many as `sizes` [G] says, if given. [B, n] long."""
    order = score.argsort(dim=1, descending=True, stable=True)  # [B, n]
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    if group is not None:
        order = order.gather(1, group[order].argsort(dim=1, stable=True))  # by group, then score
        place = place - (sizes.cumsum(0) - sizes)[group[order]]
    return torch.empty_like(order).scatter_(1, order, place)
