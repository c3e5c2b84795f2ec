"""G-Search: the smallest schedule that costs no more than a tolerance, layer by layer from the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vtok.errors import InvalidValue
from vtok.search.schedules import FULL, Rates

TOLERANCE = 0.005
STEP = 1 / 64


def gsearch(
    evaluate: Callable[[Rates], float],
    n_layers: int,
    *,
    tolerance: float = TOLERANCE,
    step: float = STEP,
    first_full: int = FULL,
    group: int = 1,
    max_evals: int | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Rates:
    """Lower each layer's rate, with those of all layers behind it, as far as the score allows (Section 3.2).

    Bisects, which takes for granted that the score does not fall with the rate, and keeps the invariant that the
    schedule at hand passes; so it may be stopped anywhere. A schedule is evaluated once however often it comes up.

    evaluate: rates -> score, more is better. tolerance: what may be lost, as a fraction of the full model's score
    (of its magnitude, as log-probabilities are negative). step: the distance of candidate rates, 1 / an integer; the
    lowest candidate is one step. first_full: layers that see all tokens, two in the paper. group: how many layers
    get one rate. max_evals: at most so many evaluations. progress: wraps the iteration over groups of layers.

    The tolerance, the step and these defaults are ours: the paper gives none.
    """
    levels = _levels(step)
    if not 0 <= tolerance < 1:
        raise InvalidValue(f"tolerance must be a fraction in [0, 1), got {tolerance!r}")
    if not 0 < first_full < n_layers:
        raise InvalidValue(f"first_full must be below the number of decoder layers, {n_layers}, got {first_full!r}")
    if group < 1 or (max_evals is not None and max_evals < 1):
        raise InvalidValue(f"group and max_evals must be at least 1, got {group!r} and {max_evals!r}")
    scores: dict[Rates, float] = {}

    def score(level: list[int]) -> float:
        rates = tuple(n / levels for n in level)
        if rates not in scores:
            scores[rates] = evaluate(rates)
        return scores[rates]

    level = [levels] * n_layers  # in steps
    whole = score(level)
    enough = whole - tolerance * abs(whole) - 1e-12
    for layer in progress(range(first_full, n_layers, group)):
        fails, passes = 0, level[layer]
        while passes - fails > 1 and (max_evals is None or len(scores) < max_evals):
            middle = (fails + passes) // 2
            if score(level[:layer] + [middle] * (n_layers - layer)) >= enough:
                passes = middle
            else:
                fails = middle
        level[layer:] = [passes] * (n_layers - layer)
    return tuple(n / levels for n in level)


def _levels(step: float) -> int:
    levels = round(1 / step) if isinstance(step, float | int) and 0 < step <= 0.5 else 0
    if not levels or abs(levels * step - 1) > 1e-6:
        raise InvalidValue(f"step must be 1 divided by an integer, such as 1/64 = 0.015625, got {step!r}")
    return levels
