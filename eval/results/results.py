"""What `vtok eval` measured, read back from its folders, and the numbers that reports make of it.

Every number is computed here from the answers in the folders' JSON lines; of a sweep.json only the list of cells with
their options, what was refused and the provenance are taken. Nothing in a folder is changed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vtok.compressor import load_all
from vtok.errors import InvalidValue
from vtok.eval.results import sweep
from vtok.eval.results.sweep import BASELINES, DENSE, Cell
from vtok.eval.tasks import task

FILTER = "downsample"  # whose mistakes are the questions that need visual detail
SAME_COST = 0.05  # costs that differ by less than this part count as equal on a Pareto front
WORTH = 0.9  # of the dense accuracy, that the headline's method keeps at as small a budget as can be
DRAWS = 4000  # of a bootstrap


@dataclass(frozen=True)
class Results:
    """A complete folder of `vtok eval`: one task of one model.

    about, refused: as in sweep.json. lines: cell -> item -> line of its file. rows: cell -> its row of
    `sweep.summarise`, the dense model's first. Both without what ran at a budget of 1, which spares nothing: of that
    there is `whole`, method -> its row.
    """

    about: dict[str, Any]
    refused: list[dict[str, Any]]
    lines: dict[Cell, dict[int, dict[str, Any]]]
    rows: dict[Cell, dict[str, Any]]
    whole: dict[str, dict[str, Any]]

    @cached_property
    def task(self) -> task.Task:
        return task.get(self.about["task"])

    @property
    def dense(self) -> dict[str, Any]:
        return self.rows[self.dense_cell]

    @property
    def dense_cell(self) -> Cell:
        return next(cell for cell in self.rows if cell.method == DENSE)

    @property
    def budgets(self) -> list[float]:
        return sorted({cell.budget for cell in self.rows if cell.method != DENSE}, reverse=True)

    def at(self, budget: float) -> list[dict[str, Any]]:
        """Rows of the methods at a budget, best first."""
        rows = [row for cell, row in self.rows.items() if cell.method != DENSE and cell.budget == budget]
        return sorted(rows, key=lambda row: (-row["accuracy"], row["method"]))

    def answers(self, cell: Cell) -> list[tuple[int, str, bool]]:
        """(item, category, right) of each question, in the same order for every cell."""
        lines = [self.lines[cell][i] for i in range(self.about["items"])]
        return [
            (i, category, right)
            for i, line in enumerate(lines)
            for (category, *_), right in zip(line["answers"], line["right"])
        ]

    @cached_property
    def chance(self) -> float:
        """Share that drawing answers by lot gets right, of these very questions."""
        return float(np.mean([self.task.chance(category) for _, category, _ in self.answers(self.dense_cell)]))

    @property
    def telling(self) -> bool:
        """Whether the dense model is above chance beyond its interval; if not, there is nothing to lose or keep."""
        return self.dense["interval"][0] > self.chance

    def hits(self, cell: Cell, chosen: Sequence[bool] | None = None) -> np.ndarray:
        """[items, 2] right answers and questions of each item, of the chosen questions or all."""
        sums = np.zeros((self.about["items"], 2))
        for i, (item, _, right) in enumerate(self.answers(cell)):
            if chosen is None or chosen[i]:
                sums[item] += right, 1
        return sums

    @cached_property
    def redrawn(self) -> dict[Cell, np.ndarray]:
        """Cell -> [DRAWS] its retention when items are redrawn whole, the same ones for every cell."""
        count = self.about["items"]
        rng = np.random.default_rng(zlib.crc32(self.about["task"].encode()))
        times = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.float32)  # [DRAWS, items]
        right = {cell: times @ self.hits(cell)[:, 0].astype(np.float32) for cell in self.rows}  # [DRAWS] each
        dense = np.maximum(right[self.dense_cell], 1)  # few items can be drawn so that all its answers are wrong
        return {cell: hits / dense for cell, hits in right.items()}


@dataclass(frozen=True)
class Model:
    """All tasks that one model was asked. Means over tasks are of its telling ones."""

    tasks: tuple[Results, ...]

    @property
    def name(self) -> str:
        return self.tasks[0].about["model"]

    @property
    def telling(self) -> list[Results]:
        return [results for results in self.tasks if results.telling]

    @property
    def shown(self) -> Sequence[Results]:
        """Those that a report gives a tab: the telling ones, or a task that is alone."""
        return self.tasks if len(self.tasks) == 1 else self.telling

    @property
    def budgets(self) -> list[float]:
        return sorted({budget for results in self.tasks for budget in results.budgets}, reverse=True)

    @cached_property
    def rows(self) -> dict[Cell, dict[str, Any]]:
        """Cell -> "tasks": task -> accuracy as a part of the dense model's; and for cells that ran on all telling
        tasks the means over these: "retention" with its "interval" and its bootstrap "draws", "mean_keep", "flops"."""
        rows = {}
        for cell in dict.fromkeys(cell for results in self.tasks for cell in results.rows if cell.method != DENSE):
            ran = [results for results in self.tasks if cell in results.rows]
            row: dict[str, Any] = {"method": cell.method, "budget": cell.budget}
            row["tasks"] = {r.about["task"]: retention(r.rows[cell], r.dense) for r in ran}
            counted = self.telling
            if counted and all(cell in results.rows for results in counted):
                row["retention"] = float(np.mean([row["tasks"][results.about["task"]] for results in counted]))
                row["draws"] = np.mean([results.redrawn[cell] for results in counted], axis=0)  # [DRAWS]
                row["interval"] = np.percentile(row["draws"], [2.5, 97.5]).tolist()
                for key in ("mean_keep", "flops"):
                    row[key] = float(np.mean([results.rows[cell][key] for results in counted]))
            rows[cell] = row
        return rows

    def at(self, budget: float) -> list[dict[str, Any]]:
        """Rows of the methods at a budget, best first; those without a mean last."""
        rows = [row for cell, row in self.rows.items() if cell.budget == budget]
        return sorted(rows, key=lambda row: (-row.get("retention", -1), row["method"]))

    def best(self, budget: float) -> dict[str, Any] | None:
        """The row with the best mean at a budget, if any has one."""
        return next((row for row in self.at(budget) if "retention" in row), None)


def retention(row: dict[str, Any], dense: dict[str, Any]) -> float:
    """Accuracy as a part of the dense model's; NaN where that has none."""
    return row["accuracy"] / dense["accuracy"] if dense["accuracy"] else float("nan")


def load(folder: str | Path) -> list[Model]:
    """The results in a folder: of one task, of several (FOLDER/TASK), or of several models (FOLDER/MODEL/TASK).

    Raises `InvalidValue` where it is not one that `vtok eval` has filled, or not complete.
    """
    folder = Path(folder)
    for level in ([folder], folder.glob("*"), folder.glob("*/*")):
        places = [place for place in sorted(level) if (place / "about.json").is_file() or _summary(place).is_file()]
        if places:
            break
    else:
        raise InvalidValue(f"{folder} holds no sweep.json: give a folder that `vtok eval --out` has filled.")
    models: dict[str, dict[str, Results]] = {}
    for place in places:
        results = _load(place)
        name, tasks = results.about["model"], models.setdefault(results.about["model"], {})
        if results.about["task"] in tasks:
            raise InvalidValue(f"{folder} holds {results.about['task']} of {name} twice.")
        if any(other.about[key] != results.about[key] for other in tasks.values() for key in ("weights", "dtype")):
            raise InvalidValue(
                f"{folder} holds results of {name} with several weights or data types: report them apart."
            )
        tasks[results.about["task"]] = results
    return [Model(tuple(tasks.values())) for tasks in models.values()]


def summaries(folder: str | Path) -> list[dict[str, Any]]:
    """The sweep.json of every task in a folder that `vtok eval` has filled, or in one of model cards, where they are
    committed without their answers as MODEL/sweep/TASK.json (or MODEL/sweep.json for one task); one model or several.

    Raises `InvalidValue` for a file that is none.
    """
    found = []
    for pattern in ("sweep.json", "sweep/*.json", "*/sweep.json", "*/sweep/*.json", "*/*/sweep.json"):
        for file in sorted(Path(folder).glob(pattern)):
            try:
                summary = json.loads(file.read_text())
                summary["about"]["task"], summary["about"]["model"], summary["refused"]
                [row["items"] for row in summary["cells"]]
            except (OSError, UnicodeDecodeError, KeyError, TypeError, json.JSONDecodeError) as error:
                raise InvalidValue(f"{file} is no summary that `vtok eval` of this version wrote.") from error
            found.append(summary)
    return sorted(found, key=lambda summary: (summary["about"]["model"], summary["about"]["task"]))


def not_run(refused: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """(method, why) -> budgets, of the `refused` of a sweep.json; reasons that differ in the budget alone are one."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in refused:
        why = row["reason"]
        for words in ("budget of", "mean keep of"):
            why = why.replace(f"{words} {row['budget']:g}", f"{words} that size")
        found.setdefault((row["method"], why), []).append(row["budget"])
    return found


def _summary(folder: Path) -> Path:
    return folder / "sweep.json"


def _load(folder: Path) -> Results:
    """Of one task."""
    if not _summary(folder).is_file():
        raise InvalidValue(f"The run in {folder} has not finished: call `vtok eval --out` again.")
    try:
        summary = json.loads(_summary(folder).read_text())
        about, refused, count = summary["about"], summary["refused"], summary["about"]["items"]
        cells = [Cell(row["method"], row["budget"]) for row in summary["cells"]]
        about["machine"]["commit"], about["test_set"]["version"], about["model"], about["weights"], about["dtype"]
        about["task"], about["instruction"]
        lines = {cell: sweep.read(folder / cell.file, missing=False) for cell in cells}
        short = [cell for cell, known in lines.items() if not set(range(count)) <= set(known)]
        full = [cell for cell in cells if cell.method != DENSE and cell.budget == 1]
        if short or len(cells) == 1 + len(full):
            lacks = f"{short[0].file} lacks items" if short else "nothing was run at a budget below 1"
            raise InvalidValue(f"The results in {folder} are not complete ({lacks}): call `vtok eval` again.")
        rows = dict(zip(cells, sweep.summarise(lines, count)))
        for cell, row in zip(cells, summary["cells"]):
            rows[cell] |= {key: row[key] for key in ("options",) if key in row}
    except FileNotFoundError as error:
        raise InvalidValue(f"{folder} lacks {Path(error.filename).name}, which its sweep.json sums up.") from error
    except (OSError, UnicodeDecodeError, KeyError, TypeError, IndexError, StopIteration, json.JSONDecodeError) as error:
        raise InvalidValue(
            f"{folder} holds a sweep.json, but not one that `vtok eval` of this version wrote with its answers beside "
            f"it ({type(error).__name__}: {error})."
        ) from error
    whole = {cell.method: rows.pop(cell) for cell in full}
    for cell in full:
        del lines[cell]
    return Results(about, refused, lines, rows, whole)


def at_all(whole: Mapping[str, float]) -> str:
    """What became of the answers where nothing was to be dropped, from method -> share of them that are those of the
    dense model; "" where nothing ran so."""
    changed = sorted(name for name, agreement in whole.items() if agreement < 1)
    which = f"all methods but {', '.join(changed)}" if changed else "all methods"
    return f"At 100 % of the tokens {which} give every answer of the dense model." if whole else ""


def front(points: Mapping[Any, tuple[float, float]], same: float = SAME_COST) -> list[Any]:
    """Of key -> (cost, accuracy) the keys that no other beats: none is more accurate at a cost that is lower, or
    higher by a part `same` at most. Cheapest first."""
    best = [
        key
        for key, (cost, gain) in points.items()
        if not any(c <= cost * (1 + same) and g > gain for c, g in points.values())
    ]
    return sorted(best, key=lambda key: points[key])


def leaders(models: Sequence[Model], count: int) -> list[str]:
    """The `count` methods that retain most on average over models, tasks and budgets, of those that ran at the most
    budgets; no baselines."""
    kept: dict[str, list[float]] = {}
    budgets: dict[str, set[float]] = {}
    for results in (results for model in models for results in model.tasks):
        for cell, row in results.rows.items():
            if cell.method != DENSE and cell.method not in BASELINES:
                kept.setdefault(cell.method, []).append(np.nan_to_num(retention(row, results.dense)))
                budgets.setdefault(cell.method, set()).add(cell.budget)
    most = max(map(len, budgets.values()), default=0)
    full = [name for name in kept if len(budgets[name]) == most]
    return sorted(full, key=lambda name: (-np.mean(kept[name]), name))[:count]


def headline(results: Results) -> dict[str, Any]:
    """The row of the best method at the smallest budget at which it keeps `WORTH` of the dense accuracy, else at the
    largest budget."""
    best = [results.at(budget)[0] for budget in results.budgets]
    return _smallest(best, lambda row: row["accuracy"] >= WORTH * results.dense["accuracy"])


def overall(model: Model) -> dict[str, Any] | None:
    """The same by mean retention over a model's telling tasks; None where no method has one."""
    best = [row for budget in model.budgets if (row := model.best(budget)) is not None]
    return _smallest(best, lambda row: row["retention"] >= WORTH) if best else None


def _smallest(best: list[dict[str, Any]], worth: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    good = [row for row in best if worth(row)]
    return good[-1] if good else best[0]


def tied(results: Results, row: dict[str, Any]) -> list[str]:
    """Methods at the row's budget whose paired difference to it has an interval that holds 0."""
    own = results.hits(Cell(row["method"], row["budget"]))
    names = []
    for other in results.at(row["budget"]):
        low, high = sweep.difference(own, results.hits(Cell(other["method"], other["budget"])))["interval"]
        if other is not row and low <= 0 <= high:
            names.append(other["method"])
    return names


def paired(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The difference of two mean retentions of one model, with its interval."""
    spread = np.percentile(row["draws"] - other["draws"], [2.5, 97.5]).tolist()
    return {"difference": row["retention"] - other["retention"], "interval": spread}


def tied_overall(model: Model, row: dict[str, Any]) -> list[str]:
    """As `tied`, by mean retention."""
    others = [other for other in model.at(row["budget"]) if "retention" in other and other is not row]
    spans = {other["method"]: paired(other, row)["interval"] for other in others}
    return [name for name, (low, high) in spans.items() if low <= 0 <= high]


def filtered(results: Results, budget: float) -> dict[str, Any] | None:
    """The filter of VTC-Bench: the questions that the dense model gets right, divided by whether `downsample` at the
    same budget gets them wrong ("hard", they need detail) or right ("easy").

    Returns their numbers and method -> (accuracy, interval) on each, or None where `downsample` was not run. The dense
    model has 1 on both and `downsample` 0 and 1 by construction.
    """
    cell = Cell(FILTER, budget)
    if cell not in results.lines:
        return None
    dense = [right for *_, right in results.answers(results.dense_cell)]
    small = [right for *_, right in results.answers(cell)]
    groups = {"hard": [d and not s for d, s in zip(dense, small)], "easy": [d and s for d, s in zip(dense, small)]}
    found: dict[str, Any] = {name: sum(chosen) for name, chosen in groups.items()}
    found["methods"] = {
        row["method"]: {name: _share(results.hits(Cell(row["method"], budget), c)) for name, c in groups.items()}
        for row in results.at(budget)
        if row["method"] != FILTER
    }
    return found


def _share(sums: np.ndarray) -> tuple[float, list[float]] | None:
    """Accuracy and its interval over the items that have such questions; None without any."""
    sums = sums[sums[:, 1] > 0]
    return (sums[:, 0].sum() / sums[:, 1].sum(), sweep.interval(*sums.T)) if len(sums) else None


def drift(results: Results) -> tuple[float, float] | None:
    """The least and most time of what ran at a budget of 1 and so dropped nothing, as a part of the dense model's: what
    the machine alone makes of times. Without methods that act in decoding, which do so at any budget, and those that
    are not installed, of which that is not known. None where nothing ran so."""
    prefill = {name for name, cls in load_all().items() if "decode" not in cls.stage}
    idle = [row for name, row in results.whole.items() if name in prefill and row["agreement"] == 1]
    times = [row["seconds"] / results.dense["seconds"] for row in idle]
    return (min(times), max(times)) if times else None
