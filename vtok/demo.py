"""What `vtok demo` does: one picture, one question, answered dense and compressed, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from rich.table import Table
from rich.text import Text
from torch import nn

from vtok.engine.trace import Trace
from vtok.prompts import ask
from vtok.runs import DENSE, Asked, Run

METHODS = ("divprune", "globalcom2", "fastv", "aim", "pool", "random", "downsample")
TIMED_SECONDS = 10.0  # about how long the timed rounds may take together
MAX_ROUNDS = 7


@dataclass(frozen=True)
class Answer:
    """One method's answer and what it cost.

    tokens, kept: visual tokens of the picture in the prompt, and those that a decoder layer works on (mean).
    flops: operations of encoder and prefill, by formula. kv_bytes: of the prompt's cache, by formula.
    selection, prefill, total: see `vtok.runs.Run`, medians.
    trace: of the first run; None for the dense model.
    """

    method: str
    text: str
    tokens: int
    kept: int
    flops: int
    kv_bytes: int
    selection: float
    prefill: float
    total: float
    trace: Trace | None


def compare(
    model: nn.Module,
    processor: Any,
    picture: Image.Image,
    question: str,
    methods: Sequence[str],
    keep: float | int = 0.25,
    max_new_tokens: int = 20,
    progress: Callable[[str], None] = lambda _: None,
    budget: float | None = None,
) -> list[Answer]:
    """Answer the question with the dense model, then with each method, at `keep` or, where given, at `budget`.

    Each round runs all methods once, so that a disturbance of the machine meets all alike. The first warms up
    and is not timed, unless the model is so slow that one round takes over a minute.
    """
    asked = Asked.of(model, processor, ask(question, picture), methods, max_new_tokens, keep, budget)
    began = time.perf_counter()
    rounds = [asked.all(progress)]
    first, took = rounds[0], time.perf_counter() - began
    if took < 60:
        rounds = [asked.all(progress) for _ in range(max(1, min(MAX_ROUNDS, int(TIMED_SECONDS / took))))]
    reference = first[methods[0]].trace
    return [_answer(method, first[method], [runs[method] for runs in rounds], reference) for method in first]


def _answer(method: str, first: Run, timed: list[Run], reference: Trace) -> Answer:
    trace, tokens = first.trace, sum(reference.n_visual)
    kind = DENSE if trace is None else "compressed"
    flops = (trace or reference).flops()[kind]
    median = lambda name: statistics.median(getattr(run, name) for run in timed)
    return Answer(
        method=method,
        text=first.text,
        tokens=tokens,
        kept=tokens if trace is None else round(trace.mean_keep * tokens),
        flops=flops["encoder"] + flops["prefill"],
        kv_bytes=(trace or reference).kv_bytes()[kind],
        selection=median("selection"),
        prefill=median("prefill"),
        total=median("total"),
        trace=trace,
    )


def table(answers: Sequence[Answer]) -> Table:
    """The answers as a table that fits 80 columns."""
    drawn = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", collapse_padding=True)
    drawn.add_column("method", overflow="fold", max_width=14)
    drawn.add_column("answer", max_width=20, overflow="fold")
    for name in ("tokens", "kept", "FLOPs", "KV", "select", "prefill", "total"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_row("", "", "", "", "", "", "ms", "ms", "ms", style="dim")
    dense = answers[0].text
    for a in answers:
        times = [f"{1e3 * seconds:.1f}" for seconds in (a.selection, a.prefill, a.total)]
        if a.trace is None:
            times[0] = "-"
        cells = [str(a.tokens), str(a.kept), scaled(a.flops), scaled(a.kv_bytes, "B"), *times]
        drawn.add_row(a.method, Text(a.text), *cells, style=None if a.text == dense else "yellow")
    return drawn


def scaled(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 8.18 T, 320 kB."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or prefix == "P":
            break
        value /= 1000
    digits = 0 if value >= 99.95 or not prefix else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefix}{unit}".strip()
