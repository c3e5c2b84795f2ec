"""The sweep behind `vtok eval`: accuracy of every method at every budget on a bundled model's held-out questions.

One file of JSON lines a cell (method at budget), one line a scene, so that a run that was killed goes on where it
stopped. `summarise` makes of them the numbers that cards and reports show; accuracy differences are paired, with
intervals from a bootstrap over scenes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vtok.compressor import load_all
from vtok.errors import InvalidValue, UnknownName, VtokError
from vtok.eval.machine import describe
from vtok.patching import patch
from vtok.zoo import evaluate, scenes

DENSE = "dense"
BASELINES = ("random", "pool", "downsample")  # what a method has to beat
BUDGETS = (0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Cell:
    """One method at one budget: the mean over decoder layers of kept over all visual tokens is at most that."""

    method: str
    budget: float

    @property
    def file(self) -> str:
        return f"{self.method}@{self.budget:g}.jsonl"


def training_free() -> list[str]:
    """Names of the compressors that need no weights of their own, baselines first."""
    names = [name for name, cls in load_all().items() if not cls.trained]
    return sorted(names, key=lambda name: (name not in BASELINES, name))


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
        patch(model, cell.method, budget=cell.budget).remove()
    except VtokError as error:
        return str(error)
    return None


def run_cell(model: Any, processor: Any, cell: Cell, count: int, path: Path, step: Callable[[], None]) -> None:
    """Ask about the first `count` test scenes those that `path` does not hold yet; append a line for each.

    Raises `AssertionError` if a method dropped nothing, since its numbers would be those of the dense model.
    """
    done = read(path)
    with patch(model, cell.method, budget=cell.budget) if cell.method != DENSE else nullcontext() as handle:
        for index, (scene, asked) in enumerate(evaluate.held_out(count)):
            if index not in done:
                began = time.perf_counter()
                said = evaluate.answer(model, processor, scene.image, [q.text for q in asked])
                line: dict[str, Any] = {"scene": index, "seconds": time.perf_counter() - began}
                line["answers"] = [[q.category, q.answer, text] for q, text in zip(asked, said)]
                if handle is not None:
                    trace = handle.trace
                    if cell.budget < 1 and trace.mean_keep >= 1:
                        raise AssertionError(f"{cell.method} at {cell.budget} dropped nothing on scene {index}.")
                    flops = trace.flops()
                    share = {kind: sum(flops[kind][phase] for phase in ("encoder", "prefill")) for kind in flops}
                    line |= {"mean_keep": trace.mean_keep, "selection_seconds": trace.selection_seconds}
                    line |= {"flops": share["compressed"] / share["dense"]}
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            step()


def read(path: Path) -> dict[int, dict[str, Any]]:
    """Scene -> line of a cell's file. Cuts off a last line that a kill left unfinished."""
    if not path.exists():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return {line["scene"]: line for line in map(json.loads, whole.splitlines())}


def run(
    model: Any,
    processor: Any,
    name: str,
    methods: Sequence[str] | None,
    budgets: Sequence[float],
    count: int,
    out: Path,
) -> dict[str, Any]:
    """Run what is missing in the folder `out`, with a progress bar, and return the summary, also written to its
    sweep.json.

    Raises `InvalidValue` if `out` holds the results of other weights or another test set.
    """
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "model": name,
        "weights": fingerprint(model),
        "test_set": {"version": scenes.VERSION, "seed": evaluate.TEST_SEED},
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    stamp = out / "about.json"
    if stamp.exists() and json.loads(stamp.read_text()) != about:
        raise InvalidValue(
            f"{out} holds results of {json.loads(stamp.read_text())}, not of {about}: take another folder."
        )
    stamp.write_text(json.dumps(about) + "\n")
    wanted, refused = [], {}
    for cell in cells(methods, budgets):
        reason = refusal(model, cell)
        if reason is None:
            wanted.append(cell)
        else:
            refused[cell] = reason
    with _bar() as bar:
        whole = bar.add_task("", total=len(wanted) * count)
        for cell in wanted:
            bar.update(whole, description=f"{cell.method} at {cell.budget:g}")
            run_cell(model, processor, cell, count, out / cell.file, lambda: bar.advance(whole))
    summary = {"about": about | {"scenes": count, "machine": describe(model.device.type, about["dtype"])}}
    summary["cells"] = summarise({cell: read(out / cell.file) for cell in wanted}, count)
    summary["refused"] = [{"method": c.method, "budget": c.budget, "reason": why} for c, why in refused.items()]
    (out / "sweep.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _bar() -> Progress:
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def fingerprint(model: Any) -> str:
    """Of the weights: 12 hex digits of a hash of all of them."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:12]


def summarise(lines: dict[Cell, dict[int, dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """Of each cell: accuracy by category and over all questions, the paired difference to dense and to the best
    baseline at the same budget (95 % bootstrap intervals over scenes), agreement with dense, and what it cost."""
    hits = {cell: np.array([_hits(scene[i]) for i in range(count)]) for cell, scene in lines.items()}  # [scenes, 2]
    dense = next(cell for cell in lines if cell.method == DENSE)
    rows = []
    for cell, scene in lines.items():
        asked = [(i, n, *answer) for i in range(count) for n, answer in enumerate(scene[i]["answers"])]
        same = [said == lines[dense][i]["answers"][n][2] for i, n, _, _, said in asked]
        row = {"method": cell.method, "budget": cell.budget, "n": len(asked)}
        row["accuracy"] = hits[cell][:, 0].sum() / len(asked)
        row["interval"] = interval(hits[cell][:, 0], hits[cell][:, 1])
        row["categories"] = {
            c: float(np.mean([said == truth for *_, category, truth, said in asked if category == c]))
            for c in scenes.CATEGORIES
            if any(category == c for *_, category, _, _ in asked)
        }
        row["agreement"] = float(np.mean(same))
        row["seconds"] = float(np.median([scene[i]["seconds"] for i in range(count)]))
        if cell != dense:
            for key in ("mean_keep", "flops", "selection_seconds"):
                row[key] = float(np.mean([scene[i][key] for i in range(count)]))
            row["to_dense"] = _difference(hits[cell], hits[dense])
            rivals = [r for r in lines if r.method in BASELINES and r.budget == cell.budget and r != cell]
            if rivals:
                best = max(rivals, key=lambda r: hits[r][:, 0].sum())
                row["to_baseline"] = {"baseline": best.method, **_difference(hits[cell], hits[best])}
        rows.append(row)
    return rows


def _hits(line: dict[str, Any]) -> tuple[int, int]:
    return sum(truth == said for _, truth, said in line["answers"]), len(line["answers"])


def _difference(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    gain = one[:, 0] - other[:, 0]
    return {"difference": float(gain.sum() / one[:, 1].sum()), "interval": interval(gain, one[:, 1])}


def interval(values: np.ndarray, counts: np.ndarray, draws: int = 4000) -> list[float]:
    """95 % bootstrap interval of sum(values) / sum(counts), scenes redrawn whole."""
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return np.percentile(values[picks].sum(1) / counts[picks].sum(1), [2.5, 97.5]).tolist()


def table(summary: dict[str, Any]) -> Table:
    """The summary in 80 columns."""
    drawn = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("method", "budget", "kept", "exact match", "95 %", "to dense", "to best baseline"):
        drawn.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in summary["cells"]:
        low, high = row["interval"]
        rival = row.get("to_baseline")
        drawn.add_row(
            row["method"],
            f"{row['budget']:g}",
            f"{row.get('mean_keep', 1.0):.3f}",
            f"{100 * row['accuracy']:.1f}",
            f"{100 * low:.1f}-{100 * high:.1f}",
            signed(row["to_dense"]["difference"]) if "to_dense" in row else "",
            f"{signed(rival['difference'])} {rival['baseline']}" if rival else "",
            style="bold" if row["method"] == DENSE else None,
        )
    return drawn


def signed(share: float) -> str:
    return f"{100 * share:+.1f}"
