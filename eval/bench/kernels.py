"""`vtok bench --kernels`: every kernel alone over numbers of tokens N, how its time grows, and how near a limit it is.

A cost that grows faster than it should is seen by its exponent: 1 for what reads each token once, 2 for what compares
all with all. The limit of a kernel is the longer of two times: that of its operations at the rate of a large matrix
product, and that of the bytes that it must read and write at the rate of a large copy, both measured here. On a card
each kernel runs as its torch twin and in Triton. Those that pick one token after the other are also held against the
one product of N x D features that they need.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vtok.eval.bench.machine import describe
from vtok.files import write_json
from vtok.kernels.attention_column_sums import attention_column_sums
from vtok.kernels.attention_rows import attention_rows
from vtok.kernels.bipartite_match import bipartite_match
from vtok.kernels.compact_sequence import compact_sequence
from vtok.kernels.farthest_points import farthest_points
from vtok.kernels.greedy_coverage import greedy_coverage
from vtok.kernels.greedy_dpp import greedy_dpp
from vtok.kernels.merge import merge
from vtok.kernels.pagerank import pagerank
from vtok.kernels.redundancy_counts import redundancy_counts
from vtok.kernels.sparse_ffn import gather_neurons, gathered_ffn
from vtok.kernels.tree_attention import tree_attention
from vtok.timing import clock

SIZES = (720, 1440, 2880)
WIDTH, PICKS = 1024, 1 / 9  # D of features; of N tokens those that pick take 320 of 2,880
WIDE = 4096  # D of the features of those that are held to so wide ones
HEADS, HEAD, ROWS, ITERS, DRAFTS = 12, 64, 32, 5, 8
PRODUCT, WIDE_PRODUCT = "one N x N product", f"one N x N product, D = {WIDE:,}"
# kernel -> its product, and of its time how much the kernel may take
PRODUCT_BARS = {
    "farthest_points": (PRODUCT, 1.3),
    "greedy_coverage": (WIDE_PRODUCT, 1.5),
    "greedy_dpp": (WIDE_PRODUCT, 1.5),
}
ROOFLINE_BAR, LARGE = 0.7, 2048  # of the nearer limit, that Triton kernels must reach on a card from so many tokens on


@dataclass(frozen=True)
class Case:
    """call: of a backend. operations, bytes: the least that it takes."""

    call: Callable[[str], Any]
    operations: float
    bytes: float


def cases(n: int, device: str, dtype: torch.dtype) -> dict[str, Case]:
    """Name -> each kernel on random tensors of n tokens, one picture. For `sparse_ffn` n neurons and one token."""
    torch.manual_seed(0)
    features = torch.randn(1, n, WIDTH, device=device, dtype=dtype)
    wide = torch.randn(1, n, WIDE, device=device, dtype=dtype)
    unit = wide / wide.norm(dim=-1, keepdim=True)
    query, key = torch.randn(2, 1, HEADS, n, HEAD, device=device, dtype=dtype)
    valid = torch.ones(1, n, dtype=torch.bool, device=device)
    last, rows = torch.tensor([n - 1], device=device), torch.arange(n - ROWS, n, device=device)[None]
    drafts, grouped = query[:, :, -DRAFTS:], key[:, ::3]  # three heads to a group of keys
    tree = torch.ones(DRAFTS, DRAFTS, dtype=torch.bool, device=device).tril()
    group = torch.arange(n, device=device)[None] // 2
    keep = torch.arange(n, device=device)[None] % 4 == 0
    positions, token = torch.arange(n, device=device)[None], torch.randn(1, 1, WIDTH, device=device, dtype=dtype)
    weights = torch.randn(3, n, WIDTH, device=device, dtype=dtype) / WIDTH**0.5
    neurons = gather_neurons(weights[0], weights[1], weights[2].T, torch.arange(n, device=device)[None])
    scaling, value, picks, half, quarter = HEAD**-0.5, features.itemsize, max(1, int(n * PICKS)), n // 2, -(-n // 4)
    whole, keys = value * n * WIDTH, value * n * HEADS * HEAD
    product, row = 2 * n * n * WIDTH, 2 * HEADS * n * HEAD
    more = WIDE // WIDTH
    return {
        PRODUCT: Case(lambda _: features @ features.mT, product, whole + value * n * n),
        WIDE_PRODUCT: Case(lambda _: wide @ wide.mT, more * product, more * whole + value * n * n),
        "farthest_points": Case(
            lambda b: farthest_points(features, picks, backend=b), product, whole + 8 * n * n + 4 * picks * n
        ),
        "greedy_coverage": Case(  # of cosines, with the product that they take, as for SCOPE
            lambda b: greedy_coverage(unit @ unit.mT, picks, backend=b), more * product, more * whole + 8 * n * n
        ),
        "greedy_dpp": Case(
            lambda b: greedy_dpp(unit, picks, backend=b), more * product, more * whole + 8 * n * n + 4 * picks**2 * n
        ),
        "bipartite_match": Case(lambda b: bipartite_match(features, half, backend=b), product / 4, whole),
        "merge": Case(lambda b: merge(features, group, half, backend=b), n * WIDTH, 1.5 * whole),
        "redundancy_counts": Case(lambda b: redundancy_counts(features, valid, 0.9, backend=b), product, whole),
        "attention_rows": Case(
            lambda b: attention_rows(query, key, last[:, None], scaling, valid, backend=b), row, keys + 4 * HEADS * n
        ),
        "attention_column_sums": Case(
            lambda b: attention_column_sums(query, key, rows, scaling, valid, backend=b), 2 * ROWS * row, 2 * keys
        ),
        "pagerank": Case(  # logits once, and their causal half again in each iteration
            lambda b: pagerank(query, key, scaling, valid, last, iters=ITERS, backend=b),
            (1 + ITERS) * n * row / 2,
            2 * keys,
        ),
        "compact_sequence": Case(
            lambda b: compact_sequence(keep, quarter, features, positions, keep, backend=b), 0, 0.5 * whole
        ),
        "tree_attention": Case(
            lambda b: tree_attention(drafts, grouped, grouped, tree, scaling, backend=b), 2 * DRAFTS * row, 2 * keys / 3
        ),
        "sparse_ffn": Case(lambda b: gathered_ffn(token, *neurons, "silu", backend=b), 6 * n * WIDTH, 3 * whole),
    }


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log time over log size, by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean = statistics.fmean(x)
    return sum((a - mean) * b for a, b in zip(x, y)) / sum((a - mean) ** 2 for a in x)


def timed(work: Callable[[], Any], device: str) -> float:
    now = clock(device)
    began = now()
    work()
    return now() - began


def limits(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Operations and bytes a second that the machine reaches in a large product and a large copy."""
    side, values = (8192, 2**28) if device.startswith("cuda") else (2048, 2**25)
    a = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.empty(values, device=device, dtype=dtype)
    target = torch.empty_like(source)
    best = lambda work: min(timed(work, device) for _ in range(5))
    with torch.inference_mode():
        return {
            "operations": 2 * side**3 / best(lambda: a @ a),
            "bytes": 2 * values * source.itemsize / best(lambda: target.copy_(source)),
        }


def measure(
    sizes: Sequence[int], device: str, dtype: torch.dtype, repetitions: int, limit: dict[str, float]
) -> list[dict[str, Any]]:
    """A row a kernel and backend: median, least and most seconds at each size, the exponent, and what share of the
    nearer limit it reaches at the largest size. Kernels take turns."""
    backends = ("torch", "triton") if device.startswith("cuda") else ("torch",)
    found: dict[tuple[str, str], list[list[float]]] = {}
    with torch.inference_mode():
        for n in sizes:
            all_cases = cases(n, device, dtype)
            turns = [
                (name, b)
                for name in all_cases
                for b in (backends if name not in (PRODUCT, WIDE_PRODUCT) else ("torch",))
            ]
            for name, backend in turns:
                all_cases[name].call(backend)  # warms up
            for _ in range(repetitions):
                for name, backend in turns:
                    taken = timed(lambda c=all_cases[name], b=backend: c.call(b), device)
                    rows = found.setdefault((name, backend), [])
                    if len(rows) < sizes.index(n) + 1:
                        rows.append([])
                    rows[-1].append(taken)
    least = {
        name: max(case.operations / limit["operations"], case.bytes / limit["bytes"])
        for name, case in all_cases.items()
    }
    return [
        {
            "kernel": name,
            "backend": backend,
            "seconds": [{"median": statistics.median(t), "min": min(t), "max": max(t)} for t in times],
            "exponent": exponent(sizes, [statistics.median(t) for t in times]),
            "roofline": least[name] / statistics.median(times[-1]),
        }
        for (name, backend), times in found.items()
    ]


def bars(rows: list[dict[str, Any]], largest: int) -> list[tuple[bool, str]]:
    """(met, sentence) of each bar."""
    last = {row["kernel"]: row["seconds"][-1]["median"] for row in rows if row["backend"] == "torch"}
    found = []
    for name, (product, bar) in PRODUCT_BARS.items():
        ratio = last[name] / last[product]
        text = f"{name} takes {ratio:.2f} times its product at N={largest:,} (bar {bar:g})"
        found.append((ratio <= bar, text))
    for row in rows if largest >= LARGE else ():
        if row["backend"] == "triton":
            text = (
                f"{row['kernel']} in Triton reaches {row['roofline']:.0%} of the nearer limit (bar {ROOFLINE_BAR:.0%})"
            )
            found.append((row["roofline"] >= ROOFLINE_BAR, text))
    return found


def run(
    out: Path | None = None,
    repetitions: int = 9,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    sizes: Sequence[int] = SIZES,
) -> bool:
    """Measure, print, write JSON to `out`; whether the bars are met."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    about = describe(device, dtype)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False, markup=False)
    with console.status("measuring"):
        limit = limits(device, getattr(torch, dtype))
        rows = measure(sizes, device, getattr(torch, dtype), repetitions, limit)
    console.print(f"limits {limit['operations'] / 1e12:.3g} T operations/s, {limit['bytes'] / 1e9:.3g} GB/s")
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("ms, median", "backend", *(f"N={n:,}" for n in sizes), "exponent", "% of limit"):
        table.add_column(name, justify="left" if name in ("ms, median", "backend") else "right")
    for row in rows:
        times = (f"{1e3 * t['median']:.2f}" for t in row["seconds"])
        table.add_row(row["kernel"], row["backend"], *times, f"{row['exponent']:.2f}", f"{100 * row['roofline']:.0f}")
    console.print(table)
    verdicts = bars(rows, sizes[-1])
    for met, sentence in verdicts:
        console.print(f"{'ok  ' if met else 'MISS'} {sentence}", style=None if met else "bold red")
    if out is not None:
        write_json(out, {"machine": about, "limits": limit, "sizes": list(sizes), "kernels": rows})
        console.print(f"wrote {out}", soft_wrap=True)
    return all(met for met, _ in verdicts)
