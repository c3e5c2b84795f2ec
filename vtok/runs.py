"""One question to a model, dense or with a method: what it answered, what was kept, and how long it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtok import adapter as adapters
from vtok.engine.trace import Trace
from vtok.errors import InvalidValue
from vtok.methods import call
from vtok.patching import patch
from vtok.prompts import Conversation, encode
from vtok.timing import Marks, clock

DENSE = "dense"


@dataclass(frozen=True)
class Run:
    """One answer, on one line, without what a terminal would obey.

    selection, prefill, total: seconds: the compressor alone, the rest of the language model's first forward, and the
        whole of `generate`.
    trace: None for the dense model.
    """

    text: str
    selection: float
    prefill: float
    total: float
    trace: Trace | None


@dataclass(frozen=True)
class Asked:
    """A question that is put to one model again and again. how: `vtok.methods.call`'s `keep` or `budget`."""

    model: nn.Module
    processor: Any
    inputs: Any
    methods: Sequence[str]
    how: dict[str, Any]
    max_new_tokens: int

    @staticmethod
    def of(
        model: nn.Module,
        processor: Any,
        conversation: Conversation,
        methods: Sequence[str],
        max_new_tokens: int = 20,
        keep: float | int = 0.25,
        budget: float | None = None,
    ) -> Asked:
        """budget: instead of `keep`. Raises `InvalidValue` without a method."""
        if not methods:
            raise InvalidValue("No method was given.")
        vlm, _ = adapters.find(model)
        inputs = encode(processor, [conversation]).to(vlm.device)
        for name, x in inputs.items():
            inputs[name] = x.to(vlm.dtype) if x.is_floating_point() else x
        how = {"keep": keep} if budget is None else {"budget": budget}
        return Asked(model, processor, inputs, methods, how, max_new_tokens)

    def all(self, progress: Callable[[str], None] = lambda _: None) -> dict[str, Run]:
        """The answers of the dense model and with each method; `progress` is told before each."""
        runs = {}
        for method in (DENSE, *self.methods):
            progress(method)
            runs[method] = self.run(method)
        return runs

    def run(self, method: str = DENSE) -> Run:
        """The answer with one method, patched for this run alone, or of the dense model."""
        vlm, adapter = adapters.find(self.model)
        language_model, now = adapter.language_model(adapter.core(vlm)), clock(vlm.device)
        with ExitStack() as stack:
            # The patch's own hooks lie between these two, so that its work is counted.
            before = Marks(language_model, now, first=True)
            stack.callback(before.remove)
            handle = None
            if method != DENSE:
                what, options = call(self.model, method, **self.how)
                handle = stack.enter_context(patch(self.model, what, **options))
            after = Marks(language_model, now, first=True)
            stack.callback(after.remove)
            began = now()
            ids = vlm.generate(**self.inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
            total = now() - began
            trace = None if handle is None else handle.trace
        selection = 0.0 if trace is None else trace.selection_seconds
        prompt = self.inputs["input_ids"].shape[1]
        (text,) = self.processor.batch_decode(ids[:, prompt:], skip_special_tokens=True)
        return Run(readable(text), selection, after.left[0] - before.entered[0] - selection, total, trace)


def readable(text: str) -> str:
    """The text on one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
