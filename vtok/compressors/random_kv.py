"""Baseline: columns of the cache drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.engine.columns import Columns, uniform
from vtok.stages.kv import KV


@dataclass(frozen=True, kw_only=True)
class RandomKV(KV):
    """Keep columns of the prompt drawn without replacement, for each layer and head group, and what is answered.

    seed: the draw depends on it, and on the layer, the head group and the column's place in its row alone.
    Differs from the paper: there is none; a baseline.
    """

    name = "random_kv"
    paper = "baseline"
    by_grid = True
    text_guided = False

    seed: int = 0

    def score(self, seen: Columns) -> Tensor:
        group = torch.arange(seen.valid.shape[1], device=seen.valid.device)[:, None] + (seen.layer << 12)
        return uniform(self.seed, seen.place + (group << 32))
