"""The speed benchmark behind `make bench`: is the compute saved on paper also saved on the clock?

A workload (`vtok.eval.bench.workloads`) runs dense, patched with keep=1.0, and with every method at every `keep`, phase
by phase: encoder, projector, the language model's prefill (from before the first hook of the patch to after the last),
within it the selection, and then decoding token by token. Variants take turns, in an order that flips.

The ideal is the ratio of the operations that causal attention needs. Published tables count all n^2 scores of a
prefill, of which the kernels in use compute the lower half: by that count dense would be given more than it pays for.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vtok.adapter import find
from vtok.demo import options, supported
from vtok.engine.accounting import prefill_flops
from vtok.errors import InvalidValue
from vtok.eval.bench import machine, workloads
from vtok.patching import available, patch
from vtok.stages import ORDER as STAGES

KEEPS = (0.5, 0.25, 0.1)
DENSE, IDENTITY = "dense", "keep=1.0"
JUDGED, LARGE = 0.25, 2048  # bars on times and memory hold at this `keep`, from so many visual tokens on
IDEAL_BARS = {"pre_llm": 0.90, "llm": 0.85}  # of the FLOP ratio, that the ratio of prefill times must reach, by stage
SELECTION_BAR = 0.05  # of a dense prefill, that the selection may take
OVERHEAD_BAR = 0.01  # of a dense prefill, that hooks and trace may cost at keep=1.0
DECODE_BAR = 1.02  # of the dense time a token: not slower, within what a clock tells
ORDER = {stage: i for i, stage in enumerate(STAGES)}


@dataclass(frozen=True)
class Sample:
    """Seconds of one run of `generate`.

    encoder: until the language model begins, less the projector. prefill: of the language model, selection and patch
    included. patch: all that the patch's hooks on the model did, and reading what the trace says of it. decode: of
    each token after the first.
    """

    encoder: float
    projector: float
    prefill: float
    selection: float
    patch: float
    decode: tuple[float, ...]


def run_once(
    model: nn.Module,
    inputs: dict[str, Tensor],
    method: str | None,
    keep: float,
    steps: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Sample, Any, Any]:
    """Prefill once and decode `steps` tokens, dense where `method` is None: the times, the patch's trace or None, and
    the cache."""
    vlm, adapter = find(model)
    core = adapter.core(vlm)
    watched = {"vlm": vlm, "core": core, "llm": core.language_model, "projector": core.get_submodule(adapter.projector)}
    marks: dict[str, list[float]] = {}
    placeholders = [adapter.token_id(core.config, modality) for modality in adapter.encoders]  # random models say them
    settings = {"do_sample": False, "suppress_tokens": placeholders, "return_dict_in_generate": True}

    def now() -> float:
        if vlm.device.type == "cuda":
            torch.cuda.synchronize(vlm.device)
        return clock()

    with ExitStack() as stack, torch.inference_mode():

        def watch(when: str) -> None:
            for name, module in watched.items():
                for side, register in (
                    ("in", module.register_forward_pre_hook),
                    ("out", module.register_forward_hook),
                ):
                    times = marks.setdefault(f"{name} {side} {when}", [])
                    stack.callback(register(lambda *_, times=times: times.append(now())).remove)

        watch("before")  # hooks run in the order of their registration: the patch's lie between these and the next
        handle = None if method is None else stack.enter_context(patch(model, method, **options(method, keep)))
        watch("after")
        began = now()
        output = vlm.generate(**inputs, max_new_tokens=steps + 1, min_new_tokens=steps + 1, **settings)
        ended = now()
        trace = handle.trace if handle is not None else None
        selection = trace.selection_seconds if trace is not None else 0.0
        if trace is not None:
            trace.n_kept, trace.mean_keep, trace.flops(), trace.kv_bytes()
        work = now() - ended
    first = {name: times[0] for name, times in marks.items()}
    for name in ("vlm", "core", "llm"):
        work += sum(first[f"{name} {side} after"] - first[f"{name} {side} before"] for side in ("in", "out"))
    projector = first["projector out after"] - first["projector in before"]
    starts = [*marks["llm in before"], ended]
    sample = Sample(
        encoder=first["llm in before"] - began - projector,
        projector=projector,
        prefill=first["llm out after"] - first["llm in before"],
        selection=selection,
        patch=work,
        decode=tuple(end - start for start, end in pairwise(starts[1:])),
    )
    return sample, trace, output.past_key_values


def measure(
    build: Callable[..., workloads.Built],
    batch: int,
    device: str,
    dtype: torch.dtype,
    keeps: Sequence[float],
    methods: Sequence[str] | None,
    steps: int,
    repetitions: int,
    seconds: float,
    clock: Callable[[], float],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The numbers of one model and picture, as plain values for JSON. Stops after `seconds`, but not before 3 rounds.

    methods: names, or None for every method that the model can be patched with and that needs no training."""
    model, inputs = build(batch, device, dtype)
    family = find(model)[1].family
    known = available()["compressors"]
    names = supported(model, [name for name, facts in known.items() if not facts["trained"]])
    if methods is not None:
        if wrong := [name for name in methods if name not in names]:
            raise InvalidValue(f"{', '.join(wrong)} cannot be measured on {family}; there are: {', '.join(names)}.")
        names = list(methods)
    names.sort(key=lambda name: (ORDER.get(known[name]["stage"], len(ORDER)), name))
    identity = available()["adapters"][family]["default"]["method"]
    variants: dict[str, tuple[str | None, float]] = {DENSE: (None, 1.0), IDENTITY: (identity, 1.0)}
    refused = {}
    for name in names:
        for keep in keeps if options(name, 1.0) else (JUDGED,):  # core neurons and the like have no keep
            try:
                patch(model, name, **options(name, keep)).remove()
                variants[f"{name} {keep:g}"] = (name, keep)
            except InvalidValue as reason:  # a schedule may not reach down there
                refused[f"{name} {keep:g}"] = str(reason)

    traces, memory = {}, {}
    progress("warming up")
    run_once(model, inputs, *variants[DENSE], steps=min(steps, 1))
    gc.freeze()  # so that the collections between the runs are quick
    for name, variant in variants.items():
        progress(f"memory of {name}")
        peak, (_, traces[name], cache) = machine.peak_memory(device, lambda v=variant: run_once(model, inputs, *v))
        memory[name] = {"peak_bytes": peak, "kv_bytes": cache_bytes(cache)}
        del cache
    gc.unfreeze()
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    began = time.perf_counter()
    for repetition in range(repetitions):
        if repetition >= 3 and time.perf_counter() - began > seconds:
            break
        progress(f"round {repetition + 1} of {repetitions}")
        order = list(variants) if repetition % 2 == 0 else list(variants)[::-1]
        for name in order:
            samples[name].append(run_once(model, inputs, *variants[name], steps, clock)[0])

    any_trace = traces[IDENTITY]
    dense_flops, dense_kv = any_trace.flops(causal=True)["dense"]["prefill"], any_trace.kv_bytes()["dense"]
    dense_times = [s.prefill for s in samples[DENSE]]
    rows = {}
    for name, (method, keep) in variants.items():
        trace, mine = traces[name], samples[name]
        flops = dense_flops if trace is None else trace.flops(causal=True)["compressed"]["prefill"]
        times = [s.prefill for s in mine]
        speedup = statistics.median(dense_times) / statistics.median(times)
        compared = name not in (DENSE, IDENTITY)
        rows[name] = {
            "method": method if compared else None,
            "keep": keep,
            "stage": known[method]["stage"] if compared else None,
            "mean_keep": 1.0 if trace is None else trace.mean_keep,
            "flops": flops,
            "encoder_seconds": spread([s.encoder for s in mine]),
            "projector_seconds": spread([s.projector for s in mine]),
            "selection_seconds": spread([s.selection for s in mine]),
            "prefill_seconds": spread(times),
            "decode_seconds": spread([t for s in mine for t in s.decode[1:]]) if steps > 1 else None,
            "first_decode_seconds": spread([s.decode[0] for s in mine]) if steps else None,
            "patch_seconds": spread([s.patch for s in mine]),
            "speedup": speedup,
            "speedup_paired": statistics.median(dense / own for dense, own in zip(dense_times, times)),
            "ideal_speedup": dense_flops / flops,
            "reached": speedup * flops / dense_flops,
            "kv_bytes_formula": dense_kv if trace is None else trace.kv_bytes()["compressed"],
            **memory[name],
        }
    tokens, text = sum(any_trace.n_visual) // batch, inputs["input_ids"].shape[1] - sum(any_trace.n_visual) // batch
    shape = any_trace.shapes.text
    at = lambda kept: batch * prefill_flops(shape, [kept + text] * shape.layers, causal=True)
    return {
        "family": family,
        "parameters": sum(p.numel() for p in find(model)[1].core(model).language_model.parameters()),
        "batch": batch,
        "visual_tokens": tokens,
        "text_tokens": text,
        "flops_at": [[kept, at(kept)] for kept in range(0, tokens + 1, max(1, tokens // 24))],
        "identity_method": identity,
        "rounds": len(dense_times),
        "decode_steps": steps,
        "overhead": rows[IDENTITY]["patch_seconds"]["median"] / statistics.median(dense_times),
        "overhead_paired": 1 / rows[IDENTITY]["speedup_paired"] - 1,
        "variants": rows,
        "refused": refused,
    }


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "all": list(seconds)}


def bars(result: dict[str, Any]) -> list[tuple[bool, str]]:
    """(met, sentence) of each bar."""
    where, rows = f"{result['visual_tokens']} tokens", result["variants"]
    dense = rows[DENSE]
    judged = {row["method"]: row for row in rows.values() if row["method"] and row["keep"] == JUDGED}
    found = []

    def bar(good: Callable[[dict[str, Any]], bool], sentence: str, group: dict[str, dict[str, Any]]) -> None:
        if group:
            wrong = [name for name, row in group.items() if not good(row)]
            found.append((not wrong, f"{where}: {sentence}" + (f", not so: {', '.join(wrong)}" if wrong else "")))

    bar(lambda row: row["kv_bytes"] == row["kv_bytes_formula"], "the cache holds the bytes of the accounting", rows)
    if result["visual_tokens"] < LARGE:
        return found
    for stage, least in IDEAL_BARS.items():
        group = {f"{n} {row['reached']:.0%}": row for n, row in judged.items() if row["stage"] == stage}
        bar(
            lambda row, least=least: row["reached"] >= least,
            f"{stage} methods reach {least:.0%} of the FLOP ratio",
            group,
        )
    share = lambda row: row["selection_seconds"]["median"] / dense["prefill_seconds"]["median"]
    known = available()["compressors"]
    group = {f"{n} {share(row):.1%}": row for n, row in judged.items() if not known[n]["slow"]}
    bar(
        lambda row: share(row) < SELECTION_BAR,
        f"selection takes below {SELECTION_BAR:.0%} of a dense prefill (slow ones apart)",
        group,
    )
    found.append(
        (
            result["overhead"] < OVERHEAD_BAR,
            f"{where}: at keep=1.0 hooks and trace take {result['overhead']:.2%} of a dense prefill (bar "
            f"{OVERHEAD_BAR:.0%}; whole prefills differ by {result['overhead_paired']:+.1%})",
        )
    )
    if dense["decode_seconds"]:
        ratio = lambda row: row["decode_seconds"]["median"] / dense["decode_seconds"]["median"]
        group = {f"{n} {ratio(row):.2f}": row for n, row in judged.items()}
        bar(lambda row: ratio(row) <= DECODE_BAR, "a decoded token takes no longer than a dense one", group)
    if dense["peak_bytes"] is not None:
        # Activations fall too; the cache's share is what the accounting promises. Methods in the decoder are left
        # out: its first layers run on all tokens, and so does their peak.
        group = {
            name: row
            for name, row in rows.items()
            if row["stage"] in ("pixels", "blocks", "pre_llm") and row["kv_bytes_formula"] < dense["kv_bytes"]
        }
        saved = lambda row, key: dense[key] - row[key]
        bar(
            lambda row: saved(row, "peak_bytes") >= dense["kv_bytes"] - row["kv_bytes_formula"],
            "peak memory falls by at least the cache's savings",
            group,
        )
    return found


def run(
    workload: str = "small",
    tokens: Sequence[int] | None = None,
    out: Path | None = None,
    keeps: Sequence[float] = KEEPS,
    methods: Sequence[str] | None = None,
    batch: int = 1,
    steps: int = 8,
    repetitions: int = 9,
    seconds: float = 300.0,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    cpu_time: bool = False,
) -> bool:
    """Measure, print, write JSON to `out` and a plot of each picture beside it; whether all bars are met. Parameters:
    `vtok bench --help`."""
    found = workloads.find(workload)
    if wrong := [str(n) for n in tokens or () if n not in found.builds]:
        there = ", ".join(map(str, found.builds))
        raise InvalidValue(f"{workload} has no picture of {', '.join(wrong)} tokens; it has: {there}.")
    for keep in keeps:
        if not 0 < keep < 1:
            raise InvalidValue(f"To keep {keep:g} is nothing to measure: give fractions between 0 and 1.")
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    clock = time.process_time if cpu_time else time.perf_counter
    about = machine.describe(device, dtype) | {
        "clock": "the process's CPU time" if cpu_time else "wall",
        "workload": found.title,
    }
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False, markup=False)
    results, verdicts = [], []
    for n in tokens or found.builds:
        with console.status("building the model") as status:
            result = measure(
                found.builds[n],
                batch,
                device,
                getattr(torch, dtype),
                keeps,
                methods,
                steps,
                repetitions,
                seconds,
                clock,
                status.update,
            )
        gc.collect()
        results.append(result)
        console.print()
        console.print(table(result))
        for name, reason in result["refused"].items():
            console.print(f"not run: {name}. {reason}", style="dim", highlight=False, markup=False)
        for met, sentence in bars(result):
            verdicts.append(met)
            console.print(f"{'ok  ' if met else 'MISS'} {sentence}", style=None if met else "bold red")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
        console.print(f"wrote {out}", soft_wrap=True)
        for result in results:
            file = out.with_name(f"{out.stem}-{result['visual_tokens']}.png")
            plot(result, f"{about['workload']}, {about['machine']}, {about['dtype']}", file)
            console.print(f"wrote {file}", soft_wrap=True)
    return all(verdicts)


def table(result: dict[str, Any]) -> Table:
    """One picture's numbers in 80 columns."""
    counts = f"{result['batch']} x ({result['visual_tokens']} visual + {result['text_tokens']} text) tokens"
    title = f"{result['family']}, {counts}, {result['parameters'] / 1e6:.3g} M parameters, {result['rounds']} rounds"
    dense = result["variants"][DENSE]
    phases = f"encoder {_ms(dense['encoder_seconds'])} ms, projector {_ms(dense['projector_seconds'])} ms"
    drawn = Table(
        title=f"{title}\n{phases}",
        box=None,
        padding=(0, 1, 0, 0),
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    drawn.add_column("keep", no_wrap=True)
    for name in ("prefill", "min-max", "speed", "ideal", "reached", "select", "token", "KV", "peak"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_row("", "ms", "ms", "x", "x", "%", "ms", "ms", "MB", "MB", style="dim")
    for name, row in result["variants"].items():
        t, peak = row["prefill_seconds"], row["peak_bytes"]
        drawn.add_row(
            name,
            f"{1e3 * t['median']:.0f}",
            f"{1e3 * t['min']:.0f}-{1e3 * t['max']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['ideal_speedup']:.2f}",
            f"{100 * row['reached']:.0f}",
            _ms(row["selection_seconds"]),
            "-" if row["decode_seconds"] is None else _ms(row["decode_seconds"]),
            f"{row['kv_bytes'] / 1e6:.1f}",
            "-" if peak is None else f"{peak / 1e6:.0f}",
        )
    return drawn


def _ms(times: dict[str, Any]) -> str:
    return f"{1e3 * times['median']:.1f}"


def plot(result: dict[str, Any], caption: str, file: Path) -> None:
    """Prefill time against kept tokens, all methods, with the line that the FLOPs promise. Raises `MissingExtra`."""
    from vtok import draw

    draw.check()
    from matplotlib.figure import Figure

    rows = result["variants"]
    dense = rows[DENSE]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    n, per_flop = result["visual_tokens"], dense["prefill_seconds"]["median"] / dense["flops"]
    ideal = [(kept, 1e3 * per_flop * flops) for kept, flops in result["flops_at"]]
    label = "ideal: dense time x FLOP ratio,\nas many tokens in all layers"
    axes.plot(*zip(*ideal), color="black", linewidth=1, linestyle="--", label=label, zorder=1)
    names = list(dict.fromkeys(row["method"] for row in rows.values() if row["method"]))
    # a diamond for those of several stages, and of others
    markers = {"pixels": "^", "blocks": "^", "pre_llm": "o", "llm": "s"}
    for i, name in enumerate(names):
        mine = [row for row in rows.values() if row["method"] == name]
        x = [row["mean_keep"] * n + 0.004 * n * (i - len(names) / 2) for row in mine]  # side by side, to be seen
        times = [row["prefill_seconds"] for row in mine]
        y = [1e3 * t["median"] for t in times]
        errors = [[1e3 * (t["median"] - t["min"]) for t in times], [1e3 * (t["max"] - t["median"]) for t in times]]
        axes.errorbar(
            x,
            y,
            errors,
            label=name,
            color=f"C{i % 10}",
            marker=markers.get(mine[0]["stage"], "D"),
            markerfacecolor="white" if i >= 10 else None,
            markersize=5,
            linestyle="none",
            linewidth=0.8,
        )
    axes.plot([n], [1e3 * dense["prefill_seconds"]["median"]], "k*", markersize=10, label=DENSE)
    axes.set(
        xlabel="visual tokens kept (mean over decoder layers; equal counts side by side)",
        ylabel="prefill, ms (median, least to most)",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.set_title(caption, fontsize=8, loc="left")
    axes.legend(fontsize=7, ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)
