"""In attention, while answering: a token attends to some of the cache's columns, of which none is dropped."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtok.compressor import Compressor
from vtok.engine.cache import take
from vtok.engine.decoder import Pass, Seen
from vtok.engine.prefill import Prefill
from vtok.engine.trace import Part
from vtok.kernels.compact_sequence import kept_last
from vtok.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Attend(Compressor):
    """A method that says to which columns of the cache a token of the answer attends. The prompt is read whole.

    keep: of the columns, how many are chosen: a fraction or a count.
    """

    stage = "attend"
    needs = frozenset({"attention"})
    text_guided = True
    of_pictures = False

    @abstractmethod
    def most(self, length: float) -> int:
        """To how many of so many columns a token attends at most."""

    @abstractmethod
    def select(self, seen: Seen, valid: Tensor, before: tuple | None) -> tuple[Tensor | None, int, tuple | None]:
        """[B, L] bool, the columns of one layer to which the token attends, None for all; how many a row has at most;
        and tensors [B, ...] that the method wants to be given as `before` in this layer for the next token, or None.

        seen: of one token, its column the last. valid: [B, L] bool, which columns are no padding."""


@dataclass(frozen=True)
class Attended(Part):
    compressor: Attend

    def attended(self, layer: int, sample: int, columns: float) -> float:
        return min(columns, self.compressor.most(columns))


@dataclass
class Chosen:
    """What the stage keeps for a sequence: layer -> what `select` wants to be given again."""

    before: dict[int, tuple] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Chosen:
        return Chosen({i: tuple(map(change, each)) for i, each in self.before.items()})


class AttendStage(Stage[Attend]):
    name = "attend"
    in_layers = on_text = True
    compiles = False

    def begin(self, prefill: Prefill, p: Pass) -> None:
        self.resume(p, prefill.positions)
        p.parts[self.name] = Attended(self.compressor)

    def resume(self, p: Pass, positions: Tensor) -> Tensor:
        seen = 0 if p.cache is None else p.cache.seen
        answering = p.told.answers(seen, p.length, self.compressor.name, one_by_one=True)
        if p.cache is not None:
            p.cache.states.setdefault(self.name, Chosen())
            if answering:
                p.state[self.name] = p.cache.states[self.name]
            else:
                p.cache.states[self.name].before.clear()
        return positions

    def watches(self, p: Pass, layer: int) -> bool:
        return self.name in p.state

    def attention(self, p: Pass, layer: int, seen: Seen) -> tuple[Tensor, Tensor, Any] | None:
        state: Chosen | None = p.state.get(self.name)
        if state is None:
            return None
        valid = p.cache.valid_at(layer)
        if valid is None:
            valid = torch.ones(len(seen.key), seen.key.shape[2], dtype=torch.bool, device=seen.key.device)
        elif valid.ndim == 3:  # head groups hold unlike many columns, and some stand for nothing in some of them
            valid = valid.any(1)
        with torch.no_grad():
            chosen, most, again = self.compressor.select(seen, valid.to(seen.key.device), state.before.get(layer))
        if chosen is None:
            return None
        if again is not None:
            state.before[layer] = again
        index = kept_last(chosen, most)
        at = index[:, None].expand(-1, seen.key.shape[1], -1)
        return take(seen.key, at), take(seen.value, at), _of_columns(seen.mask, index, chosen)


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
