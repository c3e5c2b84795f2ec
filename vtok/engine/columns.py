"""The columns of a cache as methods see them that choose among them, and what is remembered of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok.engine.cache import GONE, State
from vtok.errors import PatchStateError
from vtok.kernels.attention_column_sums import attention_column_sums
from vtok.types import best, whole_part

if TYPE_CHECKING:
    from vtok.engine.decoder import Seen

FIRST = 1e30  # above any score


@dataclass(frozen=True)
class Columns:
    """What a compressor sees of one layer's cache, its last columns those of this forward, after RoPE.

    query: [B, H, Q, d]. key, value: [B, G, L, d], Q of them new. scaling: of the logits. valid: [B, G, L] bool.
    place: [B, G, L] long, the how-manieth token of its row a column was, from 0. rows: [B, Q] the columns of the
    queries, -1 for padding. budget: [B] long, columns that will stay. before: [B, G, L] the scores so far, 0 for new
    columns. layer: of the decoder. step: tokens of the answer so far, 0 for the prompt.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    valid: Tensor
    place: Tensor
    rows: Tensor
    budget: Tensor
    before: Tensor
    layer: int
    step: int

    @property
    def age(self) -> Tensor:
        """[B, G, L] how many valid columns are behind each, 0 for the newest."""
        return self.valid.flip(2).cumsum(2).flip(2) - 1

    def last(self, count: Tensor) -> Tensor:
        """[B, G, L] bool: the newest columns of each row, count [B] of them."""
        return self.valid & (self.age < count[:, None, None])

    def recent(self, share: float, others: int = 0) -> Tensor:
        """[B, G, L] bool: the newest columns, a share of the budget, in which so many `others` stay as well."""
        return self.last(torch.minimum(whole_part(self.budget, share), self.budget - others))

    @cached_property
    def apart(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, rows and valid with head groups as rows of the batch: [B * G, ...]."""
        batch, groups, length, width = self.key.shape
        query = self.query.reshape(batch * groups, -1, *self.query.shape[2:])
        key = self.key.reshape(batch * groups, 1, length, width)
        return query, key, self.rows.repeat_interleave(groups, 0), self.valid.reshape(batch * groups, length)

    def attention_sums(self) -> Tensor:
        """[B, G, L] the attention that each column gets in this forward, summed over queries and heads of a group."""
        query, key, rows, valid = self.apart
        sums = attention_column_sums(query, key, rows, self.scaling, valid)
        return (sums * query.shape[1]).view(self.valid.shape)


@dataclass(frozen=True)
class Layer:
    """What the stage keeps of one layer of a sequence.

    tokens: [B] how many columns of each row the layer was ever given. most: of any row, at most. place, before: see
    `Columns`. budget: [B, 1] columns that stay, or [B, 2] of pictures and of the rest. width: the most of a row.
    visual: [B, G, L] bool, the columns of pictures, where these have a budget of their own.
    """

    tokens: Tensor
    most: int
    place: Tensor
    before: Tensor
    budget: Tensor
    width: int
    visual: Tensor | None = None

    @staticmethod
    def of(valid: Tensor) -> Layer:
        """Of a layer that was given its first columns, valid [B, G, L]."""
        none = torch.zeros(len(valid), 0, dtype=torch.long, device=valid.device)
        empty = none[:, None].expand(-1, valid.shape[1], -1)
        return Layer(none.sum(1), 0, empty, empty.float(), none, 0).grown(valid)

    def grown(self, valid: Tensor) -> Layer:
        """With the columns that came since: valid [B, G, L] of all."""
        new = valid[:, 0, self.place.shape[2] :]  # head groups differ in what was dropped alone
        place = (self.tokens[:, None] + new.cumsum(1) - 1)[:, None].expand(-1, valid.shape[1], -1)
        before = torch.cat([self.before, self.before.new_zeros(place.shape)], 2)
        tokens, most, place = self.tokens + new.sum(1), self.most + new.shape[1], torch.cat([self.place, place], 2)
        return replace(self, tokens=tokens, most=most, place=place, before=before)

    def cropped(self, count: int) -> Layer:
        """Without the last `count` tokens. Raises `PatchStateError` where they are not what the last columns are of.
        Waits for the device."""
        if count <= 0:
            return self
        last = self.tokens[:, None, None] - count + torch.arange(count, device=self.place.device)
        if count > self.place.shape[2] or not bool((self.place[..., -count:] == last).all()):
            raise PatchStateError(GONE)
        shorter = self.each(lambda x: x, lambda x: x[..., :-count])
        return replace(shorter, tokens=self.tokens - count, most=self.most - count)

    @property
    def apart(self) -> bool:
        """Whether pictures and text have budgets of their own."""
        return self.visual is not None

    def pictures(self, valid: Tensor) -> Tensor | None:
        """[B] how many columns of pictures there are, where they have a budget of their own."""
        return None if self.visual is None else (self.visual & valid)[:, 0].sum(1)

    def each(self, change: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]) -> Layer:
        """The same with other rows, or other columns."""
        place, before, visual = (None if x is None else columns(x) for x in (self.place, self.before, self.visual))
        return replace(
            self, tokens=change(self.tokens), budget=change(self.budget), place=place, before=before, visual=visual
        )


@dataclass
class Held(State):
    """What the stage keeps for a sequence. steps: tokens of the answer so far. given: layer -> keys of the first
    columns, where these move (`renumber.move_up`)."""

    layers: dict[int, Layer] = field(default_factory=dict)
    steps: int = 0
    given: dict[int, Tensor] = field(default_factory=dict)

    def cropped(self, count: int, columns: Callable[[int], int]) -> Held:
        late = {i: columns(i) - layer.place.shape[2] for i, layer in self.layers.items()}  # came since, and are whole
        return replace(self, layers={i: layer.cropped(count - late[i]) for i, layer in self.layers.items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> Held:
        layers = {i: layer.each(change, change) for i, layer in self.layers.items()}
        return Held(layers, self.steps, {i: change(keys) for i, keys in self.given.items()})


def first_of_all(stays: Tensor, score: Tensor, place: Tensor) -> Tensor:
    """Scores [B, G, L] by which the columns that stay come before all others; and the latest of them first, where a
    budget has no room for all."""
    return torch.where(stays, (place + 1) * FIRST, score)


def chosen(
    score: Tensor, valid: Tensor, budget: Tensor, visual: Tensor | None = None, most: int | None = None
) -> Tensor:
    """[B, G, L] bool: the columns that stay, those with the best scores, ties to the earlier.

    score, valid: [B, G, L]. budget: [B, 1] of each row; or [B, 2] of `visual` ones [B, G, L] and of the others. most:
    no budget is above, where that is known."""
    score = score.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    kinds = [valid] if visual is None else [valid & visual, valid & ~visual]
    keep = torch.zeros_like(valid)
    for kind, count in zip(kinds, budget.unbind(1)):
        count = count[:, None, None].expand(-1, score.shape[1], -1)
        keep |= kind & best(score.masked_fill(~kind, -torch.inf), count, score.shape[2] if most is None else most)
    return keep


def columns(seen: Seen, valid: Tensor, record: Layer, layer: int, step: int) -> Columns:
    """What a compressor is told of a layer."""
    tensors = seen.query.detach(), seen.key.detach(), seen.value.detach(), seen.scaling
    rows = rows_of(valid, seen.query.shape[2])
    return Columns(*tensors, valid, record.place, rows, record.budget.sum(1), record.before, layer, step)


def rows_of(valid: Tensor, queries: int) -> Tensor:
    """[B, Q] the columns of the queries, -1 for padding. valid: [B, G, L]."""
    length = valid.shape[2]
    rows = torch.arange(length - queries, length, device=valid.device).expand(len(valid), -1)
    return torch.where(valid[:, 0, length - queries :], rows, -1)


def uniform(seed: int, index: Tensor) -> Tensor:
    """A number in (0, 1) for each index [...] long: always the same, whatever the batch and the device.

    The mixing function of SplitMix64 (Steele, Lea and Flood, 2014), which draws from a counter."""
    start = (seed * 0x9E3779B97F4A7C15 + (1 << 63)) % (1 << 64) - (1 << 63)  # as a signed number of 64 bits
    x = index * -7046029254386353131  # overflow wraps
    x += start
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        mixed = x >> shift
        x ^= mixed.bitwise_and_((1 << 64 - shift) - 1)
        x *= factor
    return x.bitwise_right_shift_(41).bitwise_and_(0x7FFFFF).float().add_(0.5).div_(1 << 23)
