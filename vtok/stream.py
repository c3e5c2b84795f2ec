"""One forward of the language model over a compacted sequence, layer by layer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtok.compressor import Compressor
from vtok.errors import Unsupported
from vtok.selection import Attention
from vtok.sequence import CompressedCache, Rows, causal_mask, gather


class Stopwatch:
    """Seconds spent in `with` blocks, on the device's clock, read without waiting until asked."""

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
        self.start = self._now()

    def __exit__(self, *exc: Any) -> None:
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
    rows: dict[int, Rows] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)
    steps: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, L'] columns of its input to gather
    masks: dict[int, Any] = field(default_factory=dict)
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # what an in-LLM compressor needs
    compressor: Compressor | None = None
    schedule: dict[int, float | int] = field(default_factory=dict)
    visual: Tensor | None = None  # [B, S] bool, visual tokens that may go
    anchor: Tensor | None = None  # [B] position
    text_counts: list[int] = field(default_factory=list)  # per sample: tokens that must stay
    visual_counts: list[int] = field(default_factory=list)  # per sample: visual tokens that entered
    image_counts: list[int] = field(default_factory=list)  # per sample: pictures
    scores: dict[int, Tensor] = field(default_factory=dict)
    stopwatch: Stopwatch | None = None

    def first(self, layer: int) -> int:
        """The first layer of the group in which `layer` is."""
        starts = self.rows if self.rows else self.cache.valid
        return max(start for start in starts if start <= layer)

    @torch.compiler.disable
    def observe(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Score the keys of a layer of the schedule; called from inside its attention, once."""
        if layer not in self.schedule or layer in self.scores:
            return
        rows = self.rows[self.first(layer)].to(key.device)
        past = key.shape[2] - query.shape[2]
        valid, visual = rows.valid, self.visual.to(key.device).gather(1, rows.index) & rows.valid
        column = ((rows.index == self.anchor.to(key.device)[:, None]) & rows.valid).to(torch.uint8).argmax(1)
        if past:
            held = self.cache.valid_at(layer)
            old = valid.new_ones(self.batch, past) if held is None else held[:, :past].to(key.device)
            valid, visual = torch.cat([old, valid], 1), torch.cat([torch.zeros_like(old), visual], 1)
        with self.stopwatch, torch.no_grad():
            score = self.compressor.score(
                Attention(query.detach(), key.detach(), scaling, valid, visual, past + column)
            )
            self.scores[layer] = score[:, past:].float()

    def enter(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Bring a layer's input to the positions that are present there. Changes `kwargs`, which are ours."""
        if layer - 1 in self.schedule and layer not in self.rows:
            self._prune(layer)
        if layer in self.steps:
            hidden = gather(hidden, self.steps[layer])
        start = self.first(layer)
        kwargs["position_ids"] = None  # only read to find packed sequences, which gaps would look like
        if start:
            if start in self.columns:
                if start not in self.rotary:
                    self.rotary[start] = tuple(
                        gather(x, self.columns[start]) for x in kwargs["position_embeddings"]
                    )
                kwargs["position_embeddings"] = self.rotary[start]
            if start not in self.masks:
                self.masks[start] = self._mask(start, hidden)
            mask = self.masks[start]
            kwargs["attention_mask"] = mask.to(hidden.device) if isinstance(mask, Tensor) else mask
        return hidden

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
        before = self.rows[max(self.rows)]
        if layer - 1 not in self.scores:
            raise Unsupported(
                f"Decoder layer {layer - 1} was not observed: its attention does not go through transformers' "
                f"registry. Load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2', then patch."
            )
        with self.stopwatch, torch.no_grad():
            keep = self.schedule[layer - 1]
            budget = [
                min(n, keep * images) if isinstance(keep, int) else min(n, int(n * keep + 1e-9))
                for n, images in zip(self.visual_counts, self.image_counts)
            ]
            device = before.index.device
            visual = self.visual.gather(1, before.index) & before.valid  # [B, L]
            score = self.scores[layer - 1].to(device).nan_to_num(-torch.inf).masked_fill(~visual, -torch.inf)
            order = score.argsort(dim=1, descending=True, stable=True)
            place = torch.arange(order.shape[1], device=device).expand_as(order)
            rank = torch.empty_like(order).scatter_(1, order, place)
            kept = visual & (rank < torch.tensor(budget, device=device)[:, None])
            lengths = [text + n for text, n in zip(self.text_counts, budget)]
            self.rows[layer], step = before.narrow(kept | ~visual, lengths)
            self.steps[layer] = step
            previous = self.columns.get(max(self.columns, default=0))
            self.columns[layer] = step if previous is None else previous.gather(1, step)
