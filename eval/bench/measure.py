"""What `vtok bench` measures: phases, memory and cache of one model, dense and with every method at every `keep`.

Variants take turns, in an order that flips, so that a disturbance of the machine meets all alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vtok.adapter import find
from vtok.engine.accounting import prefill_flops
from vtok.engine.cache import cache_in
from vtok.errors import InvalidValue
from vtok.eval.bench import machine
from vtok.eval.bench.workloads import Built
from vtok.methods import available, call, facts, has_keep, refusal, supported
from vtok.patching import patch
from vtok.runs import DENSE
from vtok.stages import ORDER as STAGES
from vtok.timing import Marks, clock

IDENTITY = "keep=1.0"
JUDGED = 0.25  # bars on times and memory hold at this `keep`
ORDER = {stage: i for i, stage in enumerate(STAGES)}
Variants = dict[str, tuple[str | None, float]]  # name -> method (None: dense) and its `keep`


@dataclass(frozen=True)
class How:
    """batch: samples at once. tokens: to decode. repetitions: runs of each variant, at most. seconds: after which to
    stop, but not before 3 rounds. cpu_time: whether the process's CPU time counts instead of the wall's."""

    batch: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    tokens: int = 8
    repetitions: int = 9
    seconds: float = 300.0
    cpu_time: bool = False

    @property
    def read(self) -> Callable[[], float]:
        return time.process_time if self.cpu_time else time.perf_counter


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
    read: Callable[[], float] = time.perf_counter,
) -> tuple[Sample, Any, Any]:
    """Prefill once and decode `steps` tokens, dense where `method` is None: the times, the patch's trace or None, and
    the cache. read: the clock."""
    vlm, adapter = find(model)
    core = adapter.core(vlm)
    decoder, projector = adapter.language_model(core), core.get_submodule(adapter.projector)
    watched = {"vlm": vlm, "core": core, "llm": decoder, "projector": projector}
    placeholders = [adapter.token_id(core.config, modality) for modality in adapter.encoders]  # random models say them
    settings = {"do_sample": False, "suppress_tokens": placeholders, "return_dict_in_generate": True}
    now = clock(vlm.device, read)
    with ExitStack() as stack, torch.inference_mode():

        def watch() -> dict[str, Marks]:
            marks = {name: Marks(module, now) for name, module in watched.items()}
            for mark in marks.values():
                stack.callback(mark.remove)
            return marks

        before, handle = watch(), None  # the patch's hooks lie between these and the next
        if method is not None:
            what, options = call(model, method, keep=keep)
            handle = stack.enter_context(patch(model, what, **options))
        after = watch()
        began = now()
        output = vlm.generate(**inputs, max_new_tokens=steps + 1, min_new_tokens=steps + 1, **settings)
        ended = now()
        trace = handle.trace if handle is not None else None
        selection = trace.selection_seconds if trace is not None else 0.0
        if trace is not None:
            trace.n_kept, trace.mean_keep, trace.flops(), trace.kv_bytes()
        work = now() - ended
    for name in ("vlm", "core", "llm"):
        work += after[name].entered[0] - before[name].entered[0] + after[name].left[0] - before[name].left[0]
    projector = after["projector"].left[0] - before["projector"].entered[0]
    starts = before["llm"].entered
    sample = Sample(
        encoder=starts[0] - began - projector,
        projector=projector,
        prefill=after["llm"].left[0] - starts[0],
        selection=selection,
        patch=work,
        decode=tuple(end - start for start, end in pairwise([*starts[1:], ended])),
    )
    return sample, trace, cache_in(output)


def measure(
    build: Callable[..., Built],
    keeps: Sequence[float],
    methods: Sequence[str] | None,
    how: How,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The numbers of one model and picture, as plain values for JSON.

    methods: names, or None for every method that the model can be patched with and that needs no training."""
    model, inputs = build(how.batch, how.device, getattr(torch, how.dtype))
    family = find(model)[1].family
    variants, refused = _variants(model, family, keeps, methods)
    progress("warming up")
    run_once(model, inputs, *variants[DENSE], steps=min(how.tokens, 1))
    traces, memory = _memory(model, inputs, variants, how.device, progress)
    samples = _rounds(model, inputs, variants, how, progress)
    trace, (vlm, adapter) = traces[IDENTITY], find(model)
    rows = _rows(variants, traces, samples, memory, how.tokens)
    visual = sum(trace.n_visual) // how.batch
    text, shape = inputs["input_ids"].shape[1] - visual, trace.shapes.text
    at = lambda kept: how.batch * prefill_flops(shape, [kept + text] * shape.layers, causal=True)
    return {
        "family": family,
        "parameters": sum(p.numel() for p in adapter.language_model(adapter.core(vlm)).parameters()),
        "batch": how.batch,
        "visual_tokens": visual,
        "text_tokens": text,
        "flops_at": [[kept, at(kept)] for kept in range(0, visual + 1, max(1, visual // 24))],
        "identity_method": variants[IDENTITY][0],
        "rounds": len(samples[DENSE]),
        "decode_steps": how.tokens,
        "overhead": rows[IDENTITY]["patch_seconds"]["median"] / rows[DENSE]["prefill_seconds"]["median"],
        "overhead_paired": 1 / rows[IDENTITY]["speedup_paired"] - 1,
        "variants": rows,
        "refused": refused,
    }


def _variants(
    model: nn.Module, family: str, keeps: Sequence[float], methods: Sequence[str] | None
) -> tuple[Variants, dict[str, str]]:
    """What is measured, and why some of it cannot be. Raises `InvalidValue` for a method that never runs here."""
    found = available()
    names = list({*supported(model, methods), *supported(model, methods, keep=max(keeps))})
    if methods is not None and (wrong := [name for name in methods if name not in names]):
        raise InvalidValue(
            f"{', '.join(wrong)} cannot be measured on {family}; there are: {', '.join(supported(model))}."
        )
    stage = lambda name: facts(name, found["compressors"])["stage"]
    names.sort(key=lambda name: (ORDER.get(stage(name), len(ORDER)), name))
    identity = found["adapters"][family]["default"]["method"]
    variants: Variants = {DENSE: (None, 1.0), IDENTITY: (identity, 1.0)}
    refused = {}
    for name in names:
        for keep in keeps if has_keep(name) else (JUDGED,):  # core neurons and the like have no keep
            if reason := refusal(model, name, keep=keep):  # a schedule may not reach down there
                refused[f"{name} {keep:g}"] = reason
            else:
                variants[f"{name} {keep:g}"] = (name, keep)
    return variants, refused


def _memory(
    model: nn.Module, inputs: dict[str, Tensor], variants: Variants, device: str, progress: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Of each variant the trace of a first run, and how memory rose in it."""
    traces, memory = {}, {}
    gc.freeze()  # so that the collections between the runs are quick
    for name, variant in variants.items():
        progress(f"memory of {name}")
        peak, (_, traces[name], cache) = machine.peak_memory(device, lambda v=variant: run_once(model, inputs, *v))
        memory[name] = {"peak_bytes": peak, "kv_bytes": cache_bytes(cache)}
        del cache
    gc.unfreeze()
    return traces, memory


def _rounds(
    model: nn.Module, inputs: dict[str, Tensor], variants: Variants, how: How, progress: Callable[[str], None]
) -> dict[str, list[Sample]]:
    """Times of each variant, round by round."""
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    began = time.perf_counter()
    for repetition in range(how.repetitions):
        if repetition >= 3 and time.perf_counter() - began > how.seconds:
            break
        progress(f"round {repetition + 1} of {how.repetitions}")
        order = list(variants) if repetition % 2 == 0 else list(variants)[::-1]
        for name in order:
            samples[name].append(run_once(model, inputs, *variants[name], how.tokens, how.read)[0])
    return samples


def _rows(
    variants: Variants,
    traces: dict[str, Any],
    samples: dict[str, list[Sample]],
    memory: dict[str, dict[str, Any]],
    steps: int,
) -> dict[str, dict[str, Any]]:
    """The numbers of each variant."""
    known, of_any = available()["compressors"], traces[IDENTITY]
    dense, dense_kv = of_any.flops(causal=True)["dense"], of_any.kv_bytes()["dense"]
    dense_flops = dense["prefill"]
    dense_times = [s.prefill for s in samples[DENSE]]
    rows = {}
    for name, (method, keep) in variants.items():
        trace, mine = traces[name], samples[name]
        counted = dense if trace is None else trace.flops(causal=True)["compressed"]
        flops = counted["prefill"]
        times = [s.prefill for s in mine]
        speedup = statistics.median(dense_times) / statistics.median(times)
        compared = name not in (DENSE, IDENTITY)
        rows[name] = {
            "method": method if compared else None,
            "keep": keep,
            "stage": facts(method, known)["stage"] if compared else None,
            "mean_keep": 1.0 if trace is None else trace.mean_keep,
            "flops": flops,
            "encoder_flops": counted["encoder"],
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
    return rows


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "all": list(seconds)}


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)
