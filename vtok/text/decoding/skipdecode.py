"""SkipDecode: the later a token, the fewer layers it passes (https://arxiv.org/abs/2307.02628).

How many layers run depends on how far the answer is, not on the token: all rows of a batch skip alike. The number never
grows, and what is skipped lies behind a few warm-up layers, so a layer that runs has run at all steps before: its cache
has no gaps, and nothing is computed after the fact.

Written from the paper's abstract and algorithm; its tables of layers for a speed-up could not be checked, and there are
no defaults from them.
Not for models as they come: they lose sense quickly with fewer layers. They must be tuned with the schedule that they
decode with, within `SkipDecode.tuning`. Not for chat: at a second turn the number of layers would grow again, and the
skipped layers have no keys of the first answer; that is refused. What gives the output of the whole model is
self-speculation, where skipped layers draft and all layers check.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vtok import options
from vtok.adapters.causal_lm import CausalLM
from vtok.engine.cache import cache_in
from vtok.engine.seams import Seams
from vtok.errors import InvalidValue, PatchStateError, Unsupported
from vtok.options import AtLeast1
from vtok.text.decoding.loop import ONE_BY_ONE, Asked


@dataclass(frozen=True, kw_only=True)
class SkipDecode:
    """Fewer and fewer decoder layers: `model.generate(..., custom_generate=SkipDecode(min_layers=12, steps=128))`.

    min_layers: of the tokens from `steps` on. max_layers: of the prompt and the first tokens; None is all.
    steps: tokens of the answer over which the number falls. warmup: first layers that always run.
    schedule: "linear"; "cosine", slow at both ends; "step", all at once in the middle.

    The output is not that of the whole model, unless min_layers is all of them. Raises `InvalidValue` for numbers that
    the model's depth does not allow, and `Unsupported` for a cache that holds something already (a second turn), beam
    search and chunked prefill."""

    min_layers: AtLeast1
    steps: AtLeast1
    max_layers: AtLeast1 | None = None
    warmup: AtLeast1 = 1
    schedule: Literal["linear", "cosine", "step"] = "linear"

    def __post_init__(self) -> None:
        options.check_all(self)

    def depth(self, step: int, n_layers: int) -> int:
        """How many of a model's layers run at a step: 0 is the prompt, 1 the first token of the answer."""
        most = n_layers if self.max_layers is None else self.max_layers
        if not self.warmup < self.min_layers <= most <= n_layers:
            raise InvalidValue(
                f"warmup < min_layers <= max_layers <= the model's layers must hold, got {self.warmup}, "
                f"{self.min_layers}, {most} and {n_layers}."
            )
        done = min(step, self.steps) / self.steps
        if self.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        elif self.schedule == "step":
            done = float(done > 0.5)
        return math.floor(most - (most - self.min_layers) * done + 0.5)

    def mean_depth(self, tokens: int, n_layers: int) -> float:
        """Mean number of layers that the forwards run for an answer of so many tokens, the prompt's among them."""
        return sum(self.depth(step, n_layers) for step in range(tokens)) / tokens

    def runs(self, layer: int, depth: int, n_layers: int) -> bool:
        """Whether a layer is among the `depth` that run: the warm-up and the last ones."""
        return layer < self.warmup or layer >= n_layers - (depth - self.warmup)

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `generate`. Goes through transformers' own loop, with layers that step aside."""
        layers = CausalLM().layers(model)
        cache = cache_in(model_kwargs)
        asked = Asked.of_generate()
        refuse(cache, generation_config, asked)
        steps, mine = itertools.count(), threading.get_ident()
        depth = self.depth(0, len(layers))

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal depth
            if threading.get_ident() != mine:
                return
            if type(cache) is not DynamicCache:
                raise Unsupported(
                    "SkipDecode cannot decode a compressed prompt: unpatch the model, or use one of both."
                )
            depth = self.depth(next(steps), len(layers))

        hook = model.get_decoder().register_forward_pre_hook(begin, with_kwargs=True)
        try:
            with skipping(layers, lambda layer: not self.runs(layer, depth, len(layers))):
                return model._sample(
                    input_ids,
                    logits_processor=logits_processor,
                    stopping_criteria=stopping_criteria,
                    generation_config=generation_config,
                    streamer=asked.streamer,
                    **model_kwargs,
                )
        finally:
            hook.remove()
            if type(cache) is DynamicCache:
                cache.__class__ = SkippedCache

    @contextmanager
    def tuning(self, model: nn.Module, prompt_lengths: Tensor) -> Iterator[None]:
        """Within, a forward over prompt and answer skips as decoding will: for training, LoRA or whole.

        prompt_lengths: [B], tokens of each row before its answer, padding on the left among them. Every layer is
        computed for all positions, and passed on where it runs: exact, since the positions that skip a layer come after
        all that run it. Without a cache. Where gradients are checkpointed, the backward pass belongs within, too."""
        layers = CausalLM().layers(model)
        depths = torch.tensor([self.depth(step, len(layers)) for step in range(self.steps + 1)])

        def passed(layer: int, before: Tensor, after: Tensor) -> Tensor:
            places = torch.arange(before.shape[1], device=before.device)
            step = places - (prompt_lengths.to(before.device)[:, None] - 1)  # a prompt's last token is of step 0
            depth = depths.to(before.device)[step.clamp(0, self.steps)]  # [B, S]
            runs = (depth >= len(layers) - layer + self.warmup) | (layer < self.warmup)
            return torch.where(runs[..., None], after, before)

        with ExitStack() as undo:
            for i, layer in enumerate(layers):
                undo.enter_context(instead(layer, lambda run, given, i=i: passed(i, given, tensor(run()))))
            yield


class SkippedCache(DynamicCache):
    """What is left of decoding with fewer and fewer layers: deep layers hold less than shallow ones."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise PatchStateError(
            "This cache was filled by SkipDecode, and the layers that it skipped have no keys of the answer. Begin the "
            "next turn without it."
        )


def refuse(cache: Any, config: Any, asked: Asked) -> None:
    """Raise `Unsupported` for what would run layers that miss keys, or count steps wrongly."""
    if type(cache) is SkippedCache or (cache is not None and cache.get_seq_length()):
        raise Unsupported(
            "SkipDecode counts layers down from an answer's first token, once a conversation: layers skipped in one "
            "turn have no keys of it for the next. Give the whole conversation as a new prompt, without a cache."
        )
    if type(cache) is not DynamicCache:
        raise Unsupported(f"SkipDecode fills a DynamicCache, not a {type(cache).__name__}: leave the cache unset.")
    one_by_one = config.get_generation_mode(asked.assistant_model) in ONE_BY_ONE
    if not one_by_one or config.prefill_chunk_size is not None:
        raise Unsupported(
            "SkipDecode takes the first forward for the prompt and each other for a token: no beam search, no "
            "prefill_chunk_size, no assistant, no prompt lookup."
        )


def tensor(output: Any) -> Tensor:
    """What a decoder layer gave. Other kinds cannot be told from an input that is passed on."""
    if not isinstance(output, Tensor):
        raise Unsupported(
            f"A decoder layer gave a {type(output).__name__} instead of hidden states: it cannot be skipped."
        )
    return output


@contextmanager
def instead(layer: nn.Module, forward: Callable[[Callable[[], Any], Tensor], Any]) -> Iterator[None]:
    """Within, a layer's forward is another one: of what runs the layer, and of the hidden states that it is given."""
    run, seams = layer.forward, Seams()
    if getattr(run, "stands_in", False):
        raise PatchStateError("This model decodes or is tuned with SkipDecode already, here or in another thread.")

    def replaced(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(lambda: run(*args, **kwargs), args[0] if args else kwargs["hidden_states"])

    replaced.stands_in = True
    seams.stand_in(layer, "forward", replaced)
    try:
        yield
    finally:
        seams.remove()


@contextmanager
def skipping(layers: nn.ModuleList, skipped: Callable[[int], bool]) -> Iterator[None]:
    """Within, the layers that are skipped at the time pass on what they are given, in this thread."""
    mine = threading.get_ident()
    passes = lambda i: threading.get_ident() == mine and skipped(i)
    with ExitStack() as undo:
        for i, layer in enumerate(layers):
            undo.enter_context(instead(layer, lambda run, given, i=i: given if passes(i) else tensor(run())))
        yield
