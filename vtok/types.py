"""What a compressor sees of a picture (`VisualTokens`) and what it answers (`Selection`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vtok import options
from vtok.errors import Unsupported
from vtok.kernels.merge import merge


def check_keep(keep: float | int, name: str = "keep") -> float | int:
    """Return `keep` if it is a fraction in (0, 1] or a count >= 1, else raise `InvalidValue`."""
    options.check(options.Keep, keep, name)
    return keep


def keep_count(n: int, keep: float | int) -> int:
    """How many of `n` tokens `keep` means: `floor(n * keep)` or the count itself, at least 1, at most `n`."""
    k = keep if isinstance(keep, int) else math.floor(n * keep + 1e-9)  # 0.1 * 30 is 3, not 2.9999
    return min(n, max(1, k))


def keep_counts(n: Tensor, keep: float | int) -> Tensor:
    """The same of each of n [B] long, but that a count may be above it. Does not wait for the device."""
    return torch.full_like(n, keep) if isinstance(keep, int) else whole_part(n, keep).clamp(min=1)


def whole_part(n: Tensor, share: float) -> Tensor:
    """`floor(n * share)` of each of n [B] long. Does not wait for the device."""
    return (n.double() * share + 1e-9).floor().long()  # in float32 84 % of 75 are 62


def share(total: int, sizes: Sequence[int]) -> list[int]:
    """Split `total` over parts in proportion to their sizes, by largest remainder; ties go to the earlier part."""
    whole = sum(sizes)
    parts = [total * size // whole for size in sizes]
    rest = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))
    for i in rest[: total - sum(parts)]:
        parts[i] += 1
    return parts


def ranks(score: Tensor, group: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
    """Rank of each entry of `score` [..., T], best first, ties to the lower index. [..., T] long.

    Within its `group` [T] or [B, T], of which there are as many as `sizes` [G] or [B, G] says, if given; `score` is
    [B, T] then."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    if group is not None:
        group, start = group.expand_as(order), (sizes.cumsum(-1) - sizes).expand(len(order), -1)
        order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))  # by group, then score
        place = place - start.gather(1, group.gather(1, order))
    return torch.empty_like(order).scatter_(-1, order, place)


def best(score: Tensor, count: Tensor, most: int) -> Tensor:
    """`ranks(score) < count`, [..., L] bool, without sorting all. count: [..., 1] long, `most` at most."""
    top = score.topk(min(max(1, most), score.shape[-1]), dim=-1).values
    edge = top.gather(-1, (count - 1).clamp(min=0, max=top.shape[-1] - 1))
    above, level = score > edge, score == edge
    return above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


@dataclass(frozen=True)
class Plane:
    """A rectangle of visual tokens in raster order: a whole picture, a thumbnail, the merged crops, a video frame.

    rows, cols: its size in tokens.
    kind: "image", "thumbnail", "crops" or "frame".
    box: (left, top, right, bottom), the part of the picture it shows, each in [0, 1].
    crop_grid, crop_shape, offset: for "crops" only. The (rows, cols) of the crop mosaic, the (rows, cols) of
        tokens of one crop, and the (row, col) of the plane's first token on the padded mosaic, since padding
        is cut away before the tokens reach the language model.
    tiled: whether the prompt holds the plane crop by crop (InternVL) and not row by row.
    resampled: the (rows, cols) that the plane had before the family resized its features, (0, 0) where it did not.
        `crop_shape` and `offset` then count tokens of that size; of a plane that is no mosaic (a pooled frame) it is
        the view itself.
    """

    rows: int
    cols: int
    kind: str = "image"
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    crop_grid: tuple[int, int] = (1, 1)
    crop_shape: tuple[int, int] = (0, 0)
    offset: tuple[int, int] = (0, 0)
    tiled: bool = False
    resampled: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        return self.rows * self.cols

    @property
    def views(self) -> int:
        """How many views of the encoder it is made of: one, or the number of crops."""
        return self.crop_grid[0] * self.crop_grid[1]

    @property
    def view_shape(self) -> tuple[int, int]:
        """(rows, cols) in tokens of one of them, padding included."""
        return self.crop_shape if self.kind == "crops" else self.span

    @property
    def span(self) -> tuple[int, int]:
        """(rows, cols) of the mosaic that the plane covers, in the encoder's tokens."""
        return self.resampled if any(self.resampled) else (self.rows, self.cols)

    def mosaic_rows(self, device: torch.device | None = None) -> Tensor:
        """[rows] the row of the padded mosaic in which the middle of each row of the plane lies."""
        return self._on_mosaic(torch.arange(self.rows, device=device), 0)

    def mosaic_cols(self, device: torch.device | None = None) -> Tensor:
        """[cols] the same for columns."""
        return self._on_mosaic(torch.arange(self.cols, device=device), 1)

    @property
    def crop_slices(self) -> tuple[list[slice], list[slice]]:
        """The rows of the plane that each row of crops has, and the columns; those without any are left out."""

        def cut(n: int, axis: int) -> list[slice]:
            crop_of = [self._on_mosaic(i, axis) // self.crop_shape[axis] for i in range(n)]
            starts = [i for i in range(n) if i == 0 or crop_of[i] != crop_of[i - 1]]
            return [slice(*ends) for ends in pairwise([*starts, n])]

        return cut(self.rows, 0), cut(self.cols, 1)

    def _on_mosaic(self, i: Any, axis: int) -> Any:
        """Where the middle of row (column) `i` lies, in the whole numbers of a tensor or of Python."""
        return self.offset[axis] + (2 * i + 1) * self.span[axis] // (2 * (self.rows, self.cols)[axis])


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one picture or clip lie. Hashable, so that equal pictures are compressed together.

    planes: in sequence order; the N compressible tokens are these planes one after the other.
    separators: for a plane of index p, the number of tokens that the family adds at the end of each of its rows
        (LLaVA-NeXT's newline). They are always kept and not counted.
    modality: "image" or "video".
    tail: the number of separators behind the last plane (LLaVA-OneVision's newline after a clip).
    """

    planes: tuple[Plane, ...]
    separators: tuple[int, ...] = ()
    modality: str = "image"
    tail: int = 0

    @cached_property
    def n(self) -> int:
        """N, the number of compressible tokens."""
        return sum(p.size for p in self.planes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The index of each plane's first token among the N."""
        starts, at = [], 0
        for plane in self.planes:
            starts.append(at)
            at += plane.size
        return tuple(starts)

    @cached_property
    def n_rows(self) -> int:
        """N plus the separators: how many placeholders the picture has in the prompt."""
        return self.n + sum(s * p.rows for s, p in zip(self.separators, self.planes)) + self.tail

    @cached_property
    def place(self) -> Tensor:
        """[N] the placeholder (0 .. n_rows-1) of each compressible token."""
        parts, at = [], 0
        for i, plane in enumerate(self.planes):
            width = plane.cols + (self.separators[i] if self.separators else 0)
            y, x = torch.arange(plane.rows)[:, None], torch.arange(plane.cols)
            cells = y * width + x
            if plane.tiled:
                rows, cols = plane.crop_shape
                crop = y // rows * plane.crop_grid[1] + x // cols
                cells = crop * rows * cols + y % rows * cols + x % cols
            parts.append(at + cells.flatten())
            at += plane.rows * width
        return torch.cat(parts)

    @cached_property
    def separator_place(self) -> Tensor:
        """[separators] the placeholder of each separator."""
        is_separator = torch.ones(self.n_rows, dtype=torch.bool).index_fill_(0, self.place, False)
        return is_separator.nonzero().squeeze(1)

    def separators_of(self, tokens: Tensor) -> Tensor:
        """[separators] bool: those that end a row in which some of `tokens` [n], indices among the N, lies, and the
        tail."""
        kept = [torch.zeros(0, dtype=torch.bool)]
        for plane, start, per_row in zip(self.planes, self.starts, self.separators):
            rows = (tokens[(tokens >= start) & (tokens < start + plane.size)] - start) // plane.cols
            kept.append(torch.zeros(plane.rows, dtype=torch.bool).index_fill_(0, rows, True).repeat_interleave(per_row))
        return torch.cat([*kept, torch.ones(self.tail, dtype=torch.bool)])

    @cached_property
    def boxes(self) -> Tensor:
        """[N, 4] (left, top, right, bottom) of each token in the picture, in [0, 1], for drawing."""
        parts = []
        for p in self.planes:
            left, top, right, bottom = p.box
            y, x = torch.meshgrid(torch.arange(p.rows), torch.arange(p.cols), indexing="ij")
            y, x, dy, dx = y.flatten(), x.flatten(), (bottom - top) / p.rows, (right - left) / p.cols
            parts.append(torch.stack([left + x * dx, top + y * dy, left + (x + 1) * dx, top + (y + 1) * dy], 1))
        return torch.cat(parts)


@dataclass(frozen=True)
class Question:
    """What B pictures are asked: for each its sample's text from behind the last visual token to the prompt's end, or,
    where nothing stands there, all text of the prompt.

    valid: [B, T] bool, false for padding, which is on the right.
    embeds: [B, T, E] the language model's input embeddings of this text. Without gradient.
    states: [B, T, E] its last hidden states where it reads this text alone, only for compressors that need "question".
        Without gradient.
    ids: [B, T] token ids, or None where the model got embeddings.
    """

    valid: Tensor
    embeds: Tensor
    states: Tensor | None = None
    ids: Tensor | None = None

    def rows(self, rows: Tensor) -> Question:
        """Some rows of the batch, [G] indices."""
        take = lambda x: None if x is None else x[rows.to(x.device)]
        return Question(*map(take, (self.valid, self.embeds, self.states, self.ids)))


@dataclass(frozen=True)
class VisualTokens:
    """The tokens of B pictures of one layout, as they would enter the language model.

    features: [B, N, D] after the projector, separators left out.
    layout: shared by the B pictures.
    cls_attention: [B, V, P] or None: for each view (thumbnail first, then crops row-major, padding included), the
        head-mean of the pre-softmax logits of the encoder's CLS token over its P patches, in the last layer. Short for
        `encoder["cls_attention", -1]`.
    encoder: (need, layer) -> [B, V, P, ...], what the compressor's `encoder_layers` asks of the vision encoder, and no
        more; see `vtok/tower.py`.
    question: only for compressors that need "question" or "question_embeds".
    """

    features: Tensor
    layout: Layout
    cls_attention: Tensor | None = None
    encoder: Mapping[tuple[str, int | float | None], Tensor] = field(default_factory=dict)
    question: Question | None = None

    def read(self, need: str, layer: int | float | None = -1) -> Tensor:
        """[B, V, P, ...] of `encoder`, on the features' device: the encoder may be on another."""
        if (need, layer) not in self.encoder:
            raise Unsupported(f"The vision encoder showed no {need} at layer {layer} for this {self.layout.modality}.")
        return self.encoder[need, layer].to(self.features.device)


@dataclass(frozen=True)
class Selection:
    """Which of the N tokens enter the language model.

    keep: [B, N] bool.
    n_kept: the number kept per picture where it is the same for all B and known without looking at `keep`
        (then the engine need not wait for the device), else None.
    features: [B, N, D] or None. Where given, a kept token enters with this row instead of its own (merging).
    merged_into: [B, N] long or None: the kept token that absorbed each token (itself if kept, -1 if dropped).
    weight: [B, N] or None: the share of each token's row in the row of the one that absorbed it; None for the mean.
    """

    keep: Tensor
    n_kept: int | None = None
    features: Tensor | None = None
    merged_into: Tensor | None = None
    weight: Tensor | None = None

    @staticmethod
    def of_indices(index: Tensor, n: int, **fields: Any) -> Selection:
        """A selection from `index` [B, K], K distinct tokens of each picture."""
        keep = torch.zeros(index.shape[0], n, dtype=torch.bool, device=index.device).scatter_(1, index, True)
        return Selection(keep, n_kept=index.shape[1], **fields)


def mean_of_members(x: Tensor, merged_into: Tensor) -> Tensor:
    """x [B, N, D] with each token's row replaced by the mean of the rows of all tokens that were merged into it.

    merged_into: as in `Selection`. Tokens into which nothing was merged keep their rows. Means are taken in fp32."""
    mean, count = merge(x, merged_into, x.shape[1])
    return torch.where(count[..., None] > 0, mean, x)


def sum_of_members(x: Tensor, merged_into: Tensor, weight: Tensor) -> Tensor:
    """x [B, N, D] with each kept token's row replaced by the weighted sum of the rows of all tokens that were merged
    into it; as in `Selection`. Taken in fp32."""
    group = torch.where(merged_into >= 0, merged_into, x.shape[1])  # the last for those of no group
    rows = x.float() * weight[..., None]
    sums = torch.cat([torch.zeros_like(rows), rows.new_zeros(len(x), 1, x.shape[2])], 1)
    sums = sums.scatter_add(1, group[..., None].expand_as(rows), rows)[:, :-1]
    kept = merged_into == torch.arange(x.shape[1], device=x.device)
    return torch.where(kept[..., None], sums.to(x.dtype), x)


@dataclass(frozen=True)
class Activations:
    """One decoder layer's FFN activations, `act(gate(x)) * up(x)`, of the tokens that this forward brings to it.

    values: [B, L, F], in the model's dtype; rows that are not of the prompt may hold anything.
    prompt: [B, L] bool, the tokens up to the anchor, padding left out. Others must not influence an answer.
    visual: [B, L] bool, the tokens that may be dropped.
    picture: [B, L] long, which of its sample's pictures (from 0) a token belongs to, -1 for text. pictures: the
        largest number of them in a sample.
    anchor: [B] long, index among the L of the token at which the prompt ends.
    """

    values: Tensor
    prompt: Tensor
    visual: Tensor
    picture: Tensor
    pictures: int
    anchor: Tensor


@dataclass(frozen=True)
class Entered:
    """What entered the first decoder layer, for in-LLM compressors that need "question_embeds".

    embeds: [B, L0, D], input embeddings; rows of padding may hold anything.
    visual: [B, L0] bool, the visual tokens of which `Attention.visual` shows those that are left.
    instruction: [B, R] long, indices among the L0 of the text that `Attention.instruction` names, in the same places;
        -1 in front.
    """

    embeds: Tensor
    visual: Tensor
    instruction: Tensor


@dataclass(frozen=True)
class Attention:
    """One layer's attention over the visual and text tokens, for in-LLM compressors. Nothing here is a softmax yet.

    query, key: [B, H, Q, d] and [B, Hkv, L, d] after RoPE; the Q queries are the last Q of the L keys.
    scaling: multiplies the logits.
    valid: [B, L] bool, false for padding.
    visual: [B, L] bool, the tokens that may be dropped.
    anchor: [B] long, index among the L keys of the token at which the prompt ends. Later tokens (a completion in a
        training forward) exist but must not influence a score.
    instruction: [B, R] long, indices among the L keys, ascending, of the prompt's text from its first visual token to
        the anchor, with the anchor itself; -1 in front where a sample has fewer than R. None where nobody told.
    hidden: [B, Q, D], the hidden states that enter the layer. None where nobody told.
    remaining: for each sample, how many visual tokens are to remain. None where the score says so itself.
    entered: what entered the first layer; only for compressors that need "question_embeds".
    """

    query: Tensor
    key: Tensor
    scaling: float
    valid: Tensor
    visual: Tensor
    anchor: Tensor
    instruction: Tensor | None = None
    hidden: Tensor | None = None
    remaining: Sequence[int] | None = None
    entered: Entered | None = None
