"""What `vtok eval` measured, and the numbers that reports, cards and docs/choosing.md show of it.

`summarise` writes a sweep.json, `load` reads it: in a folder of `vtok eval`, or committed in one of model cards. A
sweep.json says of every question whether it was answered right; all else is made from that here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.table import Table

from vtok.errors import InvalidValue
from vtok.eval.results.cells import Cell, baselines
from vtok.eval.results.statistics import Number, enough, mean, redrawn
from vtok.eval.tasks import task
from vtok.runs import DENSE

PATTERNS = ("sweep.json", "sweep/*.json", "*/sweep.json", "*/sweep/*.json", "*/*/sweep.json")
COSTS = ("agreement", "seconds", "mean_keep", "flops", "cache", "selection_seconds")


@dataclass(frozen=True, eq=False)
class Row:
    """A method at a budget on one task. facts: what is in sweep.json; kept: accuracy as a part of the dense model's."""

    method: str
    budget: float
    accuracy: Number
    kept: Number
    to_dense: Number
    facts: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Mean:
    """A method at a budget on several tasks: what it kept of each, and, where it ran on all that count, the means."""

    method: str
    budget: float
    tasks: Mapping[Results, Number]
    kept: Number | None = None
    mean_keep: float = float("nan")
    flops: float = float("nan")


@dataclass(frozen=True, eq=False)
class Results:
    """One task of one model. facts: cell -> its entry in sweep.json, the dense model's first. Without what ran at a
    budget of 1, which spares nothing: of that there is `whole`, method -> entry. file: where it was read."""

    about: Mapping[str, Any]
    refused: Sequence[Mapping[str, Any]]
    facts: Mapping[Cell, Mapping[str, Any]]
    whole: Mapping[str, Mapping[str, Any]]
    file: str = ""

    @property
    def model(self) -> str:
        return self.about["model"]

    @property
    def runs(self) -> list[Mapping[str, Any]]:
        """Machine, versions, commit and command of each call that asked."""
        return [*self.about.get("earlier", ()), self.about["machine"]]

    @cached_property
    def task(self) -> task.Task:
        return task.get(self.about["task"])

    @cached_property
    def questions(self) -> list[tuple[int, str]]:
        """(item, kind) of each question, in the order of `right`."""
        return [(i, kind) for i, kinds in enumerate(self.about["kinds"].split()) for kind in kinds.split(",")]

    @cached_property
    def right(self) -> dict[Cell, np.ndarray]:
        """Cell -> [questions] whether each was answered right."""
        return {cell: np.array([c == "1" for c in row["right"] if c != " "]) for cell, row in self.facts.items()}

    def hits(self, cell: Cell, chosen: np.ndarray | None = None) -> np.ndarray:
        """[items, 2] right answers and questions of each item, of the chosen questions or all."""
        items = np.array([item for item, _ in self.questions])
        asked = np.ones(len(items)) if chosen is None else chosen
        count = self.about["items"]
        return np.stack([np.bincount(items, w, minlength=count) for w in (asked * self.right[cell], asked)], axis=1)

    @cached_property
    def rows(self) -> dict[Cell, Row]:
        sums = {cell: self.hits(cell) for cell in self.facts}
        shares = [right.sum() / asked.sum() for right, asked in (pair.T for pair in sums.values())]
        draws: Sequence[Any] = [None] * len(sums)
        if self.enough:  # the same items for every cell, and for every model that was asked the same task
            right, asked = (np.stack([pair[:, i] for pair in sums.values()]) for i in (0, 1))
            draws = redrawn(right, asked, seed=zlib.crc32(self.about["task"].encode()))
        numbers = {cell: Number(float(at), drawn) for cell, at, drawn in zip(sums, shares, draws)}
        dense = numbers[self.dense_cell]
        return {
            cell: Row(cell.method, cell.budget, number, number / dense, number - dense, self.facts[cell])
            for cell, number in numbers.items()
        }

    @property
    def dense_cell(self) -> Cell:
        return next(cell for cell in self.facts if cell.method == DENSE)

    @property
    def dense(self) -> Row:
        return self.rows[self.dense_cell]

    @property
    def budgets(self) -> list[float]:
        """Those that spare something, the largest first."""
        return sorted({cell.budget for cell in self.facts if cell.method != DENSE}, reverse=True)

    @property
    def methods(self) -> list[Row]:
        """All rows but the dense model's."""
        return [row for cell, row in self.rows.items() if cell.method != DENSE]

    def at(self, budget: float) -> list[Row]:
        """Rows of the methods at a budget, best first."""
        rows = [row for row in self.methods if row.budget == budget]
        return sorted(rows, key=lambda row: (-row.accuracy.at, row.method))

    def rival(self, row: Row) -> Row | None:
        """The best of the other baselines at the row's budget, if one was run."""
        return rival(self.at(row.budget), row)

    def by_kind(self, cell: Cell) -> dict[str, float]:
        """Kind of question -> share answered right, in the order in which they were asked first."""
        kinds = np.array([kind for _, kind in self.questions])
        return {kind: float(self.right[cell][kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())}

    @cached_property
    def chance(self) -> float:
        """Share that drawing answers by lot gets right, of these very questions."""
        return float(np.mean([self.task.chance(kind) for _, kind in self.questions]))

    @property
    def enough(self) -> bool:
        """Whether there are enough items and questions for intervals and verdicts (`statistics.FEWEST`)."""
        return enough(self.about["items"], len(self.questions))

    @property
    def telling(self) -> bool:
        """Whether the dense model is above chance beyond its interval; if not, there is nothing to lose or keep."""
        return self.enough and self.dense.accuracy.span[0] > self.chance

    @cached_property
    def answered(self) -> list[str]:
        """Kinds of question that the dense model answers better than by lot, beyond the interval."""
        kinds, good = np.array([kind for _, kind in self.questions]), []
        for kind in dict.fromkeys(kinds.tolist()):
            (found,) = shares(self, [self.dense_cell], kinds == kind)
            if found.span and found.span[0] > self.task.chance(kind):
                good.append(kind)
        return good

    @property
    def advises(self) -> bool:
        """Whether a recommendation may rest on it: the dense model does the task, and most of its kinds."""
        return self.telling and 2 * len(self.answered) > len(self.by_kind(self.dense_cell))


@dataclass(frozen=True, eq=False)
class Several:
    """Several tasks of one model, or of several. Means count the telling ones, each the same."""

    tasks: Sequence[Results]

    @property
    def model(self) -> str:
        return self.tasks[0].model

    @cached_property
    def telling(self) -> list[Results]:
        return [results for results in self.tasks if results.telling]

    @property
    def shown(self) -> Sequence[Results]:
        """Those that a report gives a tab: not those that say nothing but that the model cannot do them."""
        return [r for r in self.tasks if r.telling or not r.enough] or self.tasks[:1]

    @property
    def budgets(self) -> list[float]:
        return sorted({budget for results in self.tasks for budget in results.budgets}, reverse=True)

    @cached_property
    def rows(self) -> dict[Cell, Mean]:
        rows = {}
        for cell in dict.fromkeys(cell for results in self.tasks for cell in results.facts if cell.method != DENSE):
            kept = {results: results.rows[cell].kept for results in self.tasks if cell in results.facts}
            counted = [results for results in self.telling if cell.budget in results.budgets]
            rows[cell] = Mean(cell.method, cell.budget, kept)
            if counted and all(results in kept for results in counted):
                cost = [np.mean([r.facts[cell][key] for r in counted]).item() for key in ("mean_keep", "flops")]
                rows[cell] = Mean(cell.method, cell.budget, kept, mean([kept[r] for r in counted]), *cost)
        return rows

    def at(self, budget: float) -> list[Mean]:
        """Rows of the methods at a budget, best first; those without a mean last."""
        rows = [row for cell, row in self.rows.items() if cell.budget == budget]
        return sorted(rows, key=lambda row: (-row.kept.at if row.kept else 1, row.method))

    def best(self, budget: float, fits: Callable[[str], bool] = lambda name: True) -> Mean | None:
        """The row with the best mean at a budget, of the methods that fit, if any has one."""
        return next((row for row in self.at(budget) if row.kept and fits(row.method)), None)


def rival(rows: Sequence[Any], row: Any) -> Any:
    """The first other baseline of rows that are sorted, of one task or means, if one has a number."""
    known = baselines() + baselines(pictures=False)
    return next((r for r in rows if r.method in known and r.method != row.method and r.kept), None)


def shares(results: Results, cells: Sequence[Cell], chosen: np.ndarray) -> list[Number]:
    """What each cell gets right of the chosen questions, at least one; intervals over the items that have such."""
    sums = np.stack([results.hits(cell, chosen) for cell in cells])  # [cells, items, 2]
    right, asked = np.moveaxis(sums[:, sums[0, :, 1] > 0], -1, 0)
    draws: Sequence[Any] = redrawn(right, asked) if results.enough else [None] * len(cells)
    return [Number(float(at), drawn) for at, drawn in zip(right.sum(1) / asked.sum(1), draws)]


# --- reading and writing


def summarise(
    about: Mapping[str, Any],
    lines: Mapping[Cell, Mapping[int, Mapping[str, Any]]],
    told: Mapping[Cell, Mapping[str, Any]],
    refused: Mapping[Cell, str],
    faults: Mapping[Cell, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """What a sweep.json holds, from the answers: cell -> item -> line of its file. told: options of a cell. refused:
    why a cell is no result; faults: likewise, where that is an error.

    "kinds" are those of the questions, "right" the answers: items apart by spaces. "accuracy" and its "interval" are
    for the eye; readers make them anew."""
    count = about["items"]
    dense = next(line for cell, line in lines.items() if cell.method == DENSE)
    kinds = " ".join(",".join(kind for kind, *_ in dense[i]["answers"]) for i in range(count))
    rows = []
    for cell, line in lines.items():
        same = [a[2] == b[2] for i in range(count) for a, b in zip(line[i]["answers"], dense[i]["answers"])]
        costs = {key: [line[i][key] for i in range(count)] for key in COSTS if key in line[0]}
        numbers = {key: float((np.median if key == "seconds" else np.mean)(all_)) for key, all_ in costs.items()}
        row: dict[str, Any] = {"method": cell.method, "budget": cell.budget}
        row |= {"options": dict(told[cell])} if told.get(cell) else {}
        row["right"] = " ".join("".join(str(int(ok)) for ok in line[i]["right"]) for i in range(count))
        rows.append(row | {"agreement": float(np.mean(same))} | numbers)
    row_of = lambda cell, why: {"method": cell.method, "budget": cell.budget, "reason": why}
    listed = [row_of(*pair) | {"fault": True} for pair in faults.items()] + [row_of(*p) for p in refused.items()]
    summary = {"about": {**about, "kinds": kinds}, "cells": rows, "refused": listed}
    found = of(summary, whole=True)
    for row, known in zip(rows, found.rows.values()):
        row |= {"accuracy": known.accuracy.at, "interval": known.accuracy.span}
    return json.loads(json.dumps(summary))


def of(summary: Mapping[str, Any], file: str = "", whole: bool = False) -> Results:
    """The results that a sweep.json holds. whole: with what ran at a budget of 1 among the cells."""
    facts = {Cell(row["method"], row["budget"]): row for row in summary["cells"]}
    full = [] if whole else [cell for cell in facts if cell.method != DENSE and cell.budget == 1]
    left = {cell.method: facts.pop(cell) for cell in full}
    return Results(summary["about"], summary["refused"], facts, left, file)


def read(folder: str | Path) -> list[Results]:
    """All results in a folder, by model and task: those of `vtok eval`, of one task (sweep.json), several
    (TASK/sweep.json) or several models (MODEL/TASK/sweep.json), or those of model cards, (MODEL/)sweep/TASK.json.

    Raises `InvalidValue` for a file that is none, and for a run that has not finished.
    """
    folder, found = Path(folder), []
    for place in sorted(file.parent for pattern in ("", "*/", "*/*/") for file in folder.glob(f"{pattern}about.json")):
        if not (place / "sweep.json").is_file():
            raise InvalidValue(f"The run in {place} has not finished: call `vtok eval --out` again.")
    for file in sorted(file for pattern in PATTERNS for file in folder.glob(pattern)):
        try:
            results = of(json.loads(file.read_text()), file.relative_to(folder).as_posix())
            about = results.about
            about["machine"]["commit"], about["test_set"]["version"], about["weights"], about["dtype"], results.refused
            if not results.budgets or any(len(right) != len(results.questions) for right in results.right.values()):
                raise InvalidValue(
                    f"{file} is not complete: nothing was run at a budget below 1, or answers are missing."
                )
        except (OSError, UnicodeDecodeError, KeyError, TypeError, AttributeError, StopIteration, ValueError) as error:
            if isinstance(error, InvalidValue):
                raise
            raise InvalidValue(
                f"{file} is no summary that `vtok eval` of this version wrote ({type(error).__name__}: {error}): call "
                "`vtok eval` with the same folder again, which asks nothing twice."
            ) from error
        found.append(results)
    return sorted(found, key=lambda results: (results.model, results.about["task"]))


def load(folder: str | Path) -> list[Several]:
    """The results in a folder, model by model. Raises `InvalidValue` as `read`, where there are none, and where one is
    there twice."""
    models: dict[str, list[Results]] = {}
    for results in read(folder):
        others = models.setdefault(results.model, [])
        if any(other.about["task"] == results.about["task"] for other in others):
            raise InvalidValue(f"{folder} holds {results.about['task']} of {results.model} twice.")
        if any(other.about[key] != results.about[key] for other in others for key in ("weights", "dtype")):
            raise InvalidValue(
                f"{folder} holds results of {results.model} with several weights or data types: report them apart."
            )
        others.append(results)
    if not models:
        raise InvalidValue(f"{folder} holds no sweep.json: give a folder that `vtok eval --out` has filled.")
    return [Several(tasks) for tasks in models.values()]


# --- a table for the terminal


def table(summary: Mapping[str, Any]) -> Table:
    """A sweep.json in 80 columns."""
    results, drawn = of(summary, whole=True), Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("method", "budget", "kept", "exact match", "95 %", "to dense", "to best baseline"):
        wide = name == "method"
        drawn.add_column(name, justify="left" if wide else "right", no_wrap=not wide, overflow="fold" if wide else None)
    for row in results.rows.values():
        dense, rival, limits = row is results.dense, results.rival(row), row.accuracy.span
        drawn.add_row(
            row.method,
            f"{row.budget:g}",
            f"{row.facts.get('mean_keep', 1.0):.3f}",
            f"{100 * row.accuracy.at:.1f}",
            "{:.1f}-{:.1f}".format(*(100 * x for x in limits)) if limits else "too few",
            "" if dense else signed(row.to_dense.at),
            f"{signed((row.accuracy - rival.accuracy).at)} {rival.method}" if rival and not dense else "",
            style="bold" if dense else None,
        )
    return drawn


def signed(share: float) -> str:
    return f"{100 * share:+.1f}"
