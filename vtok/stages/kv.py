"""In the key-value cache: columns are dropped behind the prompt, each head group its own, and while answering."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtok.compressor import Compressor
from vtok.engine.decoder import Pass, Seen
from vtok.engine.prefill import Prefill
from vtok.engine.trace import Part
from vtok.errors import InvalidValue, Unsupported
from vtok.kernels.attention_column_sums import attention_column_sums
from vtok.kernels.compact_sequence import kept_last
from vtok.options import Keep
from vtok.stages.stage import Site, Stage
from vtok.types import keep_count, ranks

CHUNKS = "{name} cannot act on a prompt that comes in chunks: leave prefill_chunk_size unset."
DRAFTS = (
    "{name} drops columns after each token of an answer, so that several at once (drafts of assisted decoding, prompt "
    "lookup) would give another answer: leave them out, or use a method that keeps what is answered."
)
ANSWERS = (
    "{name} drops columns behind the prompt, so an answer in one forward with its prompt would see what it does not see "
    "when it is generated. Let the prompt be one forward (use_cache=True, or generate) and the answer others on its "
    "cache; to train, use a method that acts before the cache, or `with patch.paused():`."
)
UNKNOWN = (
    "{name} drops columns behind the prompt, and this forward does not say whether it is one. Call generate; or pass "
    "use_cache=True, where all of the input is prompt; or say how long prompts are, `with patch.prompt(length):`."
)


@dataclass(frozen=True, kw_only=True)
class KV(Compressor):
    """A method that drops columns of the cache: behind the prompt, and where it is `bounded` while answering, too.

    keep: of the prompt's columns, how many each layer's cache holds behind it, for each key-value head: a fraction or a
        count. A shorter prompt stays whole.
    visual: instead of `keep` for the columns of pictures, if given, which then compete among themselves.
    text: instead of `keep` for all others, if given.
    """

    stage = "kv"
    needs = frozenset({"attention"})
    text_guided = True
    bounded: ClassVar[bool] = False  # whether the cache holds no more while answering than behind the prompt

    keep: Keep = 0.5
    visual: Keep | None = None
    text: Keep | None = None

    @property
    def is_identity(self) -> bool:
        return all(isinstance(share, float) and share == 1.0 for share in self._shares())

    @property
    def apart(self) -> bool:
        """Whether pictures and text have budgets of their own."""
        return self.visual is not None or self.text is not None

    @property
    def replays(self) -> bool:
        return False

    def _shares(self) -> tuple[float | int, float | int]:
        """Of pictures and of text."""
        return (self.keep if self.visual is None else self.visual), (self.keep if self.text is None else self.text)

    @property
    def least(self) -> int:
        """The fewest columns with which the method makes sense; no budget is below."""
        return 1

    def budget(self, tokens: Tensor, visual: Tensor | None) -> Tensor:
        """[B, 1] how many columns stay of a prompt of so many tokens [B]; or [B, 2] of its `visual` [B] and the rest."""
        if visual is None:
            return counted(tokens, self.keep).clamp(min=self.least)[:, None]
        return torch.stack([counted(n, share) for n, share in zip((visual, tokens - visual), self._shares())], 1)

    @abstractmethod
    def score(self, seen: Columns) -> Tensor:
        """[B, G, L] the importance of each column to each head group. Of a bounded method it is `seen.before` in the next
        forward."""

    def stays(self, seen: Columns) -> Tensor:
        """[B, G, L] bool: the columns that stay whatever their score, no more than `seen.budget`."""
        return torch.zeros_like(seen.valid)

    def with_budget(self, budget: float, n_layers: int) -> KV:
        raise InvalidValue(f"{self.name} drops no visual tokens, but columns of the cache: give keep instead of budget.")


def counted(n: Tensor, keep: float | int) -> Tensor:
    """What `keep` means of each of n [B]: see `vtok.types.keep_count`."""
    if isinstance(keep, int):
        return torch.full_like(n, keep)
    return (n.double() * keep + 1e-9).floor().long().clamp(min=1)


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

    def each(self, change: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]) -> Layer:
        """The same with other rows, or other columns."""
        place, before, visual = (None if x is None else columns(x) for x in (self.place, self.before, self.visual))
        return replace(
            self, tokens=change(self.tokens), budget=change(self.budget), place=place, before=before, visual=visual
        )


@dataclass
class Held:
    """What the stage keeps for a sequence. steps: tokens of the answer so far."""

    layers: dict[int, Layer] = field(default_factory=dict)
    steps: int = 0

    def map(self, change: Callable[[Tensor], Tensor]) -> Held:
        return Held({i: layer.each(change, change) for i, layer in self.layers.items()}, self.steps)


@dataclass
class Cutting:
    """What it keeps for one forward. answering: whether the prompt is over. scores: layer -> scores and which stay in any case,
    [B, G, L] each, until the layer is cut."""

    held: Held
    answering: bool
    part: Evicted
    scores: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class KVStage(Stage[KV]):
    name = "kv"
    in_layers = on_text = True
    compiles = False

    def __init__(self, compressor: KV, site: Site) -> None:
        super().__init__(compressor, site)
        self.layers = range(len(site.layers))

    @property
    def observes(self) -> bool:
        return True

    # ---- a forward begins ------------------------------------------------------------------------------------------
    def begin(self, prefill: Prefill, p: Pass) -> None:
        self._enter(p, ANSWERS if prefill.prompts.completed else None)

    def resume(self, p: Pass, positions: Tensor) -> Tensor:
        self._enter(p, None)
        return positions

    def _enter(self, p: Pass, refused: str | None) -> None:
        answering = self._answers(p, 0 if p.cache is None else p.cache.seen, refused)
        if p.cache is None:  # nothing is cached, and a prompt's own forward is dense
            return
        held: Held = p.cache.states.setdefault(self.name, Held())
        held.steps = held.steps + p.length if answering else 0
        p.state[self.name] = Cutting(held, answering, Evicted())
        if not answering:
            p.parts[self.name] = p.state[self.name].part
        p.groups |= set(self.layers)

    def _answers(self, p: Pass, seen: int, refused: str | None) -> bool:
        """Whether a forward is part of an answer. Raises `Unsupported` where nobody says, and where it is both."""
        told, name = p.told, self.compressor.name
        answering = bool(seen) and p.length == 1
        if told.labels is not None:
            refused = ANSWERS
        elif told.length is not None:
            shortest, longest = told.bounds
            answering = seen >= longest
            if not answering and seen + p.length > shortest:
                refused = ANSWERS
            elif seen + p.length < shortest:
                refused = CHUNKS
        elif not told.whole:
            refused = UNKNOWN
        if answering and self.compressor.bounded and p.length > 1:
            refused = DRAFTS
        if refused is not None:
            raise Unsupported(refused.format(name=name))
        return answering

    # ---- in its layers ---------------------------------------------------------------------------------------------
    def watches(self, p: Pass, layer: int) -> bool:
        state: Cutting | None = p.state.get(self.name)
        return state is not None and (self.compressor.bounded or not state.answering)

    def attention(self, p: Pass, layer: int, seen: Seen) -> None:
        if not self.watches(p, layer):
            return
        state: Cutting = p.state[self.name]
        with p.timing(), torch.no_grad():
            valid = self._valid(p, layer, seen.key)
            record = state.held.layers[layer] = self._record(p, state, layer, valid, seen.query.shape[2])
            told = Columns(
                seen.query.detach(),
                seen.key.detach(),
                seen.value.detach(),
                seen.scaling,
                valid,
                record.place,
                _rows(valid, seen.query.shape[2]),
                record.budget.sum(1),
                record.before,
                layer,
                state.held.steps,
            )
            if self.compressor.bounded or record.width < valid.shape[2]:
                state.scores[layer] = self.compressor.score(told).float(), self.compressor.stays(told)

    def _valid(self, p: Pass, layer: int, key: Tensor) -> Tensor:
        """[B, G, L] bool."""
        valid, (batch, groups, length) = p.cache.valid_at(layer), key.shape[:3]
        if valid is None:
            return torch.ones(batch, groups, length, dtype=torch.bool, device=key.device)
        return (valid if valid.ndim == 3 else valid[:, None].expand(-1, groups, -1)).to(key.device)

    def _record(self, p: Pass, state: Cutting, layer: int, valid: Tensor, queries: int) -> Layer:
        """The layer's record, with the columns that came since the last eviction."""
        batch, groups, length = valid.shape
        old = state.held.layers.get(layer)
        held = 0 if old is None else min(old.place.shape[2], length - queries)
        new = valid[:, 0, held:]  # head groups differ in what was dropped alone
        tokens = new.new_zeros(batch, dtype=torch.long)
        place, before = tokens.new_zeros(batch, groups, 0), torch.zeros(batch, groups, 0, device=valid.device)
        if old is not None:  # columns may have been cropped since
            tokens = old.tokens - (old.place.shape[2] - held)
            place, before = old.place[..., :held], old.before[..., :held]
        added = (tokens[:, None] + new.cumsum(1) - 1)[:, None].expand(-1, groups, -1)
        place = torch.cat([place, added], 2)
        before = torch.cat([before, before.new_zeros(added.shape)], 2)
        tokens = tokens + new.sum(1)
        most = length - held + (0 if old is None else old.most)
        visual = self._visual(p, layer, valid, queries, old) if self.compressor.apart else None
        if state.answering:
            return replace(old, tokens=tokens, most=most, place=place, before=before, visual=visual)
        budget = self.compressor.budget(tokens, None if visual is None else (visual & valid)[:, 0].sum(1))
        width = length - 1 if visual is not None else max(self.compressor.least, keep_count(most, self.compressor.keep))
        return Layer(tokens, most, place, before, budget, width, visual)

    def _visual(self, p: Pass, layer: int, valid: Tensor, queries: int, old: Layer | None) -> Tensor:
        """[B, G, L] bool: the columns of pictures."""
        there = torch.zeros_like(valid)
        if old is not None:
            there[..., : old.visual.shape[2]] = old.visual[..., : valid.shape[2]]
        rows = p.rows_at(layer)
        if p.prompts is not None and rows.visual is not None:
            there[..., valid.shape[2] - queries :] = rows.visual.to(valid.device)[:, None]
        return there

    def attended(self, p: Pass, layer: int) -> None:
        state: Cutting | None = p.state.get(self.name)
        if state is None or not self.watches(p, layer):
            return
        with p.timing(), torch.no_grad():
            record, found = state.held.layers[layer], state.scores.pop(layer, None)
            valid = self._valid(p, layer, record.place)
            if found is None:  # nothing to drop
                state.part.note(p, layer, valid, None)
                return
            score, stays = found
            record = replace(record, before=score)
            keep = chosen(score.masked_fill(stays, torch.inf), valid, record.budget, record.visual)
            width = int(keep.sum(2).max()) if self.compressor.apart else min(record.width, keep.shape[2])
            index = kept_last(keep.flatten(0, 1), width).view(*keep.shape[:2], width)
            there = keep.gather(2, index)
            state.part.note(p, layer, there, index)
            if width < keep.shape[2]:
                even = p.cache.valid[layer] is None and (p.batch == 1 or not self.compressor.apart)
                p.cache.keep(layer, index, None if even else there[:, 0])  # head groups hold equally many
                record = record.each(lambda x: x, lambda x: x.gather(2, index))
            state.held.layers[layer] = record


def chosen(score: Tensor, valid: Tensor, budget: Tensor, visual: Tensor | None = None) -> Tensor:
    """[B, G, L] bool: the columns that stay, those with the best scores, ties to the earlier.

    score, valid: [B, G, L]. budget: [B, 1] of each row; or [B, 2] of `visual` ones [B, G, L] and of the others."""
    score = score.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    kinds = [valid] if visual is None else [valid & visual, valid & ~visual]
    keep = torch.zeros_like(valid)
    for kind, most in zip(kinds, budget.unbind(1)):
        keep |= kind & (ranks(score.masked_fill(~kind, -torch.inf)) < most[:, None, None])
    return keep


def _rows(valid: Tensor, queries: int) -> Tensor:
    """[B, Q] the columns of the queries, -1 for padding. valid: [B, G, L]."""
    length = valid.shape[2]
    rows = torch.arange(length - queries, length, device=valid.device).expand(len(valid), -1)
    return torch.where(valid[:, 0, length - queries :], rows, -1)


@dataclass
class Evicted(Part):
    """The columns of a prompt that each layer holds behind it.

    positions: layer -> [B, G, K] their places in the padded input, -1 for padding and for columns of former turns.
    counts: layer -> [B, G] how many there are.
    """

    positions: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, Tensor] = field(default_factory=dict)

    def note(self, p: Pass, layer: int, there: Tensor, index: Tensor | None) -> None:
        """there: [B, G, K] bool, which are no padding; index: of the layer's columns, None for all."""
        batch, groups, width = there.shape
        if index is None:
            index = torch.arange(width, device=there.device).expand(batch, groups, -1)
        rows, past = p.rows_at(layer), p.cache.columns(layer) - (p.length if p.rows_at(layer) is None else 0)
        if rows is not None:
            past = p.cache.columns(layer) - rows.index.shape[1]
            origin = rows.index.to(index.device)[:, None].expand(-1, groups, -1)
        else:
            origin = torch.arange(p.length, device=index.device).expand(batch, groups, -1)
        own = index - past
        found = origin.gather(2, own.clamp(min=0))
        self.positions[layer] = torch.where(there & (own >= 0), found, -1)
        self.counts[layer] = there.sum(2)

    def cached(self, layer: int, sample: int, tokens: float) -> float:
        return self.counts[layer][sample].float().mean().item() if layer in self.counts else tokens

    def to_dict(self) -> dict[str, Any]:
        return {"kv_columns": {str(layer): counts.tolist() for layer, counts in self.counts.items()}}


def uniform(seed: int, index: Tensor) -> Tensor:
    """A number in (0, 1) for each index [...] long: always the same, whatever the batch and the device.

    The mixing function of SplitMix64 (Steele, Lea and Flood, 2014), which draws from a counter."""
    x = index * -7046029254386353131 + seed * -4658895280553007687 + 1  # odd 64-bit constants; overflow wraps
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return ((x >> 40 & 0xFFFFFF) + 0.5) / (1 << 24)
