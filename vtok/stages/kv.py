"""In the key-value cache: columns are dropped behind the prompt, each head group its own, and while answering."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtok.compressor import Compressor
from vtok.engine import renumber
from vtok.engine.aside import Watch, run_aside
from vtok.engine.cache import Rows, gather
from vtok.engine.columns import Columns, Held, Layer, chosen, columns, first_of_all
from vtok.engine.decoder import Pass, Seen
from vtok.engine.prefill import Prefill
from vtok.engine.probe import check_shown
from vtok.engine.trace import Part
from vtok.errors import InvalidValue, PatchStateError, Unsupported
from vtok.kernels.compact_sequence import kept_last
from vtok.options import AtLeast0, AtLeast1, Keep
from vtok.stages.stage import Site, Stage
from vtok.types import keep_count, keep_counts

if TYPE_CHECKING:
    from vtok.engine.forward import Engine


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
    of_pictures = False
    bounded: ClassVar[bool] = False  # whether the cache holds no more while answering than behind the prompt
    rereads: ClassVar[bool] = False  # see `Rereading`

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

    def _shares(self) -> tuple[float | int, float | int]:
        """Of pictures and of text."""
        return (self.keep if self.visual is None else self.visual), (self.keep if self.text is None else self.text)

    @property
    def least(self) -> int:
        """The fewest columns with which the method makes sense; no budget is below."""
        return 1

    @property
    def moves(self) -> int:
        """How many of the first columns take the positions right in front of the others that stay, which then are the
        latest ones; 0 where all keep their own."""
        return 0

    def budget(self, tokens: Tensor, visual: Tensor | None) -> Tensor:
        """[B, 1] how many columns stay of a prompt of so many tokens [B]; or [B, 2] of its `visual` [B] and others."""
        if visual is None:
            return keep_counts(tokens, self.keep).clamp(min=self.least)[:, None]
        pictures, text = self._shares()
        rest = keep_counts(tokens - visual, text).clamp(min=self.least)  # a prompt begins and ends with text
        return torch.stack([keep_counts(visual, pictures), rest], 1)

    def with_budget(self, budget: float, n_layers: int) -> Compressor:
        if self.apart:
            raise InvalidValue(f"A budget is of all columns: leave visual and text of {self.name} out, or the budget.")
        return super().with_budget(budget, n_layers)

    @abstractmethod
    def score(self, seen: Columns) -> Tensor:
        """[B, G, L] the importance of each column to each head group. It is `seen.before` in the next forward that asks
        for scores."""

    def stays(self, seen: Columns) -> Tensor:
        """[B, G, L] bool: the columns that stay whatever their score, no more than `seen.budget`."""
        return torch.zeros_like(seen.valid)


@dataclass(frozen=True, kw_only=True)
class Rereading(KV):
    """A method that scores columns as the model repeats its prompt, and not while it reads. What it is shown then has
    the repeat's queries as the last columns; valid are the columns that these see.

    chunk: columns that are repeated at a time. sinks: first columns, which are seen from each chunk, and stay.
    even: whether each layer and head group keeps equally many; else the best of all pairs stay, wherever they are.
    ask: ids of the words that ask to repeat, and of the template's turn, in front of each chunk; none if empty.
    overlap: columns before a chunk that are repeated with it, but not scored.
    """

    rereads = True

    chunk: AtLeast1 = 2048
    sinks: AtLeast0 = 4
    even: bool = False
    ask: tuple[AtLeast0, ...] = ()
    overlap: AtLeast0 = 8

    @property
    def least(self) -> int:
        return self.sinks + 1

    def stays(self, seen: Columns) -> Tensor:
        return seen.place < self.sinks


@dataclass
class Cutting:
    """What it keeps for one forward. part: of the trace of a prompt, None in an answer. shown: the layers whose
    attention was. scores: layer -> scores and which stay in any case, [B, G, L] each, until the layer is cut."""

    held: Held
    part: Evicted | None
    shown: set[int] = field(default_factory=set)
    scores: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def answering(self) -> bool:
        """Whether the prompt is over."""
        return self.part is None

    def note(self, p: Pass, layer: int, there: Tensor, index: Tensor) -> None:
        """Tell the trace what a layer holds behind the prompt, see `Evicted.note`."""
        if self.part is not None:
            self.part.note(p, layer, there, index)


class KVStage(Stage[KV]):
    name = "kv"
    in_layers = on_text = True
    compiles = False

    def __init__(self, compressor: KV, site: Site) -> None:
        super().__init__(compressor, site)
        self.layers = range(len(site.layers))
        if compressor.moves:
            if len(site.parts) > 1:
                raise Unsupported(f"{compressor.name}(renumber=True) goes with no other method: leave renumber off.")
            renumber.refuse(compressor.name, site.config, site.layers)
        if compressor.rereads and compressor.ask:
            words = site.config.get_text_config().vocab_size
            if unknown := [token for token in compressor.ask if token >= words]:
                raise InvalidValue(f"ask must be ids of the model's {words} tokens, got {unknown}: use its tokenizer.")

    # ---- a forward begins ------------------------------------------------------------------------------------------
    def begin(self, prefill: Prefill, p: Pass) -> None:
        self.resume(p, prefill.positions)

    def resume(self, p: Pass, positions: Tensor) -> Tensor:
        seen = 0 if p.cache is None else p.cache.seen
        answering = p.told.answers(seen, p.length, self.compressor.name, one_by_one=self.compressor.bounded)
        if p.cache is not None:  # else nothing is cached, and a prompt's own forward is dense
            held: Held = p.cache.states.setdefault(self.name, Held())
            if answering and not held.layers:  # the prompt was read without this method: whole until the next one
                return positions
            held.steps = held.steps + p.length if answering else 0
            part = None if answering else p.parts.setdefault(self.name, Evicted())
            p.state[self.name] = Cutting(held, part)
            p.groups |= set(self.layers)
        return positions

    # ---- in its layers ---------------------------------------------------------------------------------------------
    def watches(self, p: Pass, layer: int) -> bool:
        state: Cutting | None = p.state.get(self.name)
        return state is not None and (self.compressor.bounded or not state.answering)

    def attention(self, p: Pass, layer: int, seen: Seen) -> None:
        if not self.watches(p, layer):
            return
        state: Cutting = p.state[self.name]
        if layer in state.shown:
            raise Unsupported(f"{self.compressor.name} is not for decoders whose layers attend more than once each.")
        state.shown.add(layer)
        if (held := p.cache.layers[layer].keys).shape != seen.key.shape:
            raise Unsupported(
                f"{self.compressor.name} drops columns of keys as attention reads them, {tuple(seen.key.shape[1::2])} "
                f"heads and numbers each, and this model caches something else, {tuple(held.shape[1::2])}."
            )
        with p.timing(), torch.no_grad():
            valid = self._valid(p, layer, seen.key)
            record = state.held.layers[layer] = self._record(p, state, layer, valid, seen.query.shape[2])
            if not self.compressor.rereads and (self.compressor.bounded or record.width < valid.shape[2]):
                told = columns(seen, valid, record, layer, state.held.steps)
                state.scores[layer] = self.compressor.score(told).float(), self.compressor.stays(told)

    def _valid(self, p: Pass, layer: int, key: Tensor) -> Tensor:
        """[B, G, L] bool."""
        valid, (batch, groups, length) = p.cache.valid_at(layer), key.shape[:3]
        if valid is None:
            return torch.ones(batch, groups, length, dtype=torch.bool, device=key.device)
        return (valid if valid.ndim == 3 else valid[:, None].expand(-1, groups, -1)).to(key.device)

    def _record(self, p: Pass, state: Cutting, layer: int, valid: Tensor, queries: int) -> Layer:
        """The layer's record, with the columns that came since the last eviction."""
        old = state.held.layers.get(layer)
        record = Layer.of(valid) if old is None else old.grown(valid)
        apart = old.apart if state.answering else self.compressor.apart
        record = replace(record, visual=self._visual(p, layer, valid, queries, old) if apart else None)
        if state.answering:
            return record
        budget = self.compressor.budget(record.tokens, record.pictures(valid))
        width, keep = valid.shape[2] - 1, self.compressor.keep  # with budgets apart not known on the host
        if not apart:
            width = max(self.compressor.least, keep if isinstance(keep, int) else keep_count(record.most, keep))
        return replace(record, budget=budget, width=width)

    def _visual(self, p: Pass, layer: int, valid: Tensor, queries: int, old: Layer | None) -> Tensor:
        """[B, G, L] bool: the columns of pictures."""
        there = torch.zeros_like(valid)
        if old is not None:
            if not old.apart:
                raise PatchStateError(
                    f"{self.compressor.name} has budgets for pictures and for text, and this cache was filled when all "
                    f"columns had one, so that it does not tell them apart. Start a new conversation."
                )
            there[..., : old.visual.shape[2]] = old.visual
        rows = p.rows_at(layer)
        if p.prompts is not None and rows.visual is not None:
            there[..., valid.shape[2] - queries :] = rows.visual.to(valid.device)[:, None]
        return there

    def attended(self, p: Pass, layer: int) -> None:
        state: Cutting | None = p.state.get(self.name)
        if state is None or self.compressor.rereads or not self.watches(p, layer):
            return
        with p.timing(), torch.no_grad():
            record, found = state.held.layers[layer], state.scores.pop(layer, None)
            valid = self._valid(p, layer, record.place)
            if found is None:  # nothing to drop
                state.note(p, layer, valid, torch.arange(valid.shape[2], device=valid.device).expand_as(valid))
                return
            score, stays = found
            most = None if record.apart else record.width
            ranked = first_of_all(stays, score, record.place)
            keep = chosen(ranked, valid, record.budget, record.visual, most)
            width = int(keep.sum(2).max()) if record.apart else min(record.width, keep.shape[2])
            self._cut(p, state, layer, score, keep, width, even=True)

    def _cut(self, p: Pass, state: Cutting, layer: int, score: Tensor, keep: Tensor, width: int, even: bool) -> None:
        """Let a layer hold the columns of keep [B, G, L], at most `width`. even: all head groups hold equally many."""
        record = replace(state.held.layers[layer], before=score)
        index = kept_last(keep.flatten(0, 1), width).view(*keep.shape[:2], width)
        there = keep.gather(2, index)
        state.note(p, layer, there, index)
        if width < keep.shape[2]:
            full = p.cache.valid[layer] is None and even and (p.batch == 1 or not record.apart)
            p.cache.keep(layer, index, None if full else there[:, 0] if even else there)
            record = record.each(lambda x: x, lambda x: x.gather(2, index))
        state.held.layers[layer] = record

    # ---- behind the layers -----------------------------------------------------------------------------------------
    def finished(self, engine: Engine, module: nn.Module, p: Pass) -> None:
        state: Cutting | None = p.state.get(self.name)
        if self.watches(p, self.layers[0]):
            check_shown(self.layers, state.shown)
        if state is not None and self.compressor.moves:
            self._move_up(module, p, state.held)
        if state is None or state.answering or not self.compressor.rereads:
            return
        layers = state.held.layers
        with p.timing(), torch.no_grad():
            valid = {i: self._valid(p, i, layers[i].place) for i in self.layers}
            scores, stays = self._reread(engine, module, p, layers, valid)
            ranked = {i: first_of_all(stays[i], scores[i], layers[i].place) for i in self.layers}
            keep = self._chosen(ranked, valid, layers)
            widths = torch.stack([keep[i].sum(2).max() for i in self.layers]).tolist()
            for i in self.layers:
                self._cut(p, state, i, scores[i], keep[i], widths[i], self.compressor.even)

    def _move_up(self, module: nn.Module, p: Pass, held: Held) -> None:
        """Let the first columns stand right in front of the latest ones."""
        record = held.layers[0]
        valid = self._valid(p, 0, record.place)[:, 0]
        if record.most > valid.shape[1]:  # else nothing is gone of any row
            with p.timing(), torch.no_grad():
                gone = record.tokens - valid.sum(1)
                renumber.move_up(module, p.cache, valid, gone, held.given, self.compressor.moves)

    def _chosen(self, score: dict, valid: dict, layers: dict[int, Layer]) -> dict[int, Tensor]:
        """Layer -> [B, G, L] bool, what stays: of each layer and head group as much, or the best of all."""
        if self.compressor.even:
            return {i: chosen(score[i], valid[i], layers[i].budget, layers[i].visual) for i in self.layers}
        flat = lambda each: torch.cat([each[i].flatten(1).to(each[0].device) for i in self.layers], 1)[:, None]
        groups = valid[0].shape[1]
        budget = sum(layers[i].budget.to(valid[0].device) for i in self.layers) * groups
        visual = flat({i: layers[i].visual for i in self.layers}) if layers[0].apart else None
        keep = (
            chosen(flat(score), flat(valid), budget, visual).squeeze(1).split([valid[i][0].numel() for i in valid], 1)
        )
        return {i: keep[i].view(valid[i].shape).to(valid[i].device) for i in self.layers}

    def _reread(self, engine: Engine, module: nn.Module, p: Pass, layers: dict, valid: dict) -> tuple[dict, dict]:
        """Layer -> [B, G, L] the scores that columns of this forward get as the model repeats it, chunk by chunk; and
        layer -> [B, G, L] which stay in any case."""
        method, (batch, length, _), device = self.compressor, p.embeds.shape, p.embeds.device
        ask = module.get_input_embeddings()(torch.tensor(method.ask, dtype=torch.long, device=device))
        ask = ask.to(p.embeds.dtype).expand(batch, -1, -1)
        last = p.positions.amax(-1, keepdim=True)  # text goes on behind the largest position
        last = last.amax(0) if last.ndim == 3 else last
        padding = _padding(p)
        scores, stays = {i: layers[i].before.clone() for i in self.layers}, {}
        ragged = p.rows_at(0) is not None and p.rows_at(0).padded
        for start in range(0, length, method.chunk):
            end, lead = start + method.chunk, max(0, start - method.overlap)
            index = padding + torch.arange(lead, min(end, length), device=device)  # [B, q] each row's own chunk
            embeds = torch.cat([ask, gather(p.embeds, index.clamp(max=length - 1))], 1)
            there = torch.cat([index.new_ones(ask.shape[:2]), index < length], 1).bool()
            rows = Rows(torch.arange(embeds.shape[1], device=device).expand(batch, -1), there, ragged)
            positions = last + there.cumsum(1)
            positions = positions.expand(3, *positions.shape) if p.positions.ndim == 3 else positions

            def watch(i: int, seen: Seen, start: int = start, end: int = end) -> None:
                record, mine = layers[i], self._in_chunk(p, i, layers[i], start, end)
                sees = (mine | (record.place < method.sinks)) & valid[i]
                sees = F.pad(sees, (0, seen.query.shape[2]), value=True) & self._valid(p, i, seen.key)
                told = columns(seen, sees, record.grown(sees), i, 0)
                scores[i] = torch.where(mine, method.score(told)[..., : mine.shape[2]], scores[i])
                stays[i] = method.stays(told)[..., : mine.shape[2]]

            aside = Pass(module.config, [Watch(watch)], p.cache, *embeds.shape[:2], {0: rows}, groups=set(p.groups))
            if p.late:
                aside.late, there = p.late, p.rows[0].index.gather(1, index.clamp(max=length - 1))
                aside.late_row = F.pad(p.late_row.gather(1, there), (ask.shape[1], 0), value=-1)
            run_aside(engine, module, aside, embeds, positions)
        return scores, stays

    def _in_chunk(self, p: Pass, layer: int, record: Layer, start: int, end: int) -> Tensor:
        """[B, G, L] bool: the columns of a layer that are some of those from start to end which entered the first."""
        first = max((begin for begin in p.columns if begin <= layer), default=None)
        place = torch.arange(p.embeds.shape[1], device=record.place.device)[None]
        place = place if first is None else p.columns[first].to(place.device)
        place = place - _padding(p).to(place.device)
        mine = F.pad((place >= start) & (place < end), (record.place.shape[2] - place.shape[1], 0))
        return mine[:, None].expand_as(record.place)


def _padding(p: Pass) -> Tensor:
    """[B, 1] how many columns of padding each row has in front."""
    rows = p.rows_at(0)
    return p.embeds.new_zeros(p.batch, 1).long() if rows is None else (~rows.valid).sum(1, keepdim=True)


@dataclass
class Evicted(Part):
    """The columns of a prompt that each layer holds behind it. Those of former turns are not among them.

    positions: layer -> [B, G, K] their places in the padded input, -1 for padding and for columns of former turns.
    counts: layer -> [B, G] how many there are.
    """

    positions: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, Tensor] = field(default_factory=dict)

    def note(self, p: Pass, layer: int, there: Tensor, index: Tensor) -> None:
        """there: [B, G, K] bool, which are no padding; index: [B, G, K] of the layer's columns."""
        rows = p.rows_at(layer)
        origin = torch.arange(p.length).expand(p.batch, -1) if rows is None else rows.index  # [B, Q] of this forward's
        own = index - (p.cache.columns(layer) - origin.shape[1])
        place = origin.to(index.device)[:, None].expand(-1, index.shape[1], -1).gather(2, own.clamp(min=0))
        mine = there & (own >= 0)
        self.positions[layer] = torch.where(mine, place, -1)
        self.counts[layer] = mine.sum(2)

    def cached(self, layer: int, sample: int, tokens: float) -> float:
        return self.counts[layer][sample].float().mean().item() if layer in self.counts else tokens

    def stored(self, layer: int, sample: int, columns: float) -> float:
        return self.counts[layer][sample].max().item() if layer in self.counts else columns

    def held(self, layer: int, present: Tensor) -> Tensor:
        if layer not in self.positions:
            return present
        place = self.positions[layer].cpu()
        batch, length = present.shape
        held = torch.zeros(batch, length + 1)  # one place more, for the -1
        held.scatter_add_(1, place.flatten(1) % (length + 1), torch.ones(place.shape).flatten(1))
        return held[:, :length] / place.shape[1]

    def to_dict(self) -> dict[str, Any]:
        return {"kv_columns": {str(layer): counts.tolist() for layer, counts in self.counts.items()}}
