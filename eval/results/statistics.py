"""The one bootstrap of vtok: items are redrawn whole, the same ones for everything that is compared. And its tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import binomtest, bootstrap

DRAWS = 4000

# Below either number a result has no interval and carries no verdict. Of so few items a percentile interval that says
# 95 % holds the truth in less than 90 % of all cases: it is z * sqrt((n - 1) / n) wide where Student's t with n - 1
# degrees of freedom is due (90.4 % at 10 items, 81 % at 4). And a method that loses none of n questions may still lose
# 3 / n of all (the rule of three): 1 in 10 at 30 questions, which is all that a method worth having may lose.
FEWEST = {"items": 10, "questions": 30}


def enough(items: int, questions: int) -> bool:
    return items >= FEWEST["items"] and questions >= FEWEST["questions"]


def redrawn(values: np.ndarray, counts: np.ndarray, seed: int = 0) -> np.ndarray:
    """[k, DRAWS] sum(values) / sum(counts) of k quantities, by paired bootstrap; both [k, items]. NaN where the drawn
    items count nothing."""
    items = values.shape[-1]
    if items < 2:  # nothing to draw from
        return np.repeat(values / counts, DRAWS, axis=-1)

    def shares(picks: np.ndarray, axis: int = -1) -> np.ndarray:
        rows = items * np.arange(len(picks))[:, None]
        times = np.bincount((picks + rows).ravel(), minlength=picks.size).reshape(picks.shape).T.astype(float)
        return quotient(values @ times, counts @ times)

    # The statistic sees which items are drawn, so that one call redraws all k quantities alike.
    result = bootstrap((np.arange(items),), shares, n_resamples=DRAWS, method="percentile", vectorized=True, rng=seed)
    return result.bootstrap_distribution


def quotient(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole != 0)


def span(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of what was redrawn."""
    draws = draws[~np.isnan(draws)]
    low, high = np.percentile(draws, [2.5, 97.5]) if len(draws) else (np.nan, np.nan)
    return float(low), float(high)


def interval(values: np.ndarray, counts: np.ndarray) -> list[float]:
    """95 % interval of sum(values) / sum(counts), both [items], items redrawn whole."""
    return list(span(redrawn(np.asarray(values)[None], np.asarray(counts)[None])[0]))


@dataclass(frozen=True, eq=False)
class Number:
    """A share or a difference of shares, and what it is of redrawn items, [DRAWS]; None where they are too few."""

    at: float
    draws: np.ndarray | None = None

    @cached_property
    def span(self) -> tuple[float, float] | None:
        return None if self.draws is None else span(self.draws)

    @property
    def positive(self) -> bool:
        """Whether it is above 0 beyond its interval; never where it has none."""
        return self.span is not None and self.span[0] > 0

    @property
    def level(self) -> bool:
        """Whether its interval holds 0; never where it has none."""
        return self.span is not None and self.span[0] <= 0 <= self.span[1]

    def __sub__(self, other: Number) -> Number:
        known = self.draws is not None and other.draws is not None
        return Number(self.at - other.at, self.draws - other.draws if known else None)

    def __truediv__(self, other: Number) -> Number:
        known = self.draws is not None and other.draws is not None
        at = self.at / other.at if other.at else float("nan")
        return Number(at, quotient(self.draws, other.draws) if known else None)


def mean(numbers: Sequence[Number]) -> Number:
    """Of several test sets, each of which is redrawn by itself, or of several models on one."""
    known = all(number.draws is not None for number in numbers)
    draws = np.mean([number.draws for number in numbers], axis=0) if known else None
    return Number(float(np.mean([number.at for number in numbers])), draws)


# --- tests


def mcnemar(better: int, worse: int) -> float:
    """p of the exact two-sided test of McNemar (Psychometrika 12, 1947): of the questions on which two methods differ,
    one of them is right on `better`, the other on `worse`; half of them would be either by chance. 1.0 where none
    differ. Questions are taken for independent; those about one picture are not quite, which `redrawn` sees."""
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p of several tests, after Holm's correction (Scand. J. Statist. 6, 1979): what is below 0.05 is so together with
    all others, whatever their dependence. In the order given."""
    order = np.argsort(p, kind="stable")
    stepped = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1.0) if len(p) else []
    return corrected.tolist()
