"""SparseVLM: the words of the question that the picture answers to rate the visual tokens, at three decoder layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from vtok.density import clusters
from vtok.engine.cache import gather
from vtok.errors import InvalidValue
from vtok.kernels.attention_column_sums import BLOCK, attention_column_sums
from vtok.kernels.attention_rows import attention_rows
from vtok.options import Fraction, Share
from vtok.search import schedules
from vtok.stages.llm import InLLM
from vtok.types import Attention, Entered

LAYERS = (2 / 32, 6 / 32, 15 / 32)  # of the depth, behind which tokens are dropped
PART, CLUSTER = 0.3, 10  # of the tokens that go, how many are recycled; how many of these a cluster has
MARGIN = 1e-6  # by which a rater must be above the mean: words of equal weight are all raters, whatever rounding says


@dataclass(frozen=True, kw_only=True)
class SparseVLM(InLLM):
    """Raters are the words that get more than their share of the visual tokens' softmax over the words, by the product
    of input embeddings. Behind layers 2, 6 and 15 of 32 the visual tokens stay that the raters attend to
    most.

    keep: the mean over layers of the visual tokens that enter them, as a fraction; the rates are scaled to it. Left
        out, the rates are used as they are, which are those published for 192 of 576 tokens. That is the mean of what
        leaves the layers; 206.8 enter them in the mean.
    rates: what stays behind each of the three layers, as a fraction of what entered the first: 300, 200 and 118 of 576
        (SparseVLM+). For 128 tokens it has 238, 108, 60, for 96 246, 54, 28, for 64 66, 34, 20.
    recycle: of the tokens that go, the best 0.3 are merged: clusters by density of their hidden states, a tenth as many
        as tokens, become means in the place of their centres. What stays counts them: for 192 tokens (v1.5 of the
        released code) `rates` are 309, 204 and 113 of 576, for 128 312, 117, 39, for 64 82, 32, 18.
    heads: the share of the heads that count, those whose raters attend to visual tokens most; SparseVLM+ takes 14 of
        32.
    anchor: where the question ends, see `InLLM`.
    Differs from the paper: counts are fixed, as in the released code since v1.5, where the paper takes them from a
    rank; merged tokens stand at the places of their centres, and all keep their positions, where the released code puts
    them behind the others and counts anew, and breaks ties of densities with random numbers. SparseVLM+ recycles
    nothing, and also divides attention by a function of distance that falls below 0 for far tokens, and so
    turns their order around; left out. Raters are words of the question, where the official code, which takes one
    sample a call, also lets what stands between it and the answer rate; so it is here, where the prompt ends with it.
    """

    name = "sparsevlm"
    needs = frozenset({"attention", "question_embeds"})
    paper = "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, arXiv 2410.04417"
    examples = ({}, {"keep": 0.6, "heads": 0.5}, {"keep": 0.7, "recycle": True})

    keep: Fraction | None = None
    rates: tuple[Fraction, ...] = (300 / 576, 200 / 576, 118 / 576)
    recycle: bool = False
    heads: Share = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.rates) != len(LAYERS) or list(self.rates) != sorted(self.rates, reverse=True):
            raise InvalidValue(f"rates must be {len(LAYERS)} fractions from the largest down, got {self.rates}")

    def rates_at(self, n_layers: int) -> tuple[float, ...]:
        """The share of the visual tokens that is present at each of `n_layers` layers."""
        if self.is_identity:
            return (1.0,) * n_layers
        behind = {math.floor(at * n_layers + 0.5): rate for at, rate in zip(LAYERS, self.rates)}
        rates = [1.0]
        for layer in range(n_layers - 1):
            rates.append(behind.get(layer, rates[-1]))
        return tuple(rates) if self.keep is None else schedules.scaled(tuple(rates), self.keep)

    def schedule(self, n_layers: int) -> dict[int, float | int | None]:
        return {i: here for i, (before, here) in enumerate(pairwise(self.rates_at(n_layers))) if here < before}

    def score(self, attention: Attention) -> Tensor:
        rate = raters(attention.entered)
        rows = torch.where(rate, attention.instruction, -1)
        given = attention.query, attention.key
        if self.heads == 1:
            return attention_column_sums(*given, rows, attention.scaling, attention.valid)
        sums = torch.zeros(*given[0].shape[:2], given[1].shape[2], device=rows.device)  # [B, H, L]
        past = given[1].shape[2] - given[0].shape[2]
        for part in rows.split(BLOCK, 1):
            weights = attention_rows(*given, part.clamp(min=past), attention.scaling, attention.valid)
            sums += torch.where((part >= 0)[:, None, :, None], weights, 0.0).sum(2)
        count = max(1, math.floor(sums.shape[1] * self.heads + 0.5))
        total = sums.masked_fill(~attention.visual[:, None], 0.0).sum(2)  # [B, H]
        best = total.argsort(dim=1, descending=True, stable=True)[:, :count]
        return sums.gather(1, best[..., None].expand(-1, -1, sums.shape[2])).mean(1)

    @property
    def joins(self) -> bool:
        return self.recycle

    def join(self, hidden: Tensor, rank: Tensor, there: Sequence[int] | None, remaining: Sequence[int]) -> Tensor:
        if not self.recycle:
            return super().join(hidden, rank, there, remaining)
        counts = list(zip(*map(recycled, there, remaining)))
        kept, pool, centres = (torch.tensor(count, device=rank.device)[:, None] for count in counts)  # [B, 1]
        length, place = rank.shape[1], torch.arange(max(counts[1]), device=rank.device)
        into = super().join(hidden, rank, there, counts[0])
        at = (kept + place).clamp(max=length - 1)
        column, valid = rank.argsort(1).gather(1, at), place < pool  # [B, P] of those to be merged
        points = gather(hidden, column)
        centre = clusters(points, centres.squeeze(1).to(points.device), max(1, *counts[2]), valid.to(points.device))
        target = column.gather(1, centre.clamp(min=0).to(column.device))
        return F.pad(into, (0, 1)).scatter(1, column.where(valid, length), target)[:, :-1]

    def with_budget(self, budget: float, n_layers: int) -> SparseVLM:
        solved = replace(self, keep=float(budget))
        schedules.check_room(solved.rates_at(n_layers), budget)  # which refuses a mean that cannot be met
        return solved


def recycled(there: int, remaining: int) -> tuple[int, int, int]:
    """Of so many visual tokens how many stay as they are, how many are merged, and into how many, so that as many as
    possible stay and no more than `remaining` are left."""
    if remaining in (0, there):
        return remaining, 0, 0
    for kept in range(remaining, -1, -1):
        pool = int((there - kept) * PART + 1e-9) + 1
        merged = pool // CLUSTER + 1
        if kept + merged <= remaining:
            return kept, pool, merged
    return remaining, 0, 0


def raters(entered: Entered) -> Tensor:
    """[B, R] bool: the words of the instruction that rate. All of them where none is above the others."""
    embeds, there = entered.embeds.float(), entered.instruction >= 0
    index = entered.instruction.clamp(min=0)[..., None].expand(-1, -1, embeds.shape[2])
    with torch.autocast(embeds.device.type, enabled=False):
        weights = embeds @ embeds.gather(1, index).mT  # [B, L0, R]
    weights = weights.masked_fill(~there[:, None], -torch.inf).softmax(-1)
    count = entered.visual.sum(1, keepdim=True).clamp(min=1)
    share = torch.where(entered.visual[..., None], weights, 0.0).sum(1) / count  # [B, R]
    mean = share.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    above = there & (share > mean * (1 + MARGIN))
    return torch.where(above.any(1, keepdim=True), above, there)
