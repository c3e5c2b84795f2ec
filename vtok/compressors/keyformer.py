"""Keyformer: heavy hitters by attention with Gumbel noise and a rising temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtok.engine.columns import Columns, uniform
from vtok.errors import InvalidValue
from vtok.options import AtLeast1, In, Keep, Part, Positive
from vtok.stages.kv import KV

BLOCK = 64  # queries whose rows are in memory at a time


@dataclass(frozen=True, kw_only=True)
class Keyformer(KV):
    """Score: softmax((x + z) / tau) of the logits x, z Gumbel noise, summed over all queries so far and the heads of a
    group (Section 3). tau rises in a line from the prompt, `tau`, to the answer's token number `steps`, `tau_end`.
    While answering, each new column pushes out the one with the lowest score. Attention itself has no noise.

    recent: how much of the budget are the latest columns, a fraction.
    tau, tau_end: temperatures, tau_end no lower.
    steps: tokens of the answer over which the temperature rises; the official script's step is 0.01.
    noise: scale of the Gumbel noise, 0 for none.
    seed: the noise depends on it, and on the layer, the head, and the places of query and column alone.
    Differs from the paper: scores are added up within the heads that share keys; a cache shrinks in each step, not in
        each eighth.
    Not good for: budgets below half of the cache, by the paper's own tables.
    """

    name = "keyformer"
    paper = "Keyformer: KV Cache Reduction through Key Tokens Selection, arXiv 2403.09054"
    bounded = True
    examples = ({}, {"keep": 6, "noise": 0.0})

    keep: Keep = 0.6
    recent: Part = 0.3
    tau: Positive = 1.0
    tau_end: Positive = 2.0
    steps: AtLeast1 = 100
    noise: Annotated[float, In(">= 0")] = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau_end < self.tau:
            raise InvalidValue(f"tau_end must be at least tau, {self.tau}, got {self.tau_end}.")

    def temperature(self, step: int) -> float:
        """tau at the answer's token number `step`, 0 for the prompt."""
        return self.tau + min(step, self.steps) * (self.tau_end - self.tau) / self.steps

    def score(self, seen: Columns) -> Tensor:
        query, key, rows, valid = seen.apart
        place, new = seen.place.flatten(0, 1), seen.rows.shape[1]
        tau, total = self.temperature(seen.step), torch.zeros(valid.shape, device=key.device)
        past, key = valid.shape[1] - new, key.float().transpose(2, 3)
        for start in range(0, new, BLOCK):
            part = rows[:, start : start + BLOCK]  # [B * G, r]
            end = past + start + part.shape[1]  # no row of the block sees a column behind
            x = query[:, :, start : start + BLOCK].float() @ key[..., :end] * seen.scaling
            if self.noise:
                x += self._gumbel(seen, place[:, past + start : end], place[:, :end]).mul_(self.noise)
            columns = torch.arange(end, device=key.device)
            visible = valid[:, None, :end] & (columns <= part[..., None])  # [B * G, r, end]
            weights = x.div_(tau).masked_fill_(~visible[:, None], torch.finfo(torch.float32).min).softmax(-1)
            total[:, :end] += weights.masked_fill_((part < 0)[:, None, :, None], 0.0).sum((1, 2))
        return seen.before + total.view(seen.valid.shape)

    def _gumbel(self, seen: Columns, queries: Tensor, columns: Tensor) -> Tensor:
        """[B * G, H / G, r, L] for places queries [B * G, r] and columns [B * G, L]."""
        heads, device = seen.query.shape[1], columns.device
        head = torch.arange(heads, device=device).view(seen.key.shape[1], -1).repeat(len(seen.key), 1)  # [B * G, H / G]
        at = (queries[:, None, :, None] << 21) + columns[:, None, None]
        u = uniform(self.seed, at + ((head + seen.layer * heads) << 42)[..., None, None])
        return u.log_().neg_().log_().neg_()

    def stays(self, seen: Columns) -> Tensor:
        return seen.recent(self.recent)
