"""What a run of lmms-eval cost: phases, tokens, operations and memory, summed over its batches and processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from vtok.adapter import Adapter
from vtok.eval.bench.machine import PeakMemory
from vtok.patching import Patch
from vtok.prompts import Conversation
from vtok.timing import Marks, clock

PHASES = ("encoder", "selection", "prefill", "decode")


class Costs:
    """The sums of one run, `totals`, begun anew by `reset`."""

    def __init__(self, core: torch.nn.Module, adapter: Adapter, device: torch.device) -> None:
        self.device = device
        self._now = clock(device)
        self._marks = Marks(adapter.language_model(core), self._now, first=True)
        self._kinds = [adapter.token_id(core.config, modality) for modality in adapter.encoders]
        self.reset()

    def reset(self) -> None:
        self.totals: Counter[str] = Counter()
        self._peak: PeakMemory | None = None

    def watch_memory(self) -> None:
        """From the first request of a run on."""
        if self._peak is None:
            self._peak = PeakMemory(str(self.device))

    def begin(self) -> None:
        """A batch begins."""
        self._marks.clear()
        self._began = self._now()

    def end(self, asked: Sequence[Conversation], inputs: Any, patch: Patch | None) -> None:
        """Count the batch. encoder: all before the language model. prefill: its first forward without the selection,
        which is the compressors' time in it. decode: the rest."""
        ended, (entered,), (left,) = self._now(), self._marks.entered, self._marks.left
        totals, n = self.totals, len(asked)
        seen = any(conversation.pictures or conversation.clips for conversation in asked)
        trace = patch.trace if patch is not None and seen else None
        selection = 0.0 if trace is None else trace.selection_seconds
        seconds = (entered - self._began, selection, left - entered - selection, ended - left)
        totals.update(dict(zip(PHASES, seconds)))
        totals["seconds"] += sum(seconds)
        n_visual = n_kept = sum(int((inputs["input_ids"] == kind).sum()) for kind in self._kinds)
        if trace is not None:
            beams = trace.batch / n
            visual = sum(trace.n_visual)
            n_kept -= (visual - sum(trace.n_kept)) / beams
            flops = trace.flops()
            totals["compressed"] += n * any(flops["compressed"][p] < flops["dense"][p] for p in flops["dense"])
            totals["traced"] += visual / beams
            totals["present"] += visual / beams * trace.mean_keep
            for kind in flops:
                totals[f"flops_{kind}"] += (flops[kind]["encoder"] + flops[kind]["prefill"]) / beams
        totals.update({"samples": n, "with_pictures": sum(bool(c.pictures or c.clips) for c in asked)})
        totals.update({"n_visual": n_visual, "n_kept": n_kept, "input_tokens": int(inputs["attention_mask"].sum())})

    def report(self, world_size: int = 1) -> Counter[str]:
        """Hand the run's means to lmms-eval, count from nothing again, and return the sums over all processes."""
        totals, peak = self.totals, None if self._peak is None else self._peak.rise()
        self.reset()
        if world_size > 1:
            held: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(held, (dict(totals), peak))
            peak = max((rise for _, rise in held if rise is not None), default=None)
            totals = sum((Counter(one) for one, _ in held), Counter())
        n = totals["samples"]
        if not n:  # all answers came from the cache
            return totals
        costs = {f"{phase}_seconds": totals[phase] / n for phase in PHASES}
        costs |= {name: totals[name] / n for name in ("n_visual", "n_kept", "input_tokens")}
        costs["mean_keep"] = totals["present"] / totals["traced"] if totals["traced"] else 1.0
        costs["flops_ratio"] = totals["flops_compressed"] / totals["flops_dense"] if totals["flops_dense"] else 1.0
        if peak is not None:
            costs["peak_memory_mb"] = peak / 1e6
        speed = totals["output_tokens"] / totals["seconds"]
        log_metrics(totals["seconds"], int(totals["output_tokens"]), speed, {"total_requests": int(n), **costs})
        return totals
