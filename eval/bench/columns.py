"""`vtok bench decoding --columns N`: self-speculation where reading the cache outweighs reading the weights.

A prefill of 16,384 columns takes minutes on a CPU, so a real text's cache of `REAL` columns is repeated: copies of all
columns weigh alike in each attention, so what attends to them reads what it would read in the one text, but that they
weigh more against the answer. The part on which drafts are made is chosen on the text, and repeated as often. Answers
are compared with those of plain steps behind the same cache. Time is that of decoding, without the prefill.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import DynamicCache

from vtok import models
from vtok.compressors.snapkv import SnapKV
from vtok.errors import InvalidValue
from vtok.eval.bench import machine
from vtok.eval.bench.resume import begun
from vtok.eval.bench.texts import chat
from vtok.files import write_json
from vtok.markdown import table
from vtok.text.decoding.loop import Drafter
from vtok.text.decoding.self_speculation import SelfSpeculation
from vtok.text.decoding.target import Target

REAL = 2048  # columns of the text
KEEPS = (0.1, 0.05)  # of the columns, on which drafts are made
LENGTHS = (2, 4)  # drafts a step, beside as many as pay
PLAIN = "plain"
BAR = 1.4
HEAD = ("drafts on", "drafts a step", "tokens a step", "accepted %", "ms a token", "speed")

# Model -> decoder layers, key heads, width of a head, parameters of the language model in 1e9, bytes of a number
SIZES = {
    "SmolLM2-135M, float32": (30, 3, 64, 0.135, 4),
    "Qwen2.5-VL-3B, bfloat16": (36, 2, 128, 3.1, 2),
    "LLaVA-1.5-7B, bfloat16": (32, 32, 128, 6.7, 2),
    "Qwen2.5-VL-7B, bfloat16": (28, 4, 128, 7.6, 2),
}


@dataclass(frozen=True)
class Asked:
    """columns: of the cache, a multiple of `REAL`."""

    columns: int = 16384
    tokens: int = 32


@dataclass(frozen=True, kw_only=True)
class Repeated(SelfSpeculation):
    """Self-speculation, or plain decoding where drafts is False, behind a cache that is repeated. took: seconds of
    decoding, of each call."""

    copies: int = 1
    drafts: bool = True
    took: list[float] = field(default_factory=list, compare=False)

    @contextmanager
    def drafting(self, target: Target) -> Iterator[Drafter]:
        start = time.process_time()
        with super().drafting(target) as view:
            if self.drafts:
                view._choose()
                _repeat(view.small.cache, self.copies)
                view.kept = [n * self.copies for n in view.kept]
            view.chosen = True
            _repeat(target.cache, self.copies)
            view.prompt = target.cache.get_seq_length()
            target.kwargs["attention_mask"] = None
            began = time.process_time()
            # What was made up took no time: as a share of the prefill of a real cache it would be little.
            self._running.payoff.clock = lambda made=began - start: time.process_time() - made
            yield view
            self.took.append(time.process_time() - began)


def _repeat(cache: DynamicCache, copies: int) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = (x.repeat(1, 1, copies, 1) for x in (layer.keys, layer.values))


def run(asked: Asked, out: Path | None, threads: int | None = None) -> bool:
    """Measure, print, write JSON to `out` after each variant; whether the bar is met. Variants that `out` has are not
    run again. Raises `InvalidValue` for other columns."""
    if asked.columns % REAL:
        raise InvalidValue(
            f"The cache is a text of {REAL:,} columns, repeated: {asked.columns:,} is no multiple of it."
        )
    if threads:
        torch.set_num_threads(threads)
    console, run_ = Console(), begun(out, asked, machine.describe("cpu", "float32"))
    model, tokenizer = models.load(models.SMOLLM2, "cpu")
    inputs = _long(tokenizer)
    for name, options in variants().items():
        if name in run_["rounds"]:
            continue
        with console.status(name):
            run_["rounds"][name] = _measured(model, inputs, asked, options)
        if out is not None:
            write_json(out, run_)
    head, *lines = cells(run_)
    console.print(table(head, lines), soft_wrap=True, highlight=False, markup=False)
    for row in break_even():
        console.print(", ".join(f"{key}: {value}" for key, value in row.items()))
    met, sentence = bar(run_)
    console.print(f"{'ok  ' if met else 'MISS'} {sentence}")
    return met


def variants() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {PLAIN: {"draft": [SnapKV()], "drafts": False, "ngram": False}}
    for keep in KEEPS:
        draft = {"draft": [SnapKV(keep=keep)]}
        for length in LENGTHS:
            found[f"{keep:g}, {length}"] = {**draft, "length": length, "adapt": False, "ngram": False}
        found[f"{keep:g}, as many as pay"] = {**draft, "ngram": False}
    return found


def _long(tokenizer: Any) -> dict[str, Tensor]:
    """A question about a text, `REAL` columns in all."""
    from pydoc_data.topics import topics

    ask = "\n\nExplain what the text above is about, in your own words."
    words = " ".join(topics["formatstrings"].split())
    ids = chat(tokenizer, words + ask)["input_ids"]
    tail = chat(tokenizer, ask)["input_ids"].shape[1]
    return {"input_ids": torch.cat([ids[:, : REAL - tail], ids[:, -tail:]], 1)}


def _measured(model: nn.Module, inputs: dict[str, Tensor], asked: Asked, options: dict[str, Any]) -> dict[str, Any]:
    decoder = Repeated(copies=asked.columns // REAL, **options)
    decoder._running.payoff.clock = time.process_time
    length = {"max_new_tokens": asked.tokens, "min_new_tokens": asked.tokens}
    output = model.generate(**inputs, **length, do_sample=False, custom_generate=decoder)
    stats = decoder.stats
    return {
        "seconds": decoder.took[-1],
        "ids": output[0, inputs["input_ids"].shape[1] :].tolist(),
        "tokens": stats.tokens,
        "steps": stats.steps,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "plain": stats.plain,
    }


def rows_of(run_: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Variant -> its numbers. speed: in plain's."""
    plain = run_["rounds"][PLAIN]
    return {
        name: {
            "tokens_a_step": (row["tokens"] - 1) / (row["steps"] - 1),
            "accepted": row["accepted"] / row["drafted"] if row["drafted"] else float("nan"),
            "ms": 1e3 * row["seconds"] / (row["tokens"] - 1),
            "speed": plain["seconds"] / row["seconds"],
            "same": row["ids"] == plain["ids"],
        }
        for name, row in run_["rounds"].items()
    }


def bar(run_: dict[str, Any]) -> tuple[bool, str]:
    rows = rows_of(run_)
    wrong = [name for name, row in rows.items() if not row["same"]]
    if wrong:
        return False, f"self-speculation: other tokens than plain decoding's at {'; '.join(wrong)}"
    adaptive = {name: row for name, row in rows.items() if name.endswith("pay")}
    name, row = max(adaptive.items(), key=lambda item: item[1]["speed"])
    columns = run_["asked"]["columns"]
    said = f"self-speculation on {name} behind {columns:,} columns: {row['speed']:.2f} times plain's speed (bar {BAR})"
    return row["speed"] >= BAR, said


def break_even(keep: float = 0.05, rate: float = 0.9) -> list[dict[str, Any]]:
    """From how many columns, over all sequences of a batch, self-speculation pays, and from how many it gives `BAR`,
    with the best number of drafts up to 8, each accepted at this rate once the one before was.

    By bytes read alone: a step reads the weights (W) and the cache (c a column); a draft reads W and `keep` of the
    cache; a check reads both once. With x = cL / W a plain step takes 1 + x, and a step with n drafts, of which a are
    accepted, n (1 + keep x) + 1 + x for 1 + a tokens."""
    found = []
    for name, (layers, heads, width, billions, size) in SIZES.items():
        ratio = billions * 1e9 * size / (2 * layers * heads * width * size)  # W / c
        from_ = {gain: round(ratio * least(gain, keep, rate), -2) for gain in (1.0, BAR)}
        found.append({"model": name, "pays from": from_[1.0], f"{BAR} times from": from_[BAR]})
    return found


def least(gain: float, keep: float, rate: float) -> float:
    """The least x at which plain decoding takes `gain` times as long."""
    found = []
    for n in range(1, 9):
        emitted = sum(rate**i for i in range(n + 1))
        if (slope := emitted - gain * (1 + n * keep)) > 0:
            found.append((gain * (1 + n) - emitted) / slope)
    return max(0.0, min(found))


def cells(run_: dict[str, Any]) -> list[list[str]]:
    """Head and rows of the table."""
    found = [list(HEAD)]
    for name, row in rows_of(run_).items():
        keep, _, drafts = name.partition(", ")
        accepted = "" if row["accepted"] != row["accepted"] else f"{100 * row['accepted']:.0f}"
        part = name if name == PLAIN else f"{100 * float(keep):g} % of the columns"
        found.append([part, drafts, f"{row['tokens_a_step']:.2f}", accepted, f"{row['ms']:.0f}", f"{row['speed']:.2f}"])
    return found
