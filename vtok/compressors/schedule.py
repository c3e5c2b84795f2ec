"""Schedule: drop visual tokens at every decoder layer, by the attention that the instruction paid them before."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Literal

from torch import Tensor

from vtok.errors import InvalidValue
from vtok.kernels.attention_column_sums import attention_column_sums
from vtok.options import Fraction, In
from vtok.safe_layer import AtSafeLayer, FullLayers
from vtok.search import schedules
from vtok.types import Attention

MEAN = 0.34  # of the schedule that G-Search found for LLaVA-1.5-7B (Table 1)


@dataclass(frozen=True, kw_only=True)
class Schedule(AtSafeLayer):
    """Before layer i only rate[i] of the visual tokens that entered stay, those with most attention in layer i - 1.

    The attention is that of the instruction, the prompt's text behind its first visual token, summed over its tokens
    and averaged over heads (Figure 2). The rates come from one of three places:

    file: of a schedule, as `vtok search` writes it.
    rates: one a layer, from 1 down, each the share of all tokens that entered. For a decoder of another depth they are
        averaged over the layers' parts of the depth; with a file too.
    neither: P-Sigmoid, a / (1 + exp(k (i - midpoint))) with the midpoint that gives the mean `keep`.

    keep: the mean of the rates over all layers, a fraction; P-Sigmoid's is 0.34 if left out, or more in decoders so
        shallow that less than a quarter of it would be left behind the full layers. Rates that are given are used as
        they are if it is left out, else those below 1 are scaled to this mean.
    a, k: amplitude and steepness per layer of P-Sigmoid.
    r_min: its lowest rate.
    first_full: how many layers see all tokens, two in the paper: the first layer ranks unlike all others; "auto", up
        to the layer that a `probe` found safe. A `budget` that leaves less than a quarter of itself for the layers
        behind them is refused.
    queries: "instruction", or "last" for the attention of the anchor alone, which is cheaper.
    rounding: of counts, "up" as in the paper, which leaves at least one token a sample, or "down". A `budget` rounds
        down, so that it is never exceeded.
    anchor: where the instruction ends, see `InLLM`; "prompt_end" is the paper's.
    Differs from the paper: no code is published, and what the paper leaves open is ours: the range of P-Sigmoid's
    parameters and their defaults, `r_min`, and what other depths get.
    """

    name = probed = "schedule"
    acts = "first_full"
    needs = frozenset({"attention"})
    paper = "Searching Optimal Vision Token Reduction (G-Search, P-Sigmoid), arXiv 2412.00556"
    examples = ({"rates": (1, 0.92, 0.89, 0.3)}, {"keep": 0.7})  # of 16 tokens the second of the steps drops none

    keep: Fraction | None = None
    file: str | os.PathLike[str] | None = None
    rates: tuple[float, ...] | None = None
    a: Annotated[float, In("(0, 10]")] = 1.0
    k: Annotated[float, In("(0, 100]")] = 0.5
    r_min: Annotated[float, In("[0, 1]")] = 0.0
    first_full: FullLayers = schedules.FULL
    queries: Literal["instruction", "last"] = "instruction"
    rounding: Literal["up", "down"] = "up"

    def __post_init__(self) -> None:
        if self.file is not None and self.rates is not None:
            raise InvalidValue("Give a schedule's file or its rates, not both.")
        if self.rates is not None:
            object.__setattr__(self, "rates", schedules.check(self.rates))
        super().__post_init__()
        if self.r_min > self.a:
            raise InvalidValue(f"r_min must be at most a, {self.a}, got {self.r_min}")
        _ = self.given  # a file that is no schedule is refused here

    @cached_property
    def given(self) -> tuple[float, ...] | None:
        """The rates of the file, or those given, at their own depth; None for P-Sigmoid."""
        return self.rates if self.file is None else schedules.read(self.file)

    @property
    def is_identity(self) -> bool:
        return self.keep == 1.0 or (self.keep is None and self.given is not None and min(self.given) == 1.0)

    def rates_at(self, n_layers: int) -> tuple[float, ...]:
        """The share of the visual tokens that is present at each of `n_layers` layers."""
        if self.is_identity:
            return (1.0,) * n_layers
        if self.given is None:
            shape = {"n_layers": n_layers, "first_full": self.first_full, "r_min": self.r_min, "a": self.a, "k": self.k}
            keep = max(MEAN, self.first_full / (0.75 * n_layers)) if self.keep is None else self.keep
            return schedules.sigmoid(midpoint=schedules.midpoint(keep, **shape), **shape)
        rates = schedules.resampled(self.given, n_layers, self.first_full)
        return rates if self.keep is None else schedules.scaled(rates, self.keep)

    def schedule(self, n_layers: int) -> dict[int, float | int]:
        rates = self.rates_at(n_layers)
        return {i: here for i, (before, here) in enumerate(pairwise(rates)) if here < before}

    def remaining(self, n: int, keep: float | int, images: int) -> int:
        if self.rounding == "down":
            return super().remaining(n, keep, images)
        return min(n, max(1, math.ceil(n * keep - 1e-9)))  # 0.28 * 25 is 7, not 7.0000001

    def score(self, attention: Attention) -> Tensor:
        queries = attention.anchor[:, None] if self.queries == "last" else attention.instruction
        return attention_column_sums(attention.query, attention.key, queries, attention.scaling, attention.valid)

    def with_budget(self, budget: float, n_layers: int) -> Schedule:
        solved = replace(self, keep=float(budget), rounding="down")
        rates = solved.rates_at(n_layers)  # refuses a mean that cannot be met
        more = (
            " first_full=1 goes further, and then drops by the ranking of the first layer, which is hardly better than"
        )
        schedules.check_room(rates, budget, f"{more} chance.")
        return solved
