"""In attention: tokens attend to some of the cache's columns, of which none is dropped."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtok.compressor import Compressor
from vtok.engine.cache import State, take
from vtok.engine.decoder import Pass, Reads, Seen
from vtok.engine.prefill import Prefill
from vtok.engine.probe import check_shown
from vtok.engine.trace import Part
from vtok.errors import Unsupported
from vtok.kernels.compact_sequence import kept_last
from vtok.stages.stage import Site, Stage

if TYPE_CHECKING:
    from vtok.engine.forward import Engine

MASKED = ("sdpa", "eager")  # attention implementations that take a 4-D mask


@dataclass(frozen=True, kw_only=True)
class Attend(Compressor):
    """A method that says to which columns of the cache a token of the answer attends; and, where it has a `chunk`, so
    many tokens of the prompt together. Else the prompt is read whole.

    keep: of the columns, how many are chosen: a fraction or a count.
    """

    stage = "attend"
    needs = frozenset({"attention"})
    text_guided = True
    of_pictures = False
    chunk: int | None = None

    @abstractmethod
    def most(self, length: float) -> int:
        """To how many of so many columns a token attends at most."""

    @abstractmethod
    def select(self, seen: Seen, valid: Tensor, before: tuple | None) -> tuple[Tensor | None, int, tuple | None]:
        """[B, L] bool, the columns of one layer to which the token attends, None for all; how many a row has at most;
        and tensors [B, ...] that the method wants to be given as `before` in this layer for the next token, or None.

        seen: of one token, its column the last; or of a chunk's mean query, and the columns before it. valid: [B, L]
        bool, which columns are no padding."""


@dataclass(frozen=True)
class Attended(Part):
    compressor: Attend

    def attended(self, layer: int, sample: int, columns: float) -> float:
        return min(columns, self.compressor.most(columns))


@dataclass
class Chosen(State):
    """What the stage keeps for a sequence: layer -> what `select` wants to be given again."""

    before: dict[int, tuple] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Chosen:
        return Chosen({i: tuple(map(change, each)) for i, each in self.before.items()})


@dataclass
class Attending:
    """What it keeps for one forward. shown: the layers whose attention was."""

    held: Chosen
    shown: set[int] = field(default_factory=set)


class AttendStage(Stage[Attend]):
    name = "attend"
    in_layers = on_text = True
    compiles = False

    def __init__(self, compressor: Attend, site: Site) -> None:
        super().__init__(compressor, site)
        self.layers = range(len(site.layers))

    def begin(self, prefill: Prefill, p: Pass) -> None:
        self.resume(p, prefill.positions)
        p.parts[self.name] = Attended(self.compressor)

    def resume(self, p: Pass, positions: Tensor) -> Tensor:
        seen = 0 if p.cache is None else p.cache.seen
        answering = p.told.answers(seen, p.length, self.compressor.name, one_by_one=True)
        if p.cache is not None:
            state = p.cache.states.setdefault(self.name, Chosen())
            if not answering:
                state.before.clear()
            if answering or self.compressor.chunk is not None:
                p.state[self.name] = Attending(state)
        return positions

    def watches(self, p: Pass, layer: int) -> bool:
        return self.name in p.state

    def attention(self, p: Pass, layer: int, seen: Seen) -> list[Reads] | None:
        state: Attending | None = p.state.get(self.name)
        if state is None:
            return None
        state.shown.add(layer)
        valid = p.cache.valid_at(layer)
        if valid is None:
            valid = torch.ones(len(seen.key), seen.key.shape[2], dtype=torch.bool, device=seen.key.device)
        elif valid.ndim == 3:  # head groups hold unlike many columns, and some stand for nothing in some of them
            valid = valid.any(1)
        valid = valid.to(seen.key.device)
        with torch.no_grad():
            if seen.query.shape[2] > 1:
                return self._by_chunks(p, seen, valid)
            chosen, most, again = self.compressor.select(seen, valid, state.held.before.get(layer))
        if chosen is None:
            return None
        if again is not None:
            state.held.before[layer] = again
        index = kept_last(chosen, most)
        return [(seen.query, *_columns(seen, index), _of_columns(seen.mask, index, chosen))]

    def finished(self, engine: Engine, module: nn.Module, p: Pass) -> None:
        if (state := p.state.get(self.name)) is not None:
            check_shown(self.layers, state.shown)

    def _by_chunks(self, p: Pass, seen: Seen, valid: Tensor) -> list[Reads] | None:
        """What the chunks of a prompt read: themselves, and what their mean query chooses of all before them, or all of
        that where it is no more."""
        length, new, size = seen.key.shape[2], seen.query.shape[2], self.compressor.chunk
        past, found = length - new, {}
        for end in range(length, past, -size):  # from the prompt's end on, so that padding changes nothing
            start = max(past, end - size)
            query, own = seen.query[:, :, start - past : end - past], valid[:, None, start:end, None]
            mean = (query.float() * own).sum(2, keepdim=True) / own.sum(2, keepdim=True).clamp(min=1)
            before = Seen(mean, seen.key[:, :, :start], seen.value[:, :, :start], None, seen.scaling)
            chosen, most, _ = self.compressor.select(before, valid[:, :start], None) if start else (None, 0, None)
            found[start, end] = (valid[:, :start], start) if chosen is None else (chosen, most)
        if all(most == start for (start, _), (_, most) in found.items()):
            return None
        if p.config._attn_implementation not in MASKED:
            raise Unsupported(
                f"{self.compressor.name}(chunk={size}) needs a mask that {p.config._attn_implementation} does not "
                f"take: load the model with attn_implementation='sdpa'."
            )
        return [_reads(seen, *columns, *chosen, valid) for columns, chosen in sorted(found.items(), key=lambda x: x[0])]


def _reads(seen: Seen, start: int, end: int, chosen: Tensor, most: int, valid: Tensor) -> Reads:
    """What the queries of columns `start` to `end` read: of the columns before them those that are chosen [B, start],
    `most` of a row, and of themselves those that are not behind them. valid: [B, L] bool."""
    index, first = kept_last(chosen, most), seen.key.shape[2] - seen.query.shape[2]
    own = torch.arange(start, end, device=index.device).expand(len(index), -1)
    causal = torch.ones(end - start, end - start, dtype=torch.bool, device=index.device).tril()
    there = chosen.gather(1, index)[:, None].expand(-1, end - start, -1)
    visible = torch.cat([there, causal & valid[:, None, start:end]], 2)
    mask = torch.zeros(visible.shape, dtype=seen.query.dtype, device=index.device)
    mask = mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)[:, None]
    return seen.query[:, :, start - first : end - first], *_columns(seen, torch.cat([index, own], 1)), mask


def _columns(seen: Seen, index: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of columns index [B, K]."""
    at = index[:, None].expand(-1, seen.key.shape[1], -1)
    return take(seen.key, at), take(seen.value, at)


def _of_columns(mask: Any, index: Tensor, chosen: Tensor) -> Any:
    """The part of a mask [B, L] or [B, 1 or H, 1, L] that belongs to columns index [B, K], if chosen [B, L]. Without a
    mask no row has padding, and all have chosen equally many."""
    if not isinstance(mask, Tensor):
        return mask
    there = chosen.gather(1, index)
    if mask.ndim == 2:
        return mask.gather(1, index) * there.to(mask.dtype)
    mask = mask.expand(len(index), -1, -1, -1)
    mask = mask.gather(3, index[:, None, None].expand(-1, mask.shape[1], 1, -1))
    no = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~there[:, None, None], no)
