"""The speed benchmark behind `make bench`: is the compute saved on paper also saved on the clock?

Random models of real proportions are measured at 576 visual tokens (LLaVA-1.5, one view of 336 pixels) and at
2,880 (LLaVA-NeXT, a thumbnail and 2 x 2 crops). The language model's prefill is timed apart from the encoder,
from before the first hook of the patch to after the last. Variants take turns, in an order that flips.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vtok.adapter import find
from vtok.compressor import STAGES
from vtok.demo import options
from vtok.errors import InvalidValue
from vtok.patching import available, patch

KEEP = 0.25
IDEAL_BAR = 0.85  # of the FLOP ratio, that the time ratio of a pre-LLM method at KEEP must reach
OVERHEAD_BAR = 0.02  # of a dense prefill, that the patch may cost at keep=1.0
TEXT = 40  # text tokens, half before the picture and half after it
ORDER = {stage: i for i, stage in enumerate(STAGES)}
FAMILIES = ("llava", "llava_next")

# Decoders of Vicuna's proportions: ffn 2.7 d, and its vocabulary, but for "toy".
DECODERS = {
    "toy": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "heads": 2},
    "small": {"hidden_size": 768, "intermediate_size": 2064, "num_hidden_layers": 8, "heads": 12},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32},
}


@dataclass(frozen=True)
class Sample:
    """Seconds of one run: encoder, language model, and what of the latter was selection.

    patch: all that the patch's hooks on the model did, and reading what the trace says of it.
    """

    encoder: float
    prefill: float
    selection: float
    patch: float


def build(family: str, decoder: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """A random model of the family and the inputs of one picture with 576 or 2,880 visual tokens.

    The vision tower is a thin one, with CLIP-L/336's patches: it is not what is measured.
    """
    import transformers as T

    torch.manual_seed(0)
    side = 24 if decoder != "toy" else 6  # patches a view
    sizes = dict(DECODERS[decoder])
    heads, vocab = sizes.pop("heads"), 32000 if decoder != "toy" else 1000
    common = {
        "vision_config": T.CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=14 * side,
            patch_size=14,
        ),
        "text_config": T.LlamaConfig(
            vocab_size=vocab,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=4096,
            **sizes,
        ),
        "image_token_index": 5,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    view = (3, 14 * side, 14 * side)
    if family == "llava":
        config, count = T.LlavaConfig(**common), side**2
        inputs = {"pixel_values": torch.rand(1, *view)}
    else:
        double = 28 * side
        config = T.LlavaNextConfig(image_grid_pinpoints=[[double, double]], **common)
        count = side**2 + 2 * side * (2 * side + 1)  # thumbnail, crops, a newline after each of their rows
        inputs = {"pixel_values": torch.rand(1, 5, *view), "image_sizes": torch.tensor([[double, double]])}
    model_class = T.LlavaForConditionalGeneration if family == "llava" else T.LlavaNextForConditionalGeneration
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            model = model_class(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    words = torch.randint(6, vocab, (1, TEXT))
    ids = [words[:, : TEXT // 2], torch.full((1, count), 5), words[:, TEXT // 2 :]]
    inputs["input_ids"] = torch.cat(ids, 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return model, {name: value.to(device) for name, value in inputs.items()}


def run_once(
    model: nn.Module,
    inputs: dict[str, Tensor],
    method: str | None,
    keep: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Sample, Any, Any]:
    """Prefill once, dense where `method` is None: the times, the patch's trace or None, and the cache."""
    vlm, adapter = find(model)
    language_model = adapter.core(vlm).language_model
    watched = (vlm, adapter.core(vlm), language_model)
    marks: dict[str, float] = {}

    def now() -> float:
        if vlm.device.type == "cuda":
            torch.cuda.synchronize(vlm.device)
        return clock()

    with ExitStack() as stack, torch.inference_mode():

        def watch(when: str) -> None:
            for i, module in enumerate(watched):
                for side, register in (
                    ("in", module.register_forward_pre_hook),
                    ("out", module.register_forward_hook),
                ):
                    key = f"{i} {side} {when}"
                    stack.callback(register(lambda *_, key=key: marks.__setitem__(key, now())).remove)

        watch("before")  # hooks run in the order of their registration: the patch's lie between these and the next
        handle = None if method is None else stack.enter_context(patch(model, method, **options(method, keep)))
        watch("after")
        began = now()
        cache = vlm(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        ended = now()
        trace = handle.trace if handle is not None else None
        selection = trace.selection_seconds if trace is not None else 0.0
        if trace is not None:
            trace.n_kept, trace.mean_keep, trace.flops(), trace.kv_bytes()
        work = now() - ended
    for i in range(len(watched)):
        work += sum(marks[f"{i} {side} after"] - marks[f"{i} {side} before"] for side in ("in", "out"))
    prefill = marks["2 out after"] - marks["2 in before"]
    return Sample(marks["2 in before"] - began, prefill, selection, work), trace, cache


def measure(
    family: str,
    decoder: str,
    device: str,
    dtype: torch.dtype,
    repetitions: int,
    seconds: float,
    clock: Callable[[], float],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The numbers of one family, as plain values for JSON. Stops after `seconds`, but not before 3 rounds."""
    model, inputs = build(family, decoder, device, dtype)
    known = available()["compressors"]
    names = [name for name, facts in known.items() if family in facts["families"] and not facts["trained"]]
    names.sort(key=lambda name: (ORDER.get(known[name]["stage"], len(ORDER)), name))
    identity = available()["adapters"][family]["default"]["method"]
    variants = {"dense": (None, 1.0), "keep=1.0": (identity, 1.0), **{name: (name, KEEP) for name in names}}

    traces, memory = {}, {}
    progress(f"{family}: warming up")
    run_once(model, inputs, *variants["dense"])
    gc.freeze()  # so that the collections between the runs are quick
    for name, variant in variants.items():
        progress(f"{family}: memory of {name}")
        peak, (_, traces[name], cache) = peak_memory(device, lambda v=variant: run_once(model, inputs, *v))
        memory[name] = {"peak_bytes": peak, "kv_bytes": cache_bytes(cache)}
        del cache
    gc.unfreeze()
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    began = time.perf_counter()
    for repetition in range(repetitions):
        if repetition >= 3 and time.perf_counter() - began > seconds:
            break
        progress(f"{family}: round {repetition + 1} of {repetitions}")
        order = list(variants) if repetition % 2 == 0 else list(variants)[::-1]
        for name in order:
            samples[name].append(run_once(model, inputs, *variants[name], clock)[0])

    any_trace = traces["keep=1.0"]
    dense_flops, dense_kv = any_trace.flops()["dense"]["prefill"], any_trace.kv_bytes()["dense"]
    dense_median = statistics.median(s.prefill for s in samples["dense"])
    rows = {}
    for name, trace in traces.items():
        flops = dense_flops if trace is None else trace.flops()["compressed"]["prefill"]
        times = [s.prefill for s in samples[name]]
        ratios = [dense.prefill / s.prefill for dense, s in zip(samples["dense"], samples[name])]
        median = statistics.median(times)
        rows[name] = {
            "stage": known[name]["stage"] if name in known else None,
            "mean_keep": 1.0 if trace is None else trace.mean_keep,
            "flops": flops,
            "prefill_seconds": {"median": median, "min": min(times), "max": max(times), "all": times},
            "encoder_seconds": statistics.median(s.encoder for s in samples[name]),
            "selection_seconds": statistics.median(s.selection for s in samples[name]),
            "patch_seconds": statistics.median(s.patch for s in samples[name]),
            "speedup": dense_median / median,
            "speedup_paired": statistics.median(ratios),
            "ideal_speedup": dense_flops / flops,
            "reached": dense_median / median * flops / dense_flops,
            "kv_bytes_formula": dense_kv if trace is None else trace.kv_bytes()["compressed"],
            **memory[name],
        }
    return {
        "family": family,
        "decoder": decoder,
        "parameters": sum(p.numel() for p in model.model.language_model.parameters()),
        "visual_tokens": sum(any_trace.n_visual),
        "text_tokens": TEXT,
        "keep": KEEP,
        "identity_method": identity,
        "rounds": len(samples["dense"]),
        "overhead": rows["keep=1.0"]["patch_seconds"] / dense_median,
        "overhead_paired": 1 / rows["keep=1.0"]["speedup_paired"] - 1,
        "variants": rows,
    }


def bars(result: dict[str, Any]) -> list[tuple[bool, str]]:
    """(met, sentence) of each bar."""
    where, rows = f"{result['visual_tokens']} tokens", result["variants"]
    found = []
    for name, row in rows.items():
        if row["stage"] == "pre_llm":
            text = f"{where}: {name} reaches {row['reached']:.0%} of the FLOP ratio (bar {IDEAL_BAR:.0%})"
            found.append((row["reached"] >= IDEAL_BAR, text))
    text = (
        f"{where}: at keep=1.0 hooks and trace take {result['overhead']:.2%} of a dense prefill "
        f"(bar {OVERHEAD_BAR:.0%}; whole prefills differ by {result['overhead_paired']:+.1%})"
    )
    found.append((result["overhead"] < OVERHEAD_BAR, text))
    wrong = [name for name, row in rows.items() if row["kv_bytes"] != row["kv_bytes_formula"]]
    found.append((not wrong, f"{where}: the cache holds as many bytes as the accounting says" + _list(wrong)))
    dense = rows["dense"]
    if dense["peak_bytes"] is not None:
        # Activations fall too; the cache's share is what the accounting promises. Methods in the decoder are left
        # out: its first layers run on all tokens, and so does their peak.
        short = [
            name
            for name, row in rows.items()
            if row["stage"] in ("encoder", "pre_llm")
            and row["kv_bytes_formula"] < dense["kv_bytes"]
            and dense["peak_bytes"] - row["peak_bytes"] < dense["kv_bytes"] - row["kv_bytes_formula"]
        ]
        found.append((not short, f"{where}: peak memory falls by at least the cache's savings" + _list(short)))
    return found


def run(
    out: Path | None = None,
    repetitions: int = 9,
    seconds: float = 150.0,
    threads: int | None = None,
    decoder: str = "small",
    device: str = "cpu",
    dtype: str = "float32",
    cpu_time: bool = False,
) -> bool:
    """Measure, print, write JSON to `out`; whether all bars are met. Parameters: `vtok bench --help`."""
    if decoder not in DECODERS:
        raise InvalidValue(f"There is no decoder {decoder!r}; there are: {', '.join(DECODERS)}.")
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    clock = time.process_time if cpu_time else time.perf_counter
    about = machine(device, dtype) | {"clock": "the process's CPU time" if cpu_time else "wall"}
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False, markup=False)
    results, verdicts = [], []
    for family in FAMILIES:
        with console.status("building the model") as status:
            result = measure(family, decoder, device, getattr(torch, dtype), repetitions, seconds, clock, status.update)
        gc.collect()
        results.append(result)
        console.print()
        console.print(table(result))
        for met, sentence in bars(result):
            verdicts.append(met)
            console.print(f"{'ok  ' if met else 'MISS'} {sentence}", style=None if met else "bold red")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
        console.print(f"wrote {out}", soft_wrap=True)
    return all(verdicts)


def table(result: dict[str, Any]) -> Table:
    """One family's numbers in 80 columns."""
    millions = result["parameters"] / 1e6
    counts = f"{result['visual_tokens']} visual + {result['text_tokens']} text tokens"
    title = f"{result['family']}, {counts}, {millions:.3g} M parameters, {result['rounds']} rounds"
    drawn = Table(title=title, box=None, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
    drawn.add_column(f"keep={result['keep']}", no_wrap=True)
    for name in ("prefill", "min-max", "speedup", "ideal", "reached", "select", "KV", "peak"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_row("", "ms", "ms", "x", "x", "%", "ms", "MB", "MB", style="dim")
    for name, row in result["variants"].items():
        t, peak = row["prefill_seconds"], row["peak_bytes"]
        drawn.add_row(
            name,
            f"{1e3 * t['median']:.0f}",
            f"{1e3 * t['min']:.0f}-{1e3 * t['max']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['ideal_speedup']:.2f}",
            f"{100 * row['reached']:.0f}",
            f"{1e3 * row['selection_seconds']:.1f}",
            f"{row['kv_bytes'] / 1e6:.1f}",
            "-" if peak is None else f"{peak / 1e6:.0f}",
        )
    return drawn


def peak_memory(device: str, work: Callable[[], Any]) -> tuple[int | None, Any]:
    """Bytes by which memory rose at most above its level before `work`, and what `work` returned.

    On a CPU the process's resident memory, which Linux tells; None elsewhere.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return torch.cuda.max_memory_allocated() - before, result
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present level
        before = _resident("VmHWM")
    except (OSError, AttributeError, StopIteration):
        return None, work()
    result = work()
    return _resident("VmHWM") - before, result


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def machine(device: str, dtype: str) -> dict[str, str]:
    """What a number needs to be believed."""
    import transformers

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor() or platform.machine()} x {os.cpu_count()}"
    return {
        "machine": name,
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "dtype": dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def commit() -> str:
    """The short hash of the checkout that this file is in, "+" behind it where files differ; or "unknown"."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _list(names: list[str]) -> str:
    return f", not so: {', '.join(names)}" if names else ""
