"""What a sweep is made of: cells, each a method at a budget. What is asked of a method its class says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtok import methods, options
from vtok.compressor import load_all
from vtok.errors import InvalidValue
from vtok.patching import Patch, patch
from vtok.runs import DENSE

OWN_LIMIT = "own_limit"  # the baseline that is no compressor: the processor's limit on pixels or tiles (own_limit.py)


@dataclass(frozen=True)
class Cell:
    """One method at one budget: the mean over decoder layers of kept over all visual tokens is at most that; in models
    without pictures, of columns that the answer attends to over all of the prompt.

    method: a name, with options behind it as `vtok.methods.read` reads them: "fastv:layer=2".
    """

    method: str
    budget: float

    @property
    def file(self) -> str:
        return f"{self.method}@{self.budget:g}.jsonl"

    @property
    def patches(self) -> bool:
        """Whether it is one of a compressor."""
        return self.method not in (DENSE, OWN_LIMIT)

    def patch(self, model: Any) -> Patch:
        what, told = methods.call(model, self.method, budget=self.budget)
        return patch(model, what, **told)

    def options(self, model: Any) -> dict[str, Any]:
        """What the method has to be told, beside the budget, to run on this model."""
        if not self.patches:
            return {}
        _, told = methods.call(model, self.method, budget=self.budget)
        return {key: value for key, value in told.items() if key != "budget"}

    def refusal(self, model: Any) -> str | None:
        """Why the model cannot be patched so, or None where it can."""
        return methods.refusal(model, self.method, budget=self.budget) if self.patches else None


def baselines(pictures: bool = True) -> list[str]:
    """Names of the methods that are no paper's, what a method has to beat: of those that drop visual tokens, or of the
    cache's. Behind the compressors among them the limit of a family's own processor."""
    names = [name for name, cls in load_all().items() if cls.paper == "baseline" and cls.of_pictures == pictures]
    return [*names, OWN_LIMIT] if pictures else names


def tried(found: Iterable[Any]) -> list[str]:
    """Those `baselines` that some of these results have."""
    there = {cell.method for results in found for cell in results.facts}
    return [name for name in baselines() if name in there]


def smaller_picture() -> str:
    """The baseline that acts before the encoder: what it gets wrong are the questions that need visual detail."""
    return next(name for name, cls in load_all().items() if cls.stage == "pixels" and cls.paper == "baseline")


def drawn_by_lot() -> str:
    """The baseline that looks at nothing: it has a seed."""
    known = load_all().items()
    return next(n for n, cls in known if cls.of_pictures and cls.paper == "baseline" and "seed" in options.of(cls))


def training_free(pictures: bool = True) -> list[str]:
    """Names of the compressors that need no weights of their own and drop visual tokens, or columns of the cache in
    models without `pictures`; baselines first."""
    known, first = load_all().items(), baselines(pictures)
    names = [name for name, cls in known if not cls.trained and cls.of_pictures == pictures]
    return sorted(names, key=lambda name: (name not in first, name))


def calls(told: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Of (method, options) those that had to be told something, as in "tome(carry=True)"."""
    spelt = lambda given: ", ".join(f"{key}={value!r}" for key, value in given.items())
    return sorted({f"{bare(method)}({spelt(given)})" for method, given in told if given})


def bare(method: str) -> str:
    """The name of a method, without the options behind it."""
    return method.partition(":")[0]


def cells(wanted: Sequence[str] | None, budgets: Sequence[float], pictures: bool = True) -> list[Cell]:
    """The dense model and every method at every budget; all of `training_free` that fit, and where there are
    pictures `OWN_LIMIT`, if none are named. Raises `UnknownName` and `InvalidValue`."""
    for method in wanted or ():
        if method != OWN_LIMIT:
            methods.each(method)
    for budget in budgets:
        if not 0 < budget <= 1:
            raise InvalidValue(f"A budget is a fraction in (0, 1], not {budget}.")
    chosen = [*training_free(pictures), *[OWN_LIMIT] * pictures] if wanted is None else wanted
    return [Cell(DENSE, 1.0), *(Cell(method, budget) for budget in budgets for method in chosen)]
