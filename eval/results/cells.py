"""What a sweep is made of: cells, each a method at a budget. What is asked of a method its class says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtok import adapter as adapters
from vtok.compressor import load_all
from vtok.errors import InvalidValue, UnknownName, VtokError
from vtok.patching import Patch, patch

DENSE = "dense"


@dataclass(frozen=True)
class Cell:
    """One method at one budget: the mean over decoder layers of kept over all visual tokens is at most that."""

    method: str
    budget: float

    @property
    def file(self) -> str:
        return f"{self.method}@{self.budget:g}.jsonl"

    def patch(self, model: Any) -> Patch:
        return patch(model, self.method, budget=self.budget, **options(model, self.method))


def baselines() -> list[str]:
    """Names of the methods that are no paper's; what a method has to beat."""
    return [name for name, cls in load_all().items() if cls.paper == "baseline"]


def smaller_picture() -> str:
    """The baseline that acts before the encoder: what it gets wrong are the questions that need visual detail."""
    return next(name for name in baselines() if load_all()[name].stage == "encoder")


def training_free() -> list[str]:
    """Names of the compressors that need no weights of their own, baselines first."""
    names, first = [name for name, cls in load_all().items() if not cls.trained], baselines()
    return sorted(names, key=lambda name: (name not in first, name))


def options(model: Any, method: str) -> dict[str, Any]:
    """What a method has to be told to run on this model at a budget."""
    vlm, adapter = adapters.find(model)
    cls = load_all()[method]
    lacking = sorted((cls.needs - adapter.available(vlm)) & cls.optional.keys())
    return dict(cls.budgeted) | {key: value for need in lacking for key, value in cls.optional[need].items()}


def calls(told: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Of (method, options) those that had to be told something, as in "tome(carry=True)"."""
    return sorted(
        {f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in told if given}
    )


def cells(methods: Sequence[str] | None, budgets: Sequence[float]) -> list[Cell]:
    """The dense model and every method at every budget. Raises `UnknownName` and `InvalidValue`."""
    known = load_all()
    for name in methods or ():
        if name not in known:
            raise UnknownName(f"No compressor is named {name!r}. There are: {', '.join(known)}.")
    for budget in budgets:
        if not 0 < budget <= 1:
            raise InvalidValue(f"A budget is a fraction in (0, 1], not {budget}.")
    chosen = training_free() if methods is None else methods
    return [Cell(DENSE, 1.0), *(Cell(name, budget) for budget in budgets for name in chosen)]


def refusal(model: Any, cell: Cell) -> str | None:
    """Why the model cannot be patched so, or None where it can."""
    if cell.method == DENSE:
        return None
    try:
        cell.patch(model).remove()
    except VtokError as error:
        return str(error)
    return None
