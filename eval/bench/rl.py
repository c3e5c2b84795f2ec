"""`vtok bench rl`: one step of GRPO, phase by phase, dense and on compressed tokens.

The phases are what TRL's trainer runs: `generate` (rollout), the prompts and answers again without gradient (old
log-probabilities), the same with gradient (forward), and backward, with the replay of what the rollout kept. Logits are
made of the answers alone, as TRL's fused head does on a GPU; on a CPU it makes those of the whole row, which costs the
same with and without a compressor. Rewards and the optimiser are left out. Variants take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vtok.adapter import find
from vtok.engine.accounting import TextShape, decode_flops, prefill_flops
from vtok.errors import InvalidValue
from vtok.eval.bench import machine
from vtok.eval.bench.measure import spread
from vtok.eval.bench.workloads import LLAMA, llava
from vtok.files import write_json
from vtok.methods import call
from vtok.patching import Patch, patch
from vtok.runs import DENSE
from vtok.timing import clock

PHASES = ("rollout", "log-probabilities", "forward", "backward")
HEAD = ("variant", *PHASES, "of dense", "ideal", "peak MB")
BARS = {"divprune": 0.32, "fastv": 0.43}  # of a dense step at a quarter of 1,024 tokens
BAR_AT = (1024, 0.25)
SIDES = {256: 16, 576: 24, 1024: 32, 2304: 48}  # visual tokens -> rows and columns of a picture


@dataclass(frozen=True)
class Step:
    """What a step is of: answers to one prompt, each of so many tokens; rounds of each variant. decoder: of `LLAMA`."""

    answers: int = 4
    tokens: int = 16
    rounds: int = 5
    device: str = "cpu"
    dtype: str = "float32"
    memory: float = 16.0  # GiB
    decoder: str = "small"


def run(
    visual: Sequence[int],
    methods: Sequence[str],
    keeps: Sequence[float],
    step: Step,
    out: Path | None,
    threads: int | None = None,
) -> bool:
    """Measure, print, write JSON to `out`; whether all bars are met. Raises `InvalidValue` for other sizes."""
    if wrong := [n for n in visual if n not in SIDES]:
        raise InvalidValue(f"Pictures are of {', '.join(map(str, SIDES))} visual tokens, not {wrong[0]}.")
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    variants: dict[str, tuple[str | None, float]] = {DENSE: (None, 1.0)}
    variants |= {f"{method} {keep:g}": (method, keep) for method in methods for keep in keeps}
    about = machine.describe(step.device, step.dtype) | {
        "workload": f"a step of GRPO: {step.answers} answers of {step.tokens} tokens to a picture and 40 tokens of text"
    }
    results = []
    for n in visual:
        with console.status(f"{n} visual tokens"):
            results.append(_measured(n, variants, step))
        console.print(_table(results[-1]))
    fits = _fits(results, step.memory) if len(results) > 1 else {}
    for name, tokens in fits.items():
        console.print(f"{name}: pictures and clips of up to {tokens:,} visual tokens in {step.memory:g} GiB")
    verdicts = bars(results)
    for met, sentence in verdicts:
        console.print(f"{'ok  ' if met else 'MISS'} {sentence}")
    if out is not None:
        write_json(out, {"machine": about, "rl": results, "fits": fits, "memory_gib": step.memory})
        console.print(f"wrote {out}")
    return all(met for met, _ in verdicts)


def bars(results: Sequence[dict[str, Any]]) -> list[tuple[bool, str]]:
    """(met, sentence) of each bar."""
    found = []
    for result in results:
        for method, bar in BARS.items():
            row = result["variants"].get(f"{method} {BAR_AT[1]:g}")
            if row is not None and result["visual_tokens"] == BAR_AT[0]:
                what = f"{method} at keep={BAR_AT[1]:g} of {BAR_AT[0]:,} tokens"
                found.append((row["share"] <= bar, f"{what} takes {row['share']:.2f} of a dense step (bar {bar:g})"))
    return found


def _measured(n: int, variants: dict[str, tuple[str | None, float]], step: Step) -> dict[str, Any]:
    model, inputs = llava(LLAMA[step.decoder], SIDES[n], False, step.answers, step.device, getattr(torch, step.dtype))
    model.train()
    once = partial(_step, model, inputs, step)
    once(None, 1.0)  # warms up
    peaks = {name: machine.peak_memory(step.device, partial(once, *variant))[0] for name, variant in variants.items()}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    flops = {}
    for i in range(step.rounds):
        for name in list(variants)[:: 1 if i % 2 == 0 else -1]:
            seconds, flops[name] = once(*variants[name])
            times[name].append(seconds)
    rows = {}
    for name, (method, keep) in variants.items():
        phases = {phase: [seconds[phase] for seconds in times[name]] for phase in PHASES}
        rows[name] = {
            "method": method,
            "keep": keep,
            "seconds": {phase: spread(all_) for phase, all_ in phases.items()},
            "share": statistics.median(
                sum(own.values()) / sum(dense.values()) for own, dense in zip(times[name], times[DENSE])
            ),
            "ideal_share": flops[name] / flops[DENSE],
            "peak_bytes": peaks[name],
        }
    vlm, adapter = find(model)
    parameters = sum(p.numel() for p in adapter.language_model(adapter.core(vlm)).parameters())
    return {"visual_tokens": n, "parameters": parameters, "variants": rows}


def _step(
    model: nn.Module, inputs: dict[str, Tensor], step: Step, method: str | None, keep: float
) -> tuple[dict[str, float], int]:
    """Seconds of each phase of one step, and the operations of its language model by formula."""
    now = clock(model.device, time.perf_counter)
    with ExitStack() as stack:
        handle: Patch | None = None
        if method is not None:
            what, options = call(model, method, keep=keep)
            handle = stack.enter_context(patch(model, what, **options))
        marks = [now()]
        with torch.no_grad():
            ids = model.generate(
                **inputs, max_new_tokens=step.tokens, min_new_tokens=step.tokens, do_sample=True, suppress_tokens=[5]
            )
        kept = None if handle is None else handle.trace.kept()
        counts = None if handle is None else handle.trace.counts()["compressed"]
        marks.append(now())
        full = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        prompt, answers = ids.shape[1] - step.tokens, ids[:, -step.tokens :, None]

        def log_probs() -> Tensor:
            with ExitStack() as inner:
                if handle is not None:
                    inner.enter_context(handle.prompt(prompt))
                    inner.enter_context(handle.replaying(kept))
                logits = model(**full, use_cache=False, logits_to_keep=step.tokens + 1).logits[:, :-1]
            return logits.log_softmax(-1).gather(2, answers)

        with torch.no_grad():
            old = log_probs()
        marks.append(now())
        loss = -(log_probs() - old).exp().mean()
        marks.append(now())
        loss.backward()
        marks.append(now())
        model.zero_grad(set_to_none=True)
    seconds = {phase: end - begin for phase, begin, end in zip(PHASES, marks, marks[1:])}
    return seconds, _flops(model, prompt, counts, step)


def _flops(model: nn.Module, prompt: int, counts: list[list[int]] | None, step: Step) -> int:
    """Of the language model in one step: a prefill and its decoding, then two forwards of prompt and answer and a
    backward, which is two more."""
    shape = TextShape.of(model.config)
    samples = counts or [[prompt] * shape.layers] * step.answers
    total = 0
    for sample in samples:
        whole = [n + step.tokens for n in sample]
        total += prefill_flops(shape, sample, True) + 4 * prefill_flops(shape, whole, True)
        total += sum(decode_flops(shape, [n + i for n in sample], {}) for i in range(1, step.tokens))
    return total


def _fits(results: Sequence[dict[str, Any]], gib: float) -> dict[str, int]:
    """Variant -> visual tokens of the largest step that fits, on a line through the peaks of the least and the largest
    picture that were measured; weights and their gradients are in it."""
    low, high = results[0], results[-1]
    weights = 8 * low["parameters"]
    fits = {}
    for name, row in low["variants"].items():
        a, b = row["peak_bytes"], high["variants"][name]["peak_bytes"]
        if a is None or b is None or b <= a:
            continue
        slope = (b - a) / (high["visual_tokens"] - low["visual_tokens"])
        fits[name] = int(low["visual_tokens"] + (gib * 2**30 - weights - a) / slope)
    return fits


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['visual_tokens']:,} visual tokens, ms, medians")
    for head in HEAD:
        table.add_column(head, justify="left" if head == "variant" else "right")
    for cells in rows_of(result):
        table.add_row(*cells)
    return table


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The cells of a result's table."""
    return [
        [
            name,
            *(f"{1e3 * row['seconds'][phase]['median']:.0f}" for phase in PHASES),
            f"{row['share']:.2f}",
            f"{row['ideal_share']:.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for name, row in result["variants"].items()
    ]
