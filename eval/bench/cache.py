"""`vtok bench cache`: what a smaller cache costs a language model and what it saves.

A passage is a prompt and what really follows it, which the model is made to answer (teacher forcing through `generate`,
so that a method that evicts while answering does so). Measured of each method at each budget: how much less likely the
answer becomes (nats a token, paired with the whole cache), seconds of the prompt and of a token, bytes of the prompt's
cache. Variants take turns on each passage; a file that exists already is gone on with.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from vtok.engine.accounting import TextShape, kv_bytes
from vtok.eval.bench import machine, texts
from vtok.eval.bench.measure import How
from vtok.eval.bench.resume import begun
from vtok.eval.results.cells import Cell, cells
from vtok.eval.results.statistics import FEWEST, interval
from vtok.files import write_json
from vtok.runs import DENSE
from vtok.timing import Marks, clock

HEAD = ("method", "cache", "perplexity", "nats lost", "95 %", "prompt, s", "token, ms", "MB")


@dataclass(frozen=True)
class Asked:
    """prompts: their tokens. passages: of each kind and length. tokens: of an answer."""

    model: str
    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    prompts: tuple[int, ...]
    passages: int
    tokens: int


@dataclass(frozen=True)
class Row:
    """One passage under one cell. nats: sum of -log p over the answer's `tokens`. seconds: `prompt` of the prefill with
    all that the method does behind it, `token` the median of an answer's step. bytes: of the prompt's cache."""

    method: str
    budget: float
    tokens: int
    nats: float
    prompt_seconds: float
    token_seconds: float
    bytes: int


class Forced(LogitsProcessor):
    """Makes `generate` answer these ids [N], and keeps log p of each."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.logs = ids, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self.ids[len(self.logs)]
        self.logs.append(scores[0].float().log_softmax(-1)[wanted].item())
        return torch.full_like(scores, -math.inf).index_fill(1, wanted[None], 0.0)


def run(model: nn.Module, tokenizer: Any, asked: Asked, how: How, out: Path | None) -> None:
    """Measure, print, and write JSON to `out` after each passage; those that it has are not measured again. Raises
    `InvalidValue` where it is of another run."""
    console, about = Console(), machine.describe(how.device, how.dtype)
    run_ = begun(out, asked, about | {"clock": "CPU time" if how.cpu_time else "wall"})
    reasons = {cell: cell.refusal(model) for cell in cells(asked.methods, asked.budgets, pictures=False)}
    wanted = [cell for cell, reason in reasons.items() if reason is None]
    for name, ids in track(list(_passages(tokenizer, asked)), console=console):
        if name in run_["rounds"]:
            continue
        order = wanted[:: 1 if len(run_["rounds"]) % 2 == 0 else -1]
        prompt = torch.tensor([ids], device=model.device)
        run_["rounds"][name] = [asdict(once(model, prompt, cell, asked.tokens, how)) for cell in order]
        if out is not None:
            write_json(out, run_)
    for title, rows in of_texts(run_).items():
        console.print(table(title, rows))
    for cell, reason in reasons.items():
        if reason is not None:
            console.print(f"not run: {cell.method} at {cell.budget:g}: {reason}", style="dim", markup=False)


def _passages(tokenizer: Any, asked: Asked) -> Iterator[tuple[str, list[int]]]:
    """Name and ids of each, prompt and answer."""
    for prompt in asked.prompts:
        found = {kind: texts.passages(tokenizer, kind, prompt + asked.tokens, asked.passages) for kind in texts.READ}
        yield from ((f"{kind} {prompt} {i}", found[kind][i]) for i in range(asked.passages) for kind in found)


def of_texts(run_: dict[str, Any]) -> dict[str, list[list[Row]]]:
    """Kind of text and length -> the rows of each passage."""
    found: dict[str, list[list[Row]]] = {}
    for name, rows in run_["rounds"].items():
        kind, prompt, _ = name.split()
        found.setdefault(f"{kind}, prompts of {prompt} tokens", []).append([Row(**row) for row in rows])
    return found


def once(model: nn.Module, ids: Tensor, cell: Cell, tokens: int, how: How) -> Row:
    """One passage ids [1, S + tokens] under one cell."""
    prompt, forced = ids[:, :-tokens], Forced(ids[0, -tokens:])
    now: Callable[[], float] = clock(model.device, how.read)
    with cell.patch(model) if cell.method != DENSE else nullcontext() as handle, torch.inference_mode():
        marks = Marks(model, now)
        began = now()
        try:
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                logits_processor=LogitsProcessorList([forced]),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
        finally:
            marks.remove()
        steps = [end - start for start, end in pairwise([*marks.entered[1:], now()])]
        if handle is not None:
            size = handle.trace.kv_bytes()["compressed"]
        else:
            shape = TextShape.of(model.config)
            size = kv_bytes(shape, [prompt.shape[1]] * shape.layers, model.dtype.itemsize)
    seconds = marks.left[0] - began, statistics.median(steps)
    return Row(cell.method, cell.budget, tokens, -sum(forced.logs), *seconds, size)


def table(title: str, passages: Sequence[Sequence[Row]]) -> Table:
    """Of one kind of text and one length, in 80 columns."""
    drawn = Table(title=title, box=None, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    for name in HEAD:
        drawn.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for line in lines(passages):
        drawn.add_row(*line)
    return drawn


def lines(passages: Sequence[Sequence[Row]]) -> list[list[str]]:
    """`HEAD` of each cell, the whole cache first."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in (row for passage in passages for row in passage):
        groups.setdefault((row.method, row.budget), []).append(row)
    whole = groups[DENSE, 1.0]
    ordered = sorted(groups.items(), key=lambda group: (-group[0][1], group[0][0]))
    return [_line(cell, own, whole) for cell, own in ordered]


def _line(cell: tuple[str, float], own: Sequence[Row], whole: Sequence[Row]) -> list[str]:
    (method, budget), dense = cell, cell[0] == DENSE
    tokens, nats = (np.array([getattr(row, field) for row in own]) for field in ("tokens", "nats"))
    lost = nats - np.array([row.nats for row in whole])
    low, high = interval(lost, tokens)
    known = not dense and len(own) >= FEWEST["items"]
    prompt, token, size = (
        statistics.median(getattr(row, field) for row in own) for field in ("prompt_seconds", "token_seconds", "bytes")
    )
    return [
        method.partition(":")[0],
        f"{budget:.0%}",
        f"{math.exp(nats.sum() / tokens.sum()):.2f}",
        "" if dense else f"{lost.sum() / tokens.sum():.3f}",
        f"{low:.3f} to {high:.3f}" if known else "",
        f"{prompt:.2f}",
        f"{1e3 * token:.1f}",
        f"{size / 1e6:.1f}",
    ]
