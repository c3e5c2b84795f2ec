"""Schedules: the share of the visual tokens that each decoder layer works on. Plain numbers and files, no model.

A schedule is a tuple of rates in [0, 1], one a layer, the first 1 and none above the one before. The share is always
of all tokens that entered the decoder, not of those that the layer before had.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from vtok.errors import InvalidValue
from vtok.files import read_json, write_json

Rates = tuple[float, ...]
FULL = 2  # layers that see all tokens, as in the paper: the first layer ranks unlike the others


def check(rates: Iterable[Any], what: str = "rates") -> Rates:
    """`rates` as a tuple of floats. Raises `InvalidValue` where they are no schedule."""
    try:
        rates = tuple(rates)
        numbers = tuple(float(r) for r in rates if not isinstance(r, bool | str))
    except (TypeError, ValueError):
        raise InvalidValue(f"{what} must be numbers, one for each decoder layer, got {rates!r}.") from None
    if not numbers or len(numbers) < len(rates) or not all(0 <= r <= 1 for r in numbers):  # also refuses NaN
        raise InvalidValue(f"{what} must be numbers in [0, 1], one for each decoder layer, got {rates!r}.")
    if numbers[0] != 1:
        raise InvalidValue(f"{what} must begin with 1, not {numbers[0]}: the first layer sees all that enters it.")
    for layer, (before, here) in enumerate(pairwise(numbers), start=1):
        if here > before:
            raise InvalidValue(f"{what} must not rise, but go from {before} to {here} at layer {layer}.")
    return numbers


def mean(rates: Sequence[float]) -> float:
    """The mean over the layers: the share of the prompt's visual keys and values that the cache holds."""
    return math.fsum(rates) / len(rates)


def sigmoid(n_layers: int, a: float, k: float, midpoint: float, first_full: int = 2, r_min: float = 0.0) -> Rates:
    """P-Sigmoid: a / (1 + exp(k (i - midpoint))) at layer i = 1, 2, ..., cut to [r_min, 1]; 1 up to `first_full`.

    a > 0 is the amplitude, k > 0 the steepness per layer.
    """
    # tanh does not overflow where exp does
    falling = [a * (1 - math.tanh(k * (i - midpoint) / 2)) / 2 for i in range(first_full + 1, n_layers + 1)]
    return (1.0,) * first_full + tuple(min(1.0, max(r_min, r)) for r in falling)


def midpoint(mean_keep: float, n_layers: int, a: float, k: float, first_full: int = 2, r_min: float = 0.0) -> float:
    """The midpoint with which `sigmoid` has this mean. Raises `InvalidValue`, naming the interval, where none has."""
    if not 0 < first_full < n_layers:
        raise InvalidValue(f"first_full must be below the number of decoder layers, {n_layers}, got {first_full}.")
    rest = n_layers - first_full
    low, high = ((first_full + rest * r) / n_layers for r in (r_min, max(r_min, min(a, 1.0))))
    if not low - 1e-9 <= mean_keep <= high + 1e-9:
        raise InvalidValue(
            f"A mean keep of {mean_keep:g} cannot be met: with {first_full} of {n_layers} layers seeing all tokens, "
            f"a={a:g} and r_min={r_min:g} it can be from {low:.4f} to {high:.4f}."
        )
    margin = 40 / k  # tanh is 1 to the last bit beyond
    return _rising(lambda x: mean(sigmoid(n_layers, a, k, x, first_full, r_min)), mean_keep, -margin, n_layers + margin)


def scaled(rates: Rates, mean_keep: float) -> Rates:
    """The schedule with all rates below 1 multiplied by one factor (and cut at 1), so that it has this mean.

    Raises `InvalidValue`, naming the interval, where no factor gives it.
    """
    part = lambda factor: tuple(r if r == 1 else min(1.0, factor * r) for r in rates)
    low, high = mean(part(0.0)), sum(r > 0 for r in rates) / len(rates)
    if not low - 1e-9 <= mean_keep <= high + 1e-9:
        raise InvalidValue(
            f"A mean keep of {mean_keep:g} cannot be met by scaling this schedule of {len(rates)} layers: it can be "
            f"from {low:.4f} to {high:.4f}."
        )
    if high == low:
        return rates
    most = 1 / min(r for r in rates if r > 0)
    return part(_rising(lambda factor: mean(part(factor)), mean_keep, 0.0, most))


def check_room(rates: Rates, budget: float, more: str = "") -> None:
    """Raise `InvalidValue` where the layers that see all tokens leave the others less than a quarter of a budget, the
    mean over layers. more: what else may be done about it."""
    n_layers, full = len(rates), sum(rate == 1 for rate in rates)
    if full < n_layers and (budget * n_layers - full) / (n_layers - full) < budget / 4:
        raise InvalidValue(
            f"{full} of {n_layers} layers see all tokens, and a budget of {budget:g} leaves next to nothing for the "
            f"others. Raise it, or compress before the language model.{more}"
        )


def resampled(rates: Rates, n_layers: int, first_full: int) -> Rates:
    """The schedule for a decoder of another depth: as it is for its own depth; else each layer gets the mean of the
    rates over its part of the depth, so that the mean over all layers stays, and `first_full` layers see all tokens.
    """
    if n_layers == len(rates):
        return rates
    ratio = len(rates) / n_layers

    def area(x: float) -> float:  # of the rates up to depth x, in layers of `rates`
        whole = min(int(x), len(rates) - 1)
        return math.fsum(rates[:whole]) + (x - whole) * rates[whole]

    means = [(area((i + 1) * ratio) - area(i * ratio)) / ratio for i in range(n_layers)]
    lowest, result = 1.0, []
    for i, r in enumerate(means):
        lowest = 1.0 if i < first_full else min(lowest, max(0.0, round(r, 12)))  # plateaus are plateaus
        result.append(lowest)
    return tuple(result)


def _rising(function: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """The largest x, to the last bits, at which a non-decreasing function is at most `wanted`; `low` if none is."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) <= wanted else (low, middle)
    return low


def read(file: str | os.PathLike[str]) -> Rates:
    """The rates in a schedule's file, as `write` made it. Raises `InvalidValue` where it holds none."""
    content = read_json(file, "schedule")
    if content is None:
        raise InvalidValue(f"{str(file)!r} is no schedule: it is not JSON.")
    if not isinstance(content, dict) or not isinstance(content.get("rates"), list):
        raise InvalidValue(f'{str(file)!r} is no schedule: it has no list named "rates".')
    return check(content["rates"], f"The rates in {str(file)!r}")


def write(file: str | os.PathLike[str], rates: Sequence[float], **about: Any) -> None:
    """Write a schedule as JSON, `about` (where it comes from) beside its rates."""
    rates = check(rates)
    write_json(file, {"rates": list(rates), "layers": len(rates), "mean_keep": mean(rates), **about})
