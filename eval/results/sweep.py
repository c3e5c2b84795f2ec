"""The sweep behind `vtok eval`: accuracy of every method at every budget on offline tasks.

A task has a folder of its own, in it one file of JSON lines a cell (method at budget), and one line an item, so that a
run that was killed goes on where it stopped. Several processes (`torchrun`) share the items of a cell, write a
file each, and in the end make one of them. What all lines of all calls say is summed up in sweep.json
(`results.summarise`), which is all that cards and reports read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vtok.engine.trace import Trace
from vtok.errors import InvalidValue
from vtok.eval.bench.machine import commit, describe
from vtok.eval.results import own_limit
from vtok.eval.results.cells import OWN_LIMIT, Cell, baselines, cells
from vtok.eval.results.results import summarise
from vtok.eval.tasks.answers import say
from vtok.eval.tasks.task import TEST_SEED, Item, Task
from vtok.files import write_json
from vtok.runs import DENSE

ABOVE = 1.5  # times its budget that a cell may keep on average, as counts are rounded


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
    mine = items[share.rank :: share.world]
    left = [item for item in mine if item.index not in done]
    for _ in range(len(mine) - len(left)):
        step()
    if not left:  # to make the model as wanted may cost more than to ask it
        return
    with _as_wanted(cell, model, processor, items, instruction) as spared:
        for item in left:
            began = time.perf_counter()
            said = say(model, processor, item, instruction)
            line: dict[str, Any] = {"item": item.index, "seconds": time.perf_counter() - began}
            line["answers"] = [[q.category, q.answer, one.text] for q, one in zip(item.questions, said)]
            line["right"] = [task.score(q.answer, one.text) for q, one in zip(item.questions, said)]
            line["logprobs"] = [one.logprob for one in said]
            with own.open("a") as file:
                file.write(json.dumps(line | spared(item)) + "\n")
            step()


@contextmanager
def _as_wanted(
    cell: Cell, model: Any, processor: Any, items: Sequence[Item], instruction: str
) -> Iterator[Callable[[Item], dict[str, Any]]]:
    """Within, the model is as the cell wants it. What it gives tells what was kept of the item that was asked last."""
    if cell.method == OWN_LIMIT:
        with own_limit.applied(model, processor, items, cell.budget, instruction) as spared:
            yield spared
    elif cell.patches:
        with cell.patch(model) as handle:
            yield lambda item: _traced(handle.trace)
    else:
        yield lambda item: {}


def _traced(trace: Trace) -> dict[str, Any]:
    flops = trace.flops()
    sums = {kind: sum(flops[kind][phase] for phase in ("encoder", "prefill")) for kind in flops}
    return {
        "mean_keep": trace.mean_keep if trace.pictures else trace.mean_attended,
        "selection_seconds": trace.selection_seconds,
        "cache": trace.kv_bytes()["compressed"] / trace.kv_bytes()["dense"],
        "flops": sums["compressed"] / sums["dense"],
    }


def _refusal(cell: Cell, model: Any, processor: Any, items: Sequence[Item], out: Path) -> str | None:
    """Why a cell cannot be asked, or None."""
    if cell.method != OWN_LIMIT:
        return cell.refusal(model)
    answered = len(read(out / cell.file)) >= len(items)  # to fit a limit takes all items
    return None if answered else own_limit.refusal(model, processor, items, cell.budget)


def untouched(cell: Cell, lines: dict[int, dict[str, Any]]) -> int:
    """Of how many of a cell's items the method dropped nothing although told to. A limit for all pictures may leave
    small ones as they are."""
    told = cell.budget < 1 and cell.method != OWN_LIMIT
    return sum(line["mean_keep"] >= 1 for line in lines.values()) if told else 0


def above(cell: Cell, lines: dict[int, dict[str, Any]]) -> float | None:
    """What a cell kept on average, where that is above its budget by more than rounding does: a method that keeps whole
    frames cannot keep a tenth of four."""
    kept = sum(line.get("mean_keep", 0.0) for line in lines.values()) / len(lines)
    return kept if kept > ABOVE * cell.budget else None


def idle(cell: Cell, lines: dict[int, dict[str, Any]], dense: dict[int, dict[str, Any]]) -> bool:
    """Whether a method that says it dropped something changed no answer and no log-probability of any item: it did
    nothing, and its numbers are the dense model's. Not told of lines from before log-probabilities were written."""
    told = ("answers", "logprobs")
    if (
        cell.budget >= 1
        or untouched(cell, lines)
        or any("logprobs" not in of[i] for of in (lines, dense) for i in lines)
    ):
        return False
    return all(line[key] == dense[i][key] for i, line in lines.items() for key in told)


def _parts(path: Path) -> list[Path]:
    """The files of a cell: its own, and those of processes that ran it together."""
    return [file for file in (path, *sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))) if file.exists()]


def read(path: Path) -> dict[int, dict[str, Any]]:
    """Item -> line of a cell's files. Leaves out a last line that a kill left unfinished, or that is being written."""
    found = {}
    for file in _parts(path):
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

    count: of the test items, or None for all. The summary is of all cells in `out` that answered them, whichever call
    asked. A cell that is above its budget is listed as refused, and so is one that left some items whole, whose numbers
    would be those of the dense model. So is one that dropped tokens and changed nothing, as a "fault". Raises
    `InvalidValue` if `out` holds the results of other weights or another test set, and `Unsupported` if the model
    cannot take the task's media.
    """
    commit()  # is remembered as it is now
    about = _claim(model, name, task, out, instruction)
    items = list(task.held_out(count))
    asked = cells(methods, budgets, task.media != "text")
    reasons = {cell: _refusal(cell, model, processor, items, out) for cell in asked}
    wanted = [cell for cell, reason in reasons.items() if reason is None]
    if share.rank == 0:
        (out / "about.json").write_text(json.dumps(about) + "\n")
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
        now = None if complete else describe(model.device.type, about["dtype"])
        _sum_up(model, about | {"items": len(items)}, now, reasons, out / "sweep.json")
    share.wait()
    return json.loads((out / "sweep.json").read_text())


def _sum_up(
    model: Any, about: dict[str, Any], now: dict[str, str] | None, reasons: dict[Cell, str | None], file: Path
) -> None:
    """Write the summary. now: the provenance of this call, or None where it had nothing left to ask, so that it stays
    that of the calls that asked. reasons: why cells that this call named were not run, or None."""
    before = json.loads(file.read_text()) if file.exists() else None
    now = now or (None if before else describe(model.device.type, about["dtype"]))
    others = _others(file.parent, reasons, about["items"])
    refused = {cell: reason for cell, reason in reasons.items() if reason is not None}
    for row in before["refused"] if before else ():
        cell = Cell(row["method"], row["budget"])
        if cell not in reasons and cell not in others:
            refused[cell] = row["reason"]
    there = [*(cell for cell in reasons if reasons[cell] is None), *others]
    there.sort(key=lambda cell: (cell.method != DENSE, -cell.budget, cell.method not in baselines(), cell.method))
    _write_summary(model, about | _provenance(before, now), there, refused, file)


def _others(out: Path, asked: Collection[Cell], count: int) -> list[Cell]:
    """The cells in a folder that other calls have answered for so many items."""
    named = (re.fullmatch(r"(.+)@([\d.e-]+)", file.stem) for file in out.glob("*.jsonl"))
    found = {Cell(name[1], float(name[2])) for name in named if name and name[2].count(".") < 2} - set(asked)
    return [cell for cell in found if len(read(out / cell.file)) >= count]


def _provenance(before: dict[str, Any] | None, now: dict[str, Any] | None) -> dict[str, Any]:
    """ "machine" of the call that asked last, and of the "earlier" ones. before: the summary that was there. now: of
    this call, or None where it asked nothing."""
    runs = [*before["about"].get("earlier", ()), before["about"]["machine"]] if before else []
    same = lambda one, other: all(one.get(key) == other.get(key) for key in ("commit", "command"))
    if now is not None:
        runs = [*(run for run in runs if not same(run, now)), now]
    return {"machine": runs[-1]} | ({"earlier": runs[:-1]} if runs[1:] else {})


def _claim(model: Any, name: str, task: Task, out: Path, instruction: str) -> dict[str, Any]:
    """What the results in `out` are of, which is there for these alone."""
    about = {
        "model": name,
        "task": task.name,
        "weights": fingerprint(model),
        "test_set": test_set(task),
        "dtype": str(model.dtype).removeprefix("torch."),
        "instruction": instruction,
    }
    out.mkdir(parents=True, exist_ok=True)
    stamp = out / "about.json"
    if stamp.exists() and json.loads(stamp.read_text()) != about:
        raise InvalidValue(
            f"{out} holds results of {json.loads(stamp.read_text())}, not of {about}: take another folder."
        )
    return about


def _write_summary(model: Any, about: dict[str, Any], wanted: list[Cell], refused: dict[Cell, str], file: Path) -> None:
    count = about["items"]
    whole = {cell: read(file.with_name(cell.file)) for cell in wanted}
    lines = {cell: {i: line[i] for i in range(count)} for cell, line in whole.items()}
    dense, found, faults = next(lines[cell] for cell in wanted if cell.method == DENSE), {}, {}
    for cell in wanted:
        if same := untouched(cell, lines[cell]):
            found[cell] = f"It leaves {same} of the {count} items whole, and so is above the budget."
        elif kept := above(cell, lines[cell]):
            found[cell] = f"It keeps {kept:.3f} of the tokens on average, which is above the budget."
        elif idle(cell, lines[cell], dense):
            faults[cell] = (
                f"It says that it drops tokens, but no answer and no log-probability on any of the {count} items "
                "differs from the dense model's: it did nothing, so this is no result."
            )
    lines = {cell: line for cell, line in lines.items() if cell not in found and cell not in faults}
    told = {cell: cell.options(model) for cell in lines if cell.method != DENSE}
    write_json(file, summarise(about, lines, told, found | refused, faults))  # a later call reads it


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
