"""One forward of the language model over a compacted sequence, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtok.engine.cache import CompressedCache, Rows, causal_mask, gather
from vtok.engine.prompt import Prompts, Told
from vtok.engine.stopwatch import Stopwatch

if TYPE_CHECKING:
    from vtok.engine.trace import Part
    from vtok.stages.stage import Stage


@dataclass(frozen=True)
class Seen:
    """What passes through one layer's attention, after RoPE.

    query: [B, H, Q, d]. key, value: [B, G, L, d], the cached columns first. mask: as the attention is given it.
    scaling: multiplies the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float


Reads = tuple[Tensor, Tensor, Tensor, Any]  # some queries, and the keys, values and mask that they read


@dataclass
class Pass:
    """One forward of the language model over a compacted sequence, or over a cache that holds one.

    rows: first layer -> the positions present from there on. `rows[0]` are what enters the first layer.
    columns: first layer -> [B, L'] the columns of `rows[0]` that are present from there on.
    groups: the first layers of runs of layers that hold the same columns, of this forward and of the cache.
    prompts: where a forward that brings pictures says its prompts end; None for one that brings none.
    state: stage -> what it keeps for this forward. parts: what the trace is told by stages that act in it.
    told: what the forward is told about its prompts. embeds, positions: what enters the first layer.
    """

    config: Any
    stages: Sequence[Stage]
    cache: CompressedCache | None
    batch: int
    length: int  # S, of the input before it was compacted
    rows: dict[int, Rows] = field(default_factory=dict)
    prompts: Prompts | None = None
    groups: set[int] = field(default_factory=lambda: {0})
    state: dict[str, Any] = field(default_factory=dict)
    stopwatch: Stopwatch | None = None
    columns: dict[int, Tensor] = field(default_factory=dict)
    steps: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, L'] columns of its input to gather
    mask: tuple[int, Any] | None = None  # of the group that runs now, by its first layer: those of all would add up
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    told: Told = field(default_factory=Told)
    embeds: Tensor | None = None
    positions: Tensor | None = None
    late: dict[int, Tensor] = field(default_factory=dict)  # see `Adapter.late_features`
    late_row: Tensor | None = None  # [B, S] each position's row of them, -1 for text
    blocks: Tensor | None = None  # [B, L], of what enters the first layer, see `Adapter.blocks`
    tree: Tensor | None = None  # [S, S] bool, which of its tokens see which, where they are drafts in a tree

    def timing(self) -> AbstractContextManager:
        """Within, what stages do is timed, where the forward brings a prompt that has a clock."""
        return nullcontext() if self.stopwatch is None else self.stopwatch

    def group(self, layer: int) -> int:
        """The first layer of the run in which `layer` is."""
        return max(start for start in self.groups if start <= layer)

    def rows_at(self, layer: int) -> Rows | None:
        """The positions present at a layer; None where no token of this forward was left out or padded."""
        starts = [start for start in self.rows if start <= layer]
        return self.rows[max(starts)] if starts else None

    def narrow(self, layer: int, kept: Tensor | None, lengths: list[int]) -> None:
        """From `layer` on only some of the tokens present before it are there. Called before it, once.

        kept: [B, L] bool, of those present before; None for all. lengths: its row sums."""
        before, previous = self.rows[max(self.rows)], max(self.columns, default=0)
        if kept is None:
            self.rows[layer] = before
            if previous:
                self.columns[layer], self.rotary[layer] = self.columns[previous], self.rotary[previous]
            return
        self.rows[layer], step = before.narrow(kept, lengths)
        self.steps[layer] = step
        self.columns[layer] = self.columns[previous].gather(1, step) if previous else step

    def enter(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Bring a layer's input to the positions that are present there. Changes `kwargs`, which are ours."""
        if layer - 1 in self.late:
            hidden = self._add_late(layer - 1, hidden)
        for stage in self.stages:
            hidden = stage.before_layer(self, layer, hidden)
        if layer in self.steps:
            hidden = gather(hidden, self.steps[layer])
        start = self.group(layer)
        kwargs["position_ids"] = None  # only read to find packed sequences, which gaps would look like
        if start:
            self._fit(start, layer, hidden, kwargs)
        for stage in self.stages:
            stage.entering(self, layer, hidden)
        return hidden

    def observe(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float) -> list[Reads]:
        """What a layer's attention is to work with; called from inside it, once."""
        parts = [(query, key, value, mask)]
        for stage in self.stages:
            parts = stage.attention(self, layer, Seen(query, key, value, mask, scaling)) or parts
        return parts

    def attended(self, layer: int) -> None:
        """A layer's attention is done."""
        for stage in self.stages:
            stage.attended(self, layer)

    def _fit(self, start: int, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Rotary tables and mask of a group behind the first."""
        first = max((s for s in self.columns if s <= layer), default=None)
        if first is not None:
            if first not in self.rotary:
                self.rotary[first] = tuple(gather(x, self.columns[first]) for x in kwargs["position_embeddings"])
            kwargs["position_embeddings"] = self.rotary[first]
        if self.mask is None or self.mask[0] != start:
            self.mask = start, self._mask(start, hidden)
        mask = self.mask[1]
        kwargs["attention_mask"] = mask.to(hidden.device) if isinstance(mask, Tensor) else mask

    def _add_late(self, layer: int, hidden: Tensor) -> Tensor:
        """The output of `layer`, [B, L, D], plus the late features of the visual tokens that are present there."""
        row = self.late_row.gather(1, self.rows_at(layer).index).to(hidden.device)[..., None]  # [B, L, 1]
        features = self.late[layer].to(hidden.device, hidden.dtype)
        return torch.where(row >= 0, hidden + features[row.squeeze(2).clamp(min=0)], hidden)

    def _mask(self, start: int, hidden: Tensor) -> Any:
        rows = self.rows_at(start)
        new = rows.valid if rows is not None and rows.padded else None
        if self.cache is not None:
            valid = self.cache.extend(start, new, self.batch, hidden.shape[1], hidden.device)
        else:
            valid = new
        return causal_mask(self.config, hidden, valid, self.cache, start, self.tree)

    def restore(self, output: Any) -> Any:
        """The language model's output at the input's length."""
        if not self.rows:
            return output
        rows = self.rows[max(self.rows)]
        output.last_hidden_state = rows.restore(output.last_hidden_state, self.length)
        if output.hidden_states is not None:  # the i-th is what layer i-1 gave; the last is normalised
            states = [
                None if h is None else self.rows_at(max(0, i - 1)).restore(h, self.length)
                for i, h in enumerate(output.hidden_states[:-1])
            ]
            output.hidden_states = (*states, output.last_hidden_state)
        return output


class Carried:
    """A pass in the keywords of modules. FSDP copies each dataclass that it finds there; this is none."""

    def __init__(self, running: Pass) -> None:
        self.running = running
