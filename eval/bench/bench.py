"""The speed benchmark behind `make bench`: is the compute saved on paper also saved on the clock?

A workload (`vtok.eval.bench.workloads`) runs dense, patched with keep=1.0, and with every method at every `keep`, phase
by phase: encoder, projector, the language model's prefill (from before the first hook of the patch to after the last),
within it the selection, and then decoding token by token.

The ideal is the ratio of the operations that causal attention needs. Published tables count all n^2 scores of a
prefill, of which the kernels in use compute the lower half: by that count dense would be given more than it pays for.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vtok.errors import InvalidValue
from vtok.eval.bench import machine, workloads
from vtok.eval.bench.bars import bars
from vtok.eval.bench.measure import How, measure
from vtok.eval.bench.shown import plot, table
from vtok.files import write_json


def run(
    workload: str,
    visual: Sequence[int] | None,
    out: Path | None,
    keeps: Sequence[float],
    methods: Sequence[str] | None,
    how: How,
    threads: int | None = None,
) -> bool:
    """Measure, print, write JSON to `out` and a plot of each picture beside it; whether all bars are met. Parameters:
    `vtok bench --help`."""
    found = workloads.find(workload)
    if wrong := [str(n) for n in visual or () if n not in found.builds]:
        there = ", ".join(map(str, found.builds))
        raise InvalidValue(f"{workload} has no picture of {', '.join(wrong)} tokens; it has: {there}.")
    for keep in keeps:
        if not 0 < keep < 1:
            raise InvalidValue(f"To keep {keep:g} is nothing to measure: give fractions between 0 and 1.")
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    about = machine.describe(how.device, how.dtype) | {
        "clock": "the process's CPU time" if how.cpu_time else "wall",
        "workload": found.title,
    }
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False, markup=False)
    results, met = [], True
    for n in visual or found.builds:
        with console.status("building the model") as status:
            results.append(measure(found.builds[n], keeps, methods, how, status.update))
        gc.collect()
        met &= _show(results[-1], console)
    if out is not None:
        _write(about, results, out, console)
    return met


def _show(result: dict[str, Any], console: Console) -> bool:
    """Print the numbers of one picture, and whether its bars are met."""
    console.print()
    console.print(table(result))
    for name, reason in result["refused"].items():
        console.print(f"not run: {name}. {reason}", style="dim", highlight=False, markup=False)
    verdicts = bars(result)
    for met, sentence in verdicts:
        console.print(f"{'ok  ' if met else 'MISS'} {sentence}", style=None if met else "bold red")
    return all(met for met, _ in verdicts)


def _write(about: dict[str, str], results: list[dict[str, Any]], out: Path, console: Console) -> None:
    write_json(out, {"machine": about, "results": results})
    console.print(f"wrote {out}", soft_wrap=True)
    for result in results:
        file = out.with_name(f"{out.stem}-{result['visual_tokens']}.png")
        plot(result, f"{about['workload']}, {about['machine']}, {about['dtype']}", file)
        console.print(f"wrote {file}", soft_wrap=True)
