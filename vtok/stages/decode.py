"""Behind the prompt: text goes through a part of the decoder's FFN neurons, those that the prompt used."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vtok.compressor import Compressor
from vtok.engine import ffn
from vtok.engine.cache import OTHER_PATCH, CompressedCache, Rows, State
from vtok.engine.decoder import Pass
from vtok.engine.ffn import Core, Visit
from vtok.engine.prefill import Prefill
from vtok.engine.trace import Part
from vtok.errors import PatchStateError
from vtok.stages.llm import activations_until
from vtok.stages.stage import Site, Stage
from vtok.types import Activations


@dataclass(frozen=True, kw_only=True)
class Decode(Compressor):
    """A method that decodes with some of the FFN neurons."""

    stage = "decode"
    text_guided = True
    several_turns = False
    min_tokens: ClassVar[int] = 1  # a shorter prompt, in tokens that enter the language model, stays dense

    @property
    def reads_prompt_end(self) -> bool:
        return True

    @abstractmethod
    def sparse_layers(self, n_layers: int) -> range:
        """The decoder layers in which text behind the prompt goes through some neurons of the FFN alone."""

    @abstractmethod
    def neurons(self, activations: Activations) -> Tensor:
        """[B, K] long, ascending: those neurons, for one of these layers."""


@dataclass(frozen=True)
class CoreOf(State):
    """The core of a sequence, in its cache. copies: of its neurons' weights, once used."""

    core: Core
    copies: list[ffn.Copies] = field(default_factory=list)

    def map(self, change: Callable[[Tensor], Tensor]) -> CoreOf:
        core = self.core.map(change)  # beams move within a prompt, and copies stay true
        return CoreOf(core, self.copies if self.copies and core.same(self.core) else [])


@dataclass
class Finding:
    """What the stage keeps for one forward that brings pictures.

    held: filled while the prompt passes. found: the layers where it was. end: [B] the last position of the prompt, -1
    where a sample brings no picture. completed: whether tokens may lie behind it. fresh: [B] bool, samples whose core
    is found anew, where others have one from a former turn; None where all are.
    """

    held: CoreOf
    pictures: Tensor
    most: int
    end: Tensor
    completed: bool
    fresh: Tensor | None = None
    found: set[int] = field(default_factory=set)
    replayed: Sequence[Mapping[int, Tensor]] | None = None  # of each sample layer -> [K], where that is recorded


class DecodeStage(Stage[Decode]):
    name = "decode"
    in_layers = behind_prompt = True

    def __init__(self, compressor: Decode, site: Site) -> None:
        super().__init__(compressor, site)
        self.layers = frozenset(compressor.sparse_layers(len(site.layers)))
        ffn.check_all(site.layers, compressor.name, copies=True)

    def ffn_layers(self) -> Iterable[int]:
        return self.layers

    def count(self, prefill: Prefill, keep: Tensor, droppable: Tensor) -> None:
        place, end = torch.arange(prefill.length, device=prefill.device), prefill.prompts.ends[:, 0]
        prefill.ask("prompt", (keep & (place <= end[:, None])).sum(1))
        prefill.state[self.name] = []  # where the trace will find the core

    def begin(self, prefill: Prefill, p: Pass) -> None:
        told, device = prefill.told, prefill.device
        brings = [b in told["owners"] for b in range(p.batch)]
        flags = [yes and n >= self.compressor.min_tokens for yes, n in zip(brings, told["prompt"])]
        rows, fresh = (torch.tensor(values, device=device) for values in (flags, brings))
        end, completed, core = prefill.prompts.ends[:, 0], prefill.prompts.completed, Core(rows, all(flags))
        held = self._held(p.cache)
        if held is not None:  # a sample without a new picture goes on with what it has: all its tokens are behind
            old = held.core
            whole = all(flag or (old.whole and not new) for flag, new in zip(flags, brings))
            core = Core(torch.where(fresh, rows, old.rows.to(device)), whole, dict(old.index))
            end, completed = torch.where(fresh, end, -1), completed or not all(brings)
        kept = CoreOf(core)
        state = Finding(kept, *prefill.picture_of_token(), end, completed, fresh if held else None)
        if prefill.replay is not None:
            state.replayed = [sample.parts.get(self.name) or {} for sample in prefill.replay.samples]
        p.state[self.name] = state
        prefill.state[self.name].append(core)
        if p.cache is not None:
            p.cache.states[self.name] = kept

    def resume(self, p: Pass, positions: Tensor) -> Tensor:
        self._held(p.cache)
        return positions

    def _held(self, cache: CompressedCache | None) -> CoreOf | None:
        """What a cache holds of this stage. Raises `PatchStateError` where that is of other layers."""
        held = cache.states.get(self.name) if cache is not None else None
        if held is not None and held.core.index.keys() != self.layers:
            raise PatchStateError(OTHER_PATCH)
        return held

    def feed_forward(self, p: Pass, visit: Visit) -> None:
        state: Finding | None = p.state.get(self.name)
        if state is None:
            self._behind(p, visit)
        elif visit.layer in self.layers:
            self._passing(p, state, visit)

    def _behind(self, p: Pass, visit: Visit) -> None:
        """Text behind the prompt goes through its core."""
        held: CoreOf | None = p.cache.states.get(self.name) if p.cache is not None else None
        if held is None or visit.layer not in held.core.index:
            return
        core = held.core
        if core.whole and not torch.is_grad_enabled():
            if not held.copies:
                held.copies.append(ffn.Copies(core))
            visit.output = held.copies[0](visit.layer, visit.mlp, visit.x)
            return
        visit.values = ffn.silence(visit.values, core.index[visit.layer], core.rows.to(visit.x.device)[:, None])

    def _passing(self, p: Pass, state: Finding, visit: Visit) -> None:
        """The prompt's core is found; what comes behind it in this forward goes through it."""
        core, layer = state.held.core, visit.layer
        rows = p.rows_at(layer).to(visit.x.device)
        values = visit.values
        if layer not in state.found:
            with p.stopwatch, torch.no_grad():
                index, old = self._core(p, state, layer, values.detach(), rows), core.index.get(layer)
                if old is not None:
                    if old.shape != index.shape:
                        raise PatchStateError(OTHER_PATCH)
                    index = torch.where(state.fresh.to(index.device)[:, None], index, old)
                core.index[layer] = index
                state.found.add(layer)
        if state.completed:
            behind = rows.index > state.end.to(visit.x.device)[:, None]
            visit.values = ffn.silence(values, core.index[layer], behind & core.rows.to(visit.x.device)[:, None])

    def _core(self, p: Pass, state: Finding, layer: int, values: Tensor, rows: Rows) -> Tensor:
        """[B, K] the neurons of each sample's core: found in the prompt's activations, or as recorded."""
        if state.replayed is None:
            return self.compressor.neurons(activations_until(state.end, values, rows, state.pictures, state.most))
        known = [sample[layer] for sample in state.replayed if layer in sample]
        if not known:  # samples without a core, whose rows are not read
            return torch.zeros(p.batch, 0, dtype=torch.long, device=values.device)
        return torch.stack([sample.get(layer, known[0]) for sample in state.replayed]).to(values.device)

    def part(self, prefill: Prefill) -> Part:
        return Sparse(prefill.state[self.name])


@dataclass(frozen=True)
class Sparse(Part):
    """of: holds the core, once the language model runs."""

    of: list[Core]

    @property
    def core(self) -> Core:
        """The neurons that text behind the prompt goes through."""
        return self.of[0]

    def neurons(self) -> dict[int, int]:
        if not self.of or not self.of[0].whole:
            return {}
        return {layer: index.shape[1] for layer, index in self.of[0].index.items()}

    def recorded(self, sample: int, pictures: Sequence[int]) -> dict[int, Tensor]:
        if not self.of or not bool(self.core.rows[sample]):
            return {}
        return {layer: index[sample].cpu() for layer, index in self.core.index.items()}

    def prompts(self) -> int:
        return len(self.core.rows) // self.core.repeats()
