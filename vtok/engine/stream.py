"""One forward of the language model over a compacted sequence, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtok.compressor import Compressor
from vtok.engine import ffn
from vtok.engine.cache import OTHER_PATCH, CompressedCache, Rows, causal_mask, gather
from vtok.errors import PatchStateError, Unsupported
from vtok.types import Activations, Attention


class Stopwatch:
    """Seconds spent in `with` blocks, on the device's clock, read without waiting until asked. Compiled code, in which
    a clock cannot be read, adds none."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.laps: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            self.start = self._now()

    def __exit__(self, *exc: Any) -> None:
        if not torch.compiler.is_compiling():
            self.laps.append((self.start, self._now()))

    def seconds(self) -> float:
        if not self.cuda:
            return sum(end - start for start, end in self.laps)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.laps) / 1e3


@dataclass
class Stream:
    """One forward of the language model over a compacted sequence, or over a cache that holds one.

    rows: first layer -> the positions present from there on. `rows[0]` are what enters the first layer.
    columns: first layer -> [B, L'] the columns of `rows[0]` that are present from there on.
    """

    config: Any
    cache: CompressedCache | None
    batch: int
    length: int = 0  # S, of the input before it was compacted
    rows: dict[int, Rows] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)
    steps: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, L'] columns of its input to gather
    masks: dict[int, Any] = field(default_factory=dict)
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    late: dict[int, Tensor] = field(default_factory=dict)  # see `Adapter.late_features`
    late_row: Tensor | None = None  # [B, S] each position's row of them, -1 for text
    # what an in-LLM compressor needs
    compressor: Compressor | None = None
    # layer -> visual tokens of each sample after it, or None where the score says
    schedule: dict[int, list[int] | None] = field(default_factory=dict)
    idle: set[int] = field(default_factory=set)  # layers of the schedule after which no sample drops any
    anchor: Tensor | None = None  # [B] position
    instruction: Tensor | None = None  # [B, S] bool, see `Attention`
    instruction_counts: list[int] = field(default_factory=list)  # per sample: its row sums
    text_counts: list[int] = field(default_factory=list)  # per sample: tokens that must stay
    hidden: Tensor | None = None  # [B, L, D] what enters a layer of the schedule, until its attention was observed
    scores: dict[int, Tensor] = field(default_factory=dict)
    stopwatch: Stopwatch | None = None
    # what FFNs need
    picture: Tensor | None = None  # [B, S] which of its sample's pictures a visual token belongs to, -1 for text
    pictures: int = 0  # the most that a sample has
    core: ffn.Core | None = None
    decode: Compressor | None = None  # finds the core while the prompt passes,
    sparse_layers: frozenset[int] = frozenset()  # in these layers
    found: set[int] = field(default_factory=set)  # those where it has
    # [B] the last position that is of the prompt (-1 where a sample brings none in this forward); None: no sample does
    prompt_end: Tensor | None = None
    completed: bool = False  # whether tokens may lie behind it
    fresh: Tensor | None = None  # [B] bool, samples whose core is found anew, where others have one from a former turn

    def first(self, layer: int) -> int:
        """The first layer of the group in which `layer` is."""
        starts = self.rows if self.rows else self.cache.valid
        return max(start for start in starts if start <= layer)

    def observe(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Score the keys of a layer of the schedule; called from inside its attention, once."""
        if layer not in self.schedule or layer in self.idle or layer in self.scores:
            return
        rows = self.rows[self.first(layer)].to(key.device)
        past = key.shape[2] - query.shape[2]
        valid, visual = rows.valid, rows.visual
        column = ((rows.index == self.anchor.to(key.device)[:, None]) & rows.valid).to(torch.uint8).argmax(1)
        asked = Rows.of(self.instruction.to(key.device).gather(1, rows.index) & rows.valid, self.instruction_counts)
        instruction = torch.where(asked.valid, past + asked.index, -1)
        if past:
            held = self.cache.valid_at(layer)
            old = valid.new_ones(self.batch, past) if held is None else held[:, :past].to(key.device)
            valid, visual = torch.cat([old, valid], 1), torch.cat([torch.zeros_like(old), visual], 1)
        hidden, self.hidden = self.hidden.to(key.device), None
        told = (scaling, valid, visual, past + column, instruction, hidden, self.schedule[layer])
        with self.stopwatch, torch.no_grad():
            score = self.compressor.score(Attention(query.detach(), key.detach(), *told))
            self.scores[layer] = score[:, past:].float()

    def feed_forward(self, layer: int, mlp: nn.Module, x: Tensor, dense: Callable[[Tensor], Tensor]) -> Tensor:
        """The output of a layer's FFN for x [B, L, D]; `dense` is its own forward. The activations of the prompt are
        shown to compressors; what comes behind it goes through the core alone."""
        core = self.core
        if self.prompt_end is None:
            if core is None or layer not in core.index:
                return dense(x)
            if core.whole and not torch.is_grad_enabled():
                if self.cache.copies is None:
                    self.cache.copies = ffn.Copies(core)
                return self.cache.copies(layer, mlp, x)
            values = ffn.activations(mlp, x)
            return mlp.down_proj(ffn.silence(values, core.index[layer], core.rows.to(x.device)[:, None]))
        values = ffn.activations(mlp, x)
        rows = self.rows[self.first(layer)].to(x.device)
        with self.stopwatch, torch.no_grad():
            self._look(layer, rows, values.detach())
        if self.completed and core is not None and layer in core.index:
            behind = rows.index > self.prompt_end.to(x.device)[:, None]
            values = ffn.silence(values, core.index[layer], behind & core.rows.to(x.device)[:, None])
        return mlp.down_proj(values)

    def _look(self, layer: int, rows: Rows, values: Tensor) -> None:
        """Show a layer's activations [B, L, F] to the compressors that asked for them, once."""
        device = values.device
        picture = self.picture.to(device).gather(1, rows.index)

        def until(end: Tensor) -> Activations:
            end = end.to(device)[:, None]
            column = ((rows.index == end) & rows.valid).to(torch.uint8).argmax(1)
            return Activations(values, rows.valid & (rows.index <= end), rows.visual, picture, self.pictures, column)

        if layer in self.schedule and layer not in self.scores and "ffn" in self.compressor.needs_now:
            self.scores[layer] = self.compressor.score(until(self.anchor)).float()
        if layer in self.sparse_layers and layer not in self.found:
            index, held = self.decode.neurons(until(self.prompt_end)), self.core.index.get(layer)
            if held is not None:
                if held.shape != index.shape:
                    raise PatchStateError(OTHER_PATCH)
                index = torch.where(self.fresh.to(device)[:, None], index, held)
            self.core.index[layer] = index
            self.found.add(layer)

    def enter(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Bring a layer's input to the positions that are present there. Changes `kwargs`, which are ours."""
        if layer - 1 in self.late:
            hidden = self._add_late(layer - 1, hidden)
        if layer - 1 in self.schedule and layer not in self.rows:
            self._prune(layer)
        if layer in self.steps:
            hidden = gather(hidden, self.steps[layer])
        start = self.first(layer)
        kwargs["position_ids"] = None  # only read to find packed sequences, which gaps would look like
        if start:
            if start in self.columns:
                if start not in self.rotary:
                    self.rotary[start] = tuple(gather(x, self.columns[start]) for x in kwargs["position_embeddings"])
                kwargs["position_embeddings"] = self.rotary[start]
            if start not in self.masks:
                self.masks[start] = self._mask(start, hidden)
            mask = self.masks[start]
            kwargs["attention_mask"] = mask.to(hidden.device) if isinstance(mask, Tensor) else mask
        if layer in self.schedule and layer not in self.scores:
            self.hidden = hidden.detach()
        return hidden

    def _add_late(self, layer: int, hidden: Tensor) -> Tensor:
        """The output of `layer`, [B, L, D], plus the late features of the visual tokens that are present there."""
        rows = self.rows[self.first(layer)].index
        row = self.late_row.gather(1, rows).to(hidden.device)[..., None]  # [B, L, 1]
        features = self.late[layer].to(hidden.device, hidden.dtype)
        return torch.where(row >= 0, hidden + features[row.squeeze(2).clamp(min=0)], hidden)

    def _mask(self, start: int, hidden: Tensor) -> Any:
        rows = self.rows.get(start)
        new = rows.valid if rows is not None and rows.padded else None
        if self.cache is not None:
            valid = self.cache.extend(start, new, self.batch, hidden.shape[1], hidden.device)
        else:
            valid = new
        return causal_mask(self.config, hidden, valid, self.cache, start)

    def _prune(self, layer: int) -> None:
        """Decide what is present from `layer` on, by the score that the layer before gave."""
        before, previous = self.rows[max(self.rows)], max(self.columns, default=0)
        if layer - 1 in self.idle:  # a group of its own all the same: a later turn on the cache may drop here
            self.rows[layer] = before
            if previous:
                self.columns[layer], self.rotary[layer] = self.columns[previous], self.rotary[previous]
            return
        if layer - 1 not in self.scores:
            raise Unsupported(
                f"Decoder layer {layer - 1} was not observed: its attention does not go through transformers' "
                f"registry. Load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2', then patch."
            )
        with self.stopwatch, torch.no_grad():
            budget = self.schedule[layer - 1]
            device = before.index.device
            visual = before.visual  # [B, L]
            score = self.scores[layer - 1].to(device).nan_to_num(-torch.inf).masked_fill(~visual, -torch.inf)
            if budget is None:  # as many as the score says: a wait for the device
                budget = (score > 0).sum(1).tolist()
            order = score.argsort(dim=1, descending=True, stable=True)
            place = torch.arange(order.shape[1], device=device).expand_as(order)
            rank = torch.empty_like(order).scatter_(1, order, place)
            kept = visual & (rank < torch.tensor(budget, device=device)[:, None])
            lengths = [text + n for text, n in zip(self.text_counts, budget)]
            self.rows[layer], step = before.narrow(kept | ~visual, lengths)
            self.steps[layer] = step
            self.columns[layer] = self.columns[previous].gather(1, step) if previous else step
