"""What the summaries of `vtok eval` say: how much of the dense model's accuracy a method keeps on a task."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtok import zoo
from vtok.eval.results.results import summaries
from vtok.eval.results.sweep import DENSE, difference, per_item
from vtok.eval.tasks import task
from vtok.markdown import percent
from vtok.patching import available


@dataclass(frozen=True)
class Kept:
    """A part of the dense model's accuracy, and its 95 % interval."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{percent(self.share)} ({percent(self.low)} to {percent(self.high)})"


@dataclass(frozen=True)
class Evidence:
    """One task of one model."""

    model: str
    family: str  # "" where it is not known
    task: str
    about: dict[str, Any]
    dense: dict[str, Any]
    cells: dict[tuple[str, float], dict[str, Any]]
    refused: list[dict[str, Any]]

    @property
    def telling(self) -> bool:
        """Whether the dense model is above chance beyond its interval."""
        chances = [task.get(self.task).chance(category) for category in self.dense["categories"]]
        return self.dense["interval"][0] > sum(chances) / len(chances)

    @property
    def budgets(self) -> list[float]:
        """Those that spare something."""
        return sorted({budget for _, budget in self.cells if budget < 1}, reverse=True)

    def kept(self, method: str, budget: float) -> Kept:
        row, dense = self.cells[method, budget], self.dense["accuracy"]
        low, high = row["to_dense"]["interval"]
        return Kept(row["accuracy"] / dense, 1 + low / dense, 1 + high / dense)

    def lead(self, method: str, other: str, budget: float) -> Kept:
        """How much more a method keeps than another, paired over items."""
        gap = difference(*(per_item(self.cells[name, budget]) for name in (method, other)))
        return Kept(*(share / self.dense["accuracy"] for share in (gap["difference"], *gap["interval"])))


def read(folder: str | Path) -> list[Evidence]:
    """From all summaries in a folder (see `results.summaries`)."""
    return [_evidence(summary) for summary in summaries(folder)]


def _evidence(summary: dict[str, Any]) -> Evidence:
    about, rows = summary["about"], summary["cells"]
    cells = {(row["method"], row["budget"]): row for row in rows if row["method"] != DENSE}
    dense = next(row for row in rows if row["method"] == DENSE)
    return Evidence(about["model"], _family(about["model"]), about["task"], about, dense, cells, summary["refused"])


def _family(model: str) -> str:
    """Of a bundled model; of others the summary does not tell."""
    if model not in zoo.names():
        return ""
    kind = json.loads((zoo.path(model) / "config.json").read_text())["model_type"]
    return next(name for name, facts in available()["adapters"].items() if kind in facts["model_types"])


def mean(kept: Sequence[Kept]) -> Kept:
    """Of independent test sets: the squares of half-widths add up."""
    share = sum(k.share for k in kept) / len(kept)
    below = math.hypot(*(k.share - k.low for k in kept)) / len(kept)
    above = math.hypot(*(k.high - k.share for k in kept)) / len(kept)
    return Kept(share, share - below, share + above)
