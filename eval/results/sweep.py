"""The sweep behind `vtok eval`: accuracy of every method at every budget on offline tasks.

A task has a folder of its own, in it one file of JSON lines a cell (method at budget), and one line an item, so that a
run that was killed goes on where it stopped. Several processes (`torchrun`) share the items of a cell, write a
file each, and in the end make one of them. `summarise` makes of all lines the numbers that cards and reports show;
accuracy differences are paired, with intervals from a bootstrap over items.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vtok.compressor import load_all
from vtok.errors import InvalidValue, VtokError
from vtok.eval.bench.machine import commit, describe
from vtok.eval.tasks.answers import answer
from vtok.eval.tasks.task import TEST_SEED, Item, Task
from vtok.methods import call
from vtok.methods import read as read_method
from vtok.patching import Patch, patch

DENSE = "dense"
BASELINES = ("random", "pool", "downsample")  # what a method has to beat
BUDGETED = {"tome": {"carry": True}}  # the parameters without which a method has no budget


@dataclass(frozen=True)
class Cell:
    """One method at one budget: the mean over decoder layers of kept over all visual tokens is at most that."""

    method: str
    budget: float

    @property
    def file(self) -> str:
        return f"{self.method}@{self.budget:g}.jsonl"

    def patch(self, model: Any) -> Patch:
        return patch(model, read_method(self.method)[0], budget=self.budget, **options(model, self.method))


def training_free() -> list[str]:
    """Names of the compressors that need no weights of their own, baselines first."""
    names = [name for name, cls in load_all().items() if not cls.trained]
    return sorted(names, key=lambda name: (name not in BASELINES, name))


def options(model: Any, method: str) -> dict[str, Any]:
    """What a method has to be told to run on this model at a budget."""
    name, told = call(model, method)
    return BUDGETED.get(name, {}) | told


def calls(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Methods that had to be told something, as in "tome(carry=True)"."""
    told = lambda row: ", ".join(f"{key}={value!r}" for key, value in row["options"].items())
    return sorted({f"{row['method'].partition(':')[0]}({told(row)})" for row in rows if "options" in row})


def cells(methods: Sequence[str] | None, budgets: Sequence[float]) -> list[Cell]:
    """The dense model and every method at every budget. Raises `UnknownName` and `InvalidValue`."""
    for name in methods or ():
        read_method(name)
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


@dataclass(frozen=True)
class Share:
    """Which of `world` processes this one is."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def of_accelerate() -> Share:
        """That of a process that `torchrun` or `accelerate launch` started; one of one in all others."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return Share()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())  # else it takes this process for the only one
        return Share(state.process_index, state.num_processes)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def run_cell(
    model: Any,
    processor: Any,
    task: Task,
    items: Sequence[Item],
    cell: Cell,
    path: Path,
    step: Callable[[], None],
    share: Share = Share(),
    instruction: str = "",
) -> None:
    """Ask about this process's share of the items that are not answered yet; append a line for each to its file."""
    done = read(path)
    own = path if share.world == 1 else path.with_suffix(f".{share.rank}{path.suffix}")
    with cell.patch(model) if cell.method != DENSE else nullcontext() as handle:
        for item in items[share.rank :: share.world]:
            if item.index not in done:
                began = time.perf_counter()
                said = answer(model, processor, item, instruction)
                line: dict[str, Any] = {"item": item.index, "seconds": time.perf_counter() - began}
                line["answers"] = [[q.category, q.answer, text] for q, text in zip(item.questions, said)]
                line["right"] = [task.score(q.answer, text) for q, text in zip(item.questions, said)]
                if handle is not None:
                    trace = handle.trace
                    flops = trace.flops()
                    sums = {kind: sum(flops[kind][phase] for phase in ("encoder", "prefill")) for kind in flops}
                    line |= {"mean_keep": trace.mean_keep, "selection_seconds": trace.selection_seconds}
                    line |= {"flops": sums["compressed"] / sums["dense"]}
                with own.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            step()


def untouched(cell: Cell, lines: dict[int, dict[str, Any]]) -> int:
    """Of how many of a cell's items the method dropped nothing although told to."""
    return sum(line["mean_keep"] >= 1 for line in lines.values()) if cell.budget < 1 else 0


def _parts(path: Path) -> list[Path]:
    """The files of a cell: its own, and those of processes that ran it together."""
    return [file for file in (path, *sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))) if file.exists()]


def read(path: Path, missing: bool = True) -> dict[int, dict[str, Any]]:
    """Item -> line of a cell's files. Leaves out a last line that a kill left unfinished, or that is being written.

    missing: whether there may be no file yet; else `FileNotFoundError` is raised."""
    found = {}
    for file in _parts(path) or ([] if missing else [path]):
        text = file.read_text()
        found |= {line["item"]: line for line in map(json.loads, text[: text.rfind("\n") + 1].splitlines())}
    return found


def mend(path: Path) -> None:
    """Make one file of a cell's files, in the order of the items, without unfinished lines. For one process alone."""
    parts = _parts(path)
    if not parts:
        return
    whole = path.with_suffix(".tmp")
    whole.write_text("".join(json.dumps(line) + "\n" for _, line in sorted(read(path).items())))
    whole.replace(path)
    for part in parts:
        if part != path:
            part.unlink()


def run(
    model: Any,
    processor: Any,
    name: str,
    task: Task,
    methods: Sequence[str] | None,
    budgets: Sequence[float],
    count: int | None,
    out: Path,
    share: Share = Share(),
    instruction: str = "",
) -> dict[str, Any]:
    """Run what is missing of one task in the folder `out`, with a progress bar, and return the summary, also written to
    its sweep.json.

    count: of the test items, or None for all. A cell that left some items whole, or all, is listed as refused: it is
    above its budget, and its numbers would be those of the dense model. Raises `InvalidValue` if `out` holds the
    results of other weights or another test set, and `Unsupported` if the model cannot take the task's media.
    """
    commit()  # is remembered as it is now
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "model": name,
        "task": task.name,
        "weights": fingerprint(model),
        "test_set": test_set(task),
        "dtype": str(model.dtype).removeprefix("torch."),
        "instruction": instruction,
    }
    stamp = out / "about.json"
    if stamp.exists() and json.loads(stamp.read_text()) != about:
        raise InvalidValue(
            f"{out} holds results of {json.loads(stamp.read_text())}, not of {about}: take another folder."
        )
    items = list(task.held_out(count))
    wanted, refused = [], {}
    for cell in cells(methods, budgets):
        reason = refusal(model, cell)
        if reason is None:
            wanted.append(cell)
        else:
            refused[cell] = reason
    if share.rank == 0:
        stamp.write_text(json.dumps(about) + "\n")
        for cell in wanted:
            mend(out / cell.file)
        complete = all(len(read(out / cell.file)) >= len(items) for cell in wanted)
    share.wait()
    with _bar(share) as bar:
        whole = bar.add_task("", total=len(wanted) * len(items[share.rank :: share.world]))
        for cell in wanted:
            bar.update(whole, description=f"{task.name}: {cell.method} at {cell.budget:g}")
            step = lambda: bar.advance(whole)
            run_cell(model, processor, task, items, cell, out / cell.file, step, share, instruction)
    share.wait()
    if share.rank == 0:
        for cell in wanted:
            mend(out / cell.file)
        summary = out / "sweep.json"
        # Where nothing was left to ask, the provenance stays that of the call that asked.
        if complete and summary.exists():
            machine = json.loads(summary.read_text())["about"]["machine"]
        else:
            machine = describe(model.device.type, about["dtype"])
        _write_summary(model, about | {"items": len(items), "machine": machine}, wanted, refused, summary)
    share.wait()
    return json.loads((out / "sweep.json").read_text())


def _write_summary(model: Any, about: dict[str, Any], wanted: list[Cell], refused: dict[Cell, str], file: Path) -> None:
    count, summary = about["items"], {"about": about}
    lines = {cell: read(file.with_name(cell.file)) for cell in wanted}
    for cell in wanted:
        if whole := untouched(cell, lines[cell]):
            refused = refused | {cell: f"It leaves {whole} of the {count} items whole, and so is above the budget."}
            del lines[cell]
    summary["cells"] = summarise(lines, count)
    for row in summary["cells"]:
        if row["method"] != DENSE and (told := options(model, row["method"])):
            row["options"] = told
    summary["refused"] = [{"method": c.method, "budget": c.budget, "reason": why} for c, why in refused.items()]
    part = file.with_suffix(".tmp")  # a kill leaves no half of the file, which a later call reads
    part.write_text(json.dumps(summary, indent=1) + "\n")
    part.replace(file)


def test_set(task: Task) -> dict[str, int]:
    return {"version": task.version, "seed": TEST_SEED}


def _bar(share: Share) -> Progress:
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=share.rank > 0)


def fingerprint(model: Any) -> str:
    """Of the weights: 12 hex digits of a hash of all of them."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:12]


def summarise(lines: dict[Cell, dict[int, dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """Of each cell: accuracy by category and over all questions, the paired difference to dense and to the best
    baseline at the same budget (95 % bootstrap intervals over items), agreement with dense, and what it cost."""
    hits = {cell: np.array([_hits(line[i]) for i in range(count)]) for cell, line in lines.items()}  # [items, 2]
    dense = next(cell for cell in lines if cell.method == DENSE)
    categories = list(dict.fromkeys(category for i in range(count) for category, *_ in lines[dense][i]["answers"]))
    rows = []
    for cell, line in lines.items():
        asked = [(i, n, *answer) for i in range(count) for n, answer in enumerate(line[i]["answers"])]
        right = [ok for i in range(count) for ok in line[i]["right"]]
        same = [said == lines[dense][i]["answers"][n][2] for i, n, _, _, said in asked]
        row = {"method": cell.method, "budget": cell.budget, "n": len(asked)}
        row["accuracy"] = hits[cell][:, 0].sum() / len(asked)
        row["interval"] = interval(hits[cell][:, 0], hits[cell][:, 1])
        row["categories"] = {
            c: float(np.mean([ok for ok, (_, _, category, *_) in zip(right, asked) if category == c]))
            for c in categories
        }
        row["items"] = " ".join(f"{ok}/{n}" for ok, n in hits[cell])  # right / asked, to be paired with other cells
        row["agreement"] = float(np.mean(same))
        row["seconds"] = float(np.median([line[i]["seconds"] for i in range(count)]))
        if cell != dense:
            for key in ("mean_keep", "flops", "selection_seconds"):
                row[key] = float(np.mean([line[i][key] for i in range(count)]))
            row["to_dense"] = difference(hits[cell], hits[dense])
            rivals = [r for r in lines if r.method in BASELINES and r.budget == cell.budget and r != cell]
            if rivals:
                best = max(rivals, key=lambda r: hits[r][:, 0].sum())
                row["to_baseline"] = {"baseline": best.method, **difference(hits[cell], hits[best])}
        rows.append(row)
    return rows


def _hits(line: dict[str, Any]) -> tuple[int, int]:
    return sum(line["right"]), len(line["right"])


def per_item(row: dict[str, Any]) -> np.ndarray:
    """[items, 2] right answers and questions of each item, from a row of `summarise`."""
    return np.array([[int(n) for n in pair.split("/")] for pair in row["items"].split()])


def difference(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """The paired difference of two accuracies and its interval; both [items, 2] right answers and questions."""
    gain = one[:, 0] - other[:, 0]
    return {"difference": float(gain.sum() / one[:, 1].sum()), "interval": interval(gain, one[:, 1])}


def interval(values: np.ndarray, counts: np.ndarray, draws: int = 4000) -> list[float]:
    """95 % bootstrap interval of sum(values) / sum(counts), items redrawn whole."""
    times = _redrawn(len(values), draws)
    return np.percentile((times @ values) / (times @ counts), [2.5, 97.5]).tolist()


@cache
def _redrawn(items: int, draws: int) -> np.ndarray:
    """[draws, items] how often each item is drawn."""
    picks = np.random.default_rng(0).integers(items, size=(draws, items)) + items * np.arange(draws)[:, None]
    return np.bincount(picks.ravel(), minlength=draws * items).reshape(draws, items).astype(float)


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
