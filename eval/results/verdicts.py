"""What pages conclude from results: the best methods, what cannot be told from them, what is not worth its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vtok.compressor import load_all
from vtok.errors import InvalidValue
from vtok.eval.results.cells import Cell, baselines, smaller_picture
from vtok.eval.results.results import Mean, Results, Row, Several, shares
from vtok.eval.results.statistics import Number, holm, mcnemar
from vtok.runs import DENSE

SAME_COST = 0.05  # costs that differ by less than this part count as equal on a Pareto front
LEVEL = 0.05  # p below which a paired test says that two methods differ
WORTH = 0.9  # of the dense accuracy, that a method worth having keeps


def headline(results: Results) -> Row | None:
    """The best method at the smallest budget at which it keeps `WORTH` of the dense accuracy, else at the largest; None
    where no recommendation may rest on the task."""
    return _smallest([results.at(budget)[0] for budget in results.budgets]) if results.advises else None


def overall(several: Several) -> Mean | None:
    """The same by the mean over tasks; None where no method has one."""
    best = [row for budget in several.budgets if (row := several.best(budget)) is not None]
    return _smallest(best) if best else None


def _smallest(best: Sequence[Any]) -> Any:
    good = [row for row in best if row.kept.at >= WORTH]
    return good[-1] if good else best[0]


def tied(rows: Iterable[Any], row: Any) -> list[str]:
    """Methods of `rows` whose paired difference to `row` has an interval that holds 0; rows of one task or means."""
    others = [other for other in rows if other is not row and other.kept is not None]
    return [other.method for other in others if (row.kept - other.kept).level]


def hopeless(found: Sequence[Results]) -> list[str]:
    """Methods that at no budget on any telling task beat the best baseline beyond the interval."""
    pairs = [(row, results.rival(row)) for results in found if results.telling for row in results.methods]
    better: dict[str, bool] = {}
    for row, other in pairs:
        if other is not None and row.method not in baselines():
            better[row.method] = better.get(row.method, False) or beats(row, other)
    return sorted(name for name, ever in better.items() if not ever)


def beats(row: Row, other: Row) -> bool:
    """Beyond the interval of the paired difference."""
    return (row.accuracy - other.accuracy).positive


@dataclass(frozen=True, eq=False)
class Paired:
    """A method against a rival at one budget on one model, over all questions of the telling tasks that both answered.

    better, worse: questions that the one or the other alone got right. difference: of the shares of right answers,
    redrawn by items. p: of McNemar's test, after Holm's correction.
    """

    method: str
    budget: float
    tasks: tuple[str, ...]
    questions: int
    better: int
    worse: int
    difference: Number
    p: float

    @property
    def verdict(self) -> int:
        """1: the method is better, -1: worse, 0: they cannot be told apart. Both the test and the interval have to say
        so: the one corrects for how many methods are tried, the other knows which questions share a picture."""
        if self.p >= LEVEL or self.difference.span is None or self.difference.level:
            return 0
        return 1 if self.better > self.worse else -1


def paired(model: Several, rival: str) -> list[Paired]:
    """All methods at all budgets against one, on one model: which questions either gets right is a matter of the model,
    so that those of several are not counted together (`InvalidValue`). Holm's correction is over the whole list."""
    if len({results.model for results in model.tasks}) > 1:
        raise InvalidValue("Paired tests are of one model: those of several have no questions in common.")
    cells = dict.fromkeys(cell for r in model.telling for cell in r.facts if cell.method not in (DENSE, rival))
    found = []
    for cell in cells:
        other = Cell(rival, cell.budget)
        tasks = [results for results in model.telling if cell in results.facts and other in results.facts]
        if tasks:
            found.append(_paired(cell, other, tasks))
    return [replace(one, p=p) for one, p in zip(found, holm([one.p for one in found]))]


def _paired(cell: Cell, other: Cell, tasks: Sequence[Results]) -> Paired:
    one, two = (np.concatenate([results.right[c] for results in tasks]) for c in (cell, other))
    better, worse = int((one & ~two).sum()), int((two & ~one).sum())
    gaps = [(len(r.questions) / len(one), r.rows[cell].accuracy - r.rows[other].accuracy) for r in tasks]
    known = all(gap.draws is not None for _, gap in gaps)
    draws = sum(share * gap.draws for share, gap in gaps) if known else None
    number = Number((better - worse) / len(one), draws)
    names = tuple(results.about["task"] for results in tasks)
    return Paired(cell.method, cell.budget, names, len(one), better, worse, number, mcnemar(better, worse))


def no_better(results: Results, budget: float) -> list[str] | None:
    """Methods that do not beat the best baseline at a budget beyond the interval; None where none was run beside it."""
    pairs = [(row, results.rival(row)) for row in results.at(budget) if row.method not in baselines()]
    pairs = [(row, other) for row, other in pairs if other is not None]
    return [row.method for row, other in pairs if not beats(row, other)] if pairs else None


def leaders(models: Sequence[Several], count: int) -> list[str]:
    """The `count` methods that keep most on average over models, tasks and budgets, of those that ran at the most
    budgets; no baselines."""
    kept: dict[str, list[float]] = {}
    budgets: dict[str, set[float]] = {}
    for results in (results for model in models for results in model.tasks):
        for row in results.methods:
            if row.method not in baselines():
                kept.setdefault(row.method, []).append(np.nan_to_num(row.kept.at))
                budgets.setdefault(row.method, set()).add(row.budget)
    most = max(map(len, budgets.values()), default=0)
    full = [name for name in kept if len(budgets[name]) == most]
    return sorted(full, key=lambda name: (-np.mean(kept[name]), name))[:count]


def front(points: Mapping[Any, tuple[float, float]], same: float = SAME_COST) -> list[Any]:
    """Of key -> (cost, accuracy) the keys that no other beats: none is more accurate at a cost that is lower, or
    higher by a part `same` at most. Cheapest first."""
    best = [
        key
        for key, (cost, gain) in points.items()
        if not any(c <= cost * (1 + same) and g > gain for c, g in points.values())
    ]
    return sorted(best, key=lambda key: points[key])


# --- parts of pages


@dataclass(frozen=True)
class Filtered:
    """Questions that the dense model gets right, divided by whether a smaller picture gets them wrong (hard, they need
    detail) or right (easy). methods: name -> what it gets right of each, None where there are none."""

    hard: int
    easy: int
    methods: dict[str, list[Number | None]]  # hard, easy


def filtered(results: Results, budget: float) -> Filtered | None:
    """The filter of VTC-Bench, or None where the smaller picture was not run at that budget. The dense model has 1 on
    both parts, the smaller picture 0 and 1 by construction."""
    cell = Cell(smaller_picture(), budget)
    if cell not in results.facts:
        return None
    dense, small = results.right[results.dense_cell], results.right[cell]
    groups = [dense & ~small, dense & small]
    cells = [Cell(row.method, budget) for row in results.at(budget) if row.method != cell.method]
    parts = [shares(results, cells, c) if c.any() and cells else [None] * len(cells) for c in groups]
    hard, easy = (int(chosen.sum()) for chosen in groups)
    return Filtered(hard, easy, {cell.method: pair for cell, *pair in zip(cells, *parts)})


def drift(results: Results) -> tuple[float, float] | None:
    """The least and most time of what ran at a budget of 1 and so dropped nothing, as a part of the dense model's: what
    the machine alone makes of times. Without methods that act in decoding, which do so at any budget, and those that
    are not installed, of which that is not known. None where nothing ran so."""
    prefill = {name for name, cls in load_all().items() if "decode" not in cls.stage}
    idle = [row for name, row in results.whole.items() if name in prefill and row["agreement"] == 1]
    times = [row["seconds"] / results.dense.facts["seconds"] for row in idle]
    return (min(times), max(times)) if times else None


def at_all(found: Sequence[Results], form: Callable[[str], str] = str) -> str:
    """What became of the answers where nothing was to be dropped; "" where nothing ran so. form: of a method's name."""
    least: dict[str, float] = {}
    for name, row in (pair for results in found for pair in results.whole.items()):
        least[name] = min(least.get(name, 1.0), row["agreement"])
    changed = sorted(name for name, agreement in least.items() if agreement < 1)
    which = f"all methods but {', '.join(map(form, changed))}" if changed else "all methods"
    return f"At 100 % of the tokens {which} give every answer of the dense model." if least else ""


def not_run(refused: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """(method, why) -> budgets, of the `refused` of a sweep.json; reasons that differ in the budget alone are one."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in refused:
        why = row["reason"]
        for words in ("budget of", "mean keep of"):
            why = why.replace(f"{words} {row['budget']:g}", f"{words} that size")
        found.setdefault((row["method"], why), []).append(row["budget"])
    return found
