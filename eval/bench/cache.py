"""`vtok bench cache`: what a smaller cache costs a language model and what it saves.

A passage is a prompt and what really follows it, which the model is made to answer (teacher forcing through `generate`,
so that a method that evicts while answering does so). Measured of each method at each budget: how much less likely the
answer becomes (nats a token, paired with the whole cache), seconds of the prompt and of a token, bytes of the prompt's
cache. Variants take turns on each passage; a file that exists already is gone on with.
"""

from __future__ import annotations

import json
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

from vtok.errors import InvalidValue
from vtok.eval.bench import machine, passages
from vtok.eval.bench.measure import How
from vtok.eval.results.cells import Cell, cells
from vtok.eval.results.statistics import FEWEST, interval
from vtok.runs import DENSE
from vtok.timing import Marks, clock

HEAD = ("method", "cache", "perplexity", "nats lost", "95 %", "prompt, s", "token, ms", "MB")


@dataclass(frozen=True)
class Row:
    """One passage under one cell. nats: sum of -log p over the answer's `tokens`. seconds: `prompt` of the prefill with
    all that the method does behind it, `token` the median of an answer's step. bytes: of the prompt's cache."""

    kind: str
    passage: int
    prompt: int
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


def run(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    methods: Sequence[str],
    budgets: Sequence[float],
    prompts: Sequence[int],
    count: int,
    how: How,
    out: Path | None,
) -> None:
    """Measure, print, and write JSON to `out` after each passage. count: passages of each kind and length. Raises
    `InvalidValue` where `out` holds something else."""
    console = Console()
    wanted, refused = [], {}
    for cell in cells(methods, budgets, pictures=False):
        reason = cell.refusal(model)
        wanted.append(cell) if reason is None else refused.update({f"{cell.method} at {cell.budget:g}": reason})
    what = {"model": name, "answer": how.tokens, "passages": count}
    rows = _known(out, what)
    done = {(row.kind, row.prompt, row.passage, row.method, row.budget) for row in rows}
    about = machine.describe(how.device, how.dtype) | {"clock": "CPU time" if how.cpu_time else "wall"}
    for kind, prompt, i, ids in track(list(_passages(tokenizer, prompts, count, how.tokens)), console=console):
        for cell in wanted[:: 1 if i % 2 == 0 else -1]:
            if (kind, prompt, i, cell.method, cell.budget) not in done:
                measured = once(model, torch.tensor([ids], device=model.device), cell, how)
                rows.append(Row(kind, i, prompt, cell.method, cell.budget, how.tokens, *measured))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            told = {"machine": about, "what": what, "refused": refused, "rows": [asdict(row) for row in rows]}
            out.write_text(json.dumps(told, indent=1) + "\n")
    for prompt in prompts:
        for kind in passages.KINDS:
            console.print(table([row for row in rows if (row.kind, row.prompt) == (kind, prompt)]))
    for cell, reason in refused.items():
        console.print(f"not run: {cell}: {reason}", style="dim", highlight=False, markup=False)


def _known(out: Path | None, what: dict[str, Any]) -> list[Row]:
    if out is None or not out.exists():
        return []
    told = json.loads(out.read_text())
    if told["what"] != what:
        raise InvalidValue(f"{out} holds results of {told['what']}, not of {what}: take another file.")
    return [Row(**row) for row in told["rows"]]


def _passages(tokenizer: Any, prompts: Sequence[int], count: int, answer: int) -> Iterator[tuple]:
    for prompt in prompts:
        found = {kind: passages.of(tokenizer, kind, prompt + answer, count) for kind in passages.KINDS}
        yield from ((kind, prompt, i, found[kind][i]) for i in range(count) for kind in found)


def once(model: nn.Module, ids: Tensor, cell: Cell, how: How) -> tuple[float, float, float, int]:
    """nats, seconds of the prompt and of a token, and bytes, of one passage ids [1, S + how.tokens]."""
    prompt, forced = ids[:, : -how.tokens], Forced(ids[0, -how.tokens :])
    now: Callable[[], float] = clock(model.device, how.read)
    with cell.patch(model) if cell.method != DENSE else nullcontext() as handle, torch.inference_mode():
        marks = Marks(model, now)
        began = now()
        try:
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                logits_processor=LogitsProcessorList([forced]),
                max_new_tokens=how.tokens,
                min_new_tokens=how.tokens,
                do_sample=False,
            )
        finally:
            marks.remove()
        steps = [end - start for start, end in pairwise([*marks.entered[1:], now()])]
        size = (handle.trace.kv_bytes()["compressed"]) if handle is not None else _dense_bytes(model, prompt.shape[1])
    return -sum(forced.logs), marks.left[0] - began, statistics.median(steps), size


def _dense_bytes(model: nn.Module, columns: int) -> int:
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * columns * model.dtype.itemsize


def table(rows: Sequence[Row]) -> Table:
    """Of one kind of text and one length, in 80 columns."""
    title = f"{rows[0].kind}, prompts of {rows[0].prompt} tokens"
    drawn = Table(title=title, box=None, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    for name in HEAD:
        drawn.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for line in lines(rows):
        drawn.add_row(*line)
    return drawn


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """`HEAD` of each cell, the whole cache first."""
    groups: dict[tuple[str, float], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.budget), {})[row.passage] = row
    whole = groups[DENSE, 1.0]
    ordered = sorted(groups.items(), key=lambda group: (-group[0][1], group[0][0]))
    return [_line(cell, list(own.values()), [whole[i] for i in own]) for cell, own in ordered]


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
