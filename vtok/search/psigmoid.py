"""P-Sigmoid: the best S-shaped schedule of a given mean keep."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vtok.errors import InvalidValue, MissingExtra
from vtok.search.schedules import FULL, Rates, midpoint, sigmoid

A = (0.2, 1.0)  # range of the amplitude, raised where the mean could not be reached
K = (0.05, 2.0)  # range of the steepness, searched on a log scale
EVALUATIONS = 25
INITIAL = 5  # of them, spread over the ranges before the model of the score takes over


@dataclass(frozen=True)
class Candidate:
    a: float
    k: float
    midpoint: float
    rates: Rates
    score: float


def psigmoid(
    evaluate: Callable[[Rates], float],
    n_layers: int,
    mean_keep: float,
    *,
    a: float | None = None,
    k: float | None = None,
    first_full: int = FULL,
    r_min: float = 0.0,
    evaluations: int = EVALUATIONS,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[Candidate, tuple[Candidate, ...]]:
    """The best candidate, the earliest of equals, and all of them in order.

    Every candidate has the wanted mean: its midpoint is solved for. With both a and k free, Bayesian optimisation: a
    Gaussian process (Matern 5/2) and expected improvement, after a few points of a Sobol sequence; for one free
    parameter an even grid. A run with the same seed and scores asks for the same candidates, so one that was killed
    can be played again on remembered scores.

    evaluate: rates -> score, more is better. a, k: of `sigmoid`, or None to search. evaluations: candidates in all.
    progress: wraps the iteration over them. Raises `InvalidValue`, naming the interval, where the mean cannot be met,
    and `MissingExtra` without scikit-optimize where both are free.

    The ranges, the numbers of evaluations and the acquisition are ours: the paper gives none.
    """
    shape = {"n_layers": n_layers, "first_full": first_full, "r_min": r_min}
    midpoint(mean_keep, a=A[1] if a is None else a, k=1.0, **shape)  # refuses what no candidate can meet
    if evaluations < 1:
        raise InvalidValue(f"evaluations must be at least 1, got {evaluations!r}")
    reach = (mean_keep * n_layers - first_full) / (
        n_layers - first_full
    )  # the rate at which a flat schedule has the mean
    lowest = min(A[1], max(A[0], reach + 1e-9))
    tried: list[Candidate] = []

    def score(a: float, k: float) -> float:
        x0 = midpoint(mean_keep, a=a, k=k, **shape)
        rates = sigmoid(a=a, k=k, midpoint=x0, **shape)
        tried.append(Candidate(a, k, x0, rates, evaluate(rates)))
        return tried[-1].score

    a_free, k_free = a is None and lowest < A[1], k is None
    a = A[1] if a is None and not a_free else a
    if a_free and k_free:
        points = _bayesian(score, [(lowest, A[1]), K], evaluations, seed)
    elif a_free:
        points = (score(x, k) for x in _grid(lowest, A[1], evaluations))
    elif k_free:
        points = (score(a, math.exp(x)) for x in _grid(math.log(K[0]), math.log(K[1]), evaluations))
    else:
        evaluations, points = 1, (score(a, k) for _ in range(1))
    for _ in progress(range(evaluations)):
        next(points)
    return max(tried, key=lambda candidate: candidate.score), tuple(tried)


def _grid(low: float, high: float, n: int) -> list[float]:
    return [low + (high - low) * i / max(1, n - 1) for i in range(n)]


def _bayesian(
    score: Callable[[float, float], float], ranges: list[tuple[float, float]], evaluations: int, seed: int
) -> Iterator[float]:
    """Evaluate one candidate after the other; yields its score."""
    try:
        from skopt import Optimizer
        from skopt.space import Real
    except ImportError as error:
        raise MissingExtra('Searching two parameters needs scikit-optimize: pip install "vtok[search]".') from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Sobol points like powers of two; a point may be proposed twice
        space = [Real(*ranges[0]), Real(*ranges[1], prior="log-uniform")]
        initial = min(INITIAL, evaluations)
        options = {"acq_func": "EI", "n_initial_points": initial, "initial_point_generator": "sobol"}
        options["acq_optimizer_kwargs"] = {"n_points": 2000}  # of two parameters; the default is five times as slow
        optimizer = Optimizer(space, base_estimator="GP", random_state=seed, **options)
    for _ in range(evaluations):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            point = optimizer.ask()
        found = score(*point)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.tell(point, -found)
        yield found
