"""`vtok bench --kernels`: every kernel alone over numbers of tokens N, and how its time grows with N.

A cost that grows faster than it should is seen by its exponent: 1 for what reads each token once, 2 for what compares
all with all. `farthest_points` is also held against the one product of N x D features that it needs.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vtok.eval.machine import describe
from vtok.kernels.attention_column_sums import attention_column_sums
from vtok.kernels.attention_rows import attention_rows
from vtok.kernels.bipartite_match import bipartite_match
from vtok.kernels.farthest_points import farthest_points
from vtok.kernels.pagerank import pagerank

SIZES = (720, 1440, 2880)
WIDTH, PICKS = 1024, 1 / 9  # D of features; of N tokens `farthest_points` picks 320 of 2,880
HEADS, HEAD = 12, 64
PRODUCT = "one N x N product"
BAR = 1.3  # that farthest_points may take of its product


def works(n: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Name -> one call of each kernel on random tensors of n tokens, one picture."""
    torch.manual_seed(0)
    features = torch.randn(1, n, WIDTH, device=device, dtype=dtype)
    query, key = torch.randn(2, 1, HEADS, n, HEAD, device=device, dtype=dtype)
    valid = torch.ones(1, n, dtype=torch.bool, device=device)
    last, rows = torch.tensor([n - 1], device=device), torch.arange(n - 32, n, device=device)[None]
    scaling = HEAD**-0.5
    return {
        PRODUCT: lambda: features @ features.mT,
        "farthest_points": lambda: farthest_points(features, max(1, int(n * PICKS))),
        "bipartite_match": lambda: bipartite_match(features, n // 2),
        "attention_rows": lambda: attention_rows(query, key, last[:, None], scaling, valid),
        "attention_column_sums": lambda: attention_column_sums(query, key, rows, scaling, valid),
        "pagerank": lambda: pagerank(query, key, scaling, valid, last),
    }


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log time over log size, by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean = statistics.fmean(x)
    return sum((a - mean) * b for a, b in zip(x, y)) / sum((a - mean) ** 2 for a in x)


def measure(sizes: Sequence[int], device: str, dtype: torch.dtype, repetitions: int) -> list[dict[str, Any]]:
    """A row a kernel: median, least and most seconds at each size, and the exponent. Kernels take turns."""

    def timed(work: Callable[[], Any]) -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - began

    found: dict[str, list[list[float]]] = {}
    with torch.inference_mode():
        for n in sizes:
            cases = works(n, device, dtype)
            for work in cases.values():
                work()  # warms up
            rounds = [{name: timed(work) for name, work in cases.items()} for _ in range(repetitions)]
            for name in cases:
                found.setdefault(name, []).append([taken[name] for taken in rounds])
    return [
        {
            "kernel": name,
            "seconds": [{"median": statistics.median(t), "min": min(t), "max": max(t)} for t in times],
            "exponent": exponent(sizes, [statistics.median(t) for t in times]),
        }
        for name, times in found.items()
    ]


def run(
    out: Path | None = None,
    repetitions: int = 9,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    sizes: Sequence[int] = SIZES,
) -> bool:
    """Measure, print, write JSON to `out`; whether the bar is met."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    about = describe(device, dtype)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False, markup=False)
    with console.status("measuring"):
        rows = measure(sizes, device, getattr(torch, dtype), repetitions)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("ms, median", *(f"N={n:,}" for n in sizes), "exponent"):
        table.add_column(name, justify="left" if name.startswith("ms") else "right")
    for row in rows:
        table.add_row(row["kernel"], *(f"{1e3 * t['median']:.2f}" for t in row["seconds"]), f"{row['exponent']:.2f}")
    console.print(table)
    last = {row["kernel"]: row["seconds"][-1]["median"] for row in rows}
    ratio = last["farthest_points"] / last[PRODUCT]
    console.print(
        f"{'ok  ' if ratio <= BAR else 'MISS'} farthest_points takes {ratio:.2f} times its product at N={sizes[-1]:,} "
        f"(bar {BAR:g})",
        style=None if ratio <= BAR else "bold red",
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": about, "sizes": list(sizes), "kernels": rows}, indent=1) + "\n")
        console.print(f"wrote {out}", soft_wrap=True)
    return ratio <= BAR
