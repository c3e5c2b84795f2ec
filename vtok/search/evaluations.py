"""The scores of schedules that a search asked for, each computed once, and kept in a file that outlives a kill."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vtok.errors import InvalidValue
from vtok.files import write_json
from vtok.search import schedules


class Evaluations:
    """A metric of schedules (more is better) with a memory.

    metric: rates -> score. file: JSON to keep all scores in, or None; what it already holds is not computed again.
    settings: all that a score or the order of the search depends on, as plain JSON. A file with other settings is
        refused. about: where this run takes place (machine, commit, command), noted once a run.
    """

    def __init__(
        self,
        metric: Callable[[schedules.Rates], float],
        file: str | os.PathLike[str] | None = None,
        settings: dict[str, Any] | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.metric = metric
        self.file = None if file is None else Path(file)
        self.log: dict[str, Any] = {"settings": settings or {}, "runs": [], "evaluations": [], "result": None}
        if self.file is not None and self.file.exists():
            self.log = self._resume(self.log["settings"])
        self.log["runs"].append(about or {})
        self.known = {tuple(item["rates"]): item["score"] for item in self.log["evaluations"]}
        self.asked: list[tuple[schedules.Rates, float]] = []  # by this run, in order, those known before too

    def _resume(self, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            log = json.loads(self.file.read_text())
            before = log["settings"]
            whole = all({"rates", "score"} <= item.keys() for item in log["evaluations"]) and log["runs"] is not None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise InvalidValue(f"{str(self.file)!r} is not the trace of a search. Take another folder, or delete it.")
        if before != settings:
            names = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
            raise InvalidValue(
                f"{str(self.file)!r} is the trace of a search with another {', '.join(names)}. "
                f"Take another folder, or delete it."
            )
        return log

    def __call__(self, rates: Sequence[float]) -> float:
        rates = schedules.check(rates)
        if rates not in self.known:
            began = time.perf_counter()
            score = float(self.metric(rates))
            if not math.isfinite(score):
                raise InvalidValue(f"The metric of the schedule {rates} is {score}, which cannot be compared.")
            seconds = time.perf_counter() - began
            self.known[rates] = score
            self.log["evaluations"].append(
                {"rates": list(rates), "mean_keep": schedules.mean(rates), "score": score, "seconds": seconds}
            )
            self._write()
        self.asked.append((rates, self.known[rates]))
        return self.known[rates]

    def finish(self, result: dict[str, Any]) -> None:
        """Note what the search found."""
        self.log["result"] = result
        self._write()

    def _write(self) -> None:
        if self.file is not None:
            write_json(self.file, self.log)
