"""A second model on the inputs of one call of `generate`: prepared as its own `generate` would, pictures and all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from vtok.engine.cache import settle
from vtok.errors import Unsupported
from vtok.text.decoding.loop import ROOT, Asked
from vtok.text.decoding.payoff import Payoff
from vtok.text.decoding.target import Target, placeholders
from vtok.text.decoding.tree import Shape, Tree, Verdict

T = TypeVar("T")


def prepared(model: nn.Module, prompt: Tensor, config: GenerationConfig, make: Callable[..., T]) -> T:
    """What `make(model, ids, config, kwargs, processors)` makes of the model and of what its `generate` prepares for
    the inputs of the call of `generate` that we are in. config: that call's."""
    known = {*vars(GenerationConfig()), "input_ids", "inputs", "cache", "past_key_values", "streamer"}
    inputs = {name: value for name, value in Asked.of_generate().kwargs.items() if name not in known}
    if inputs.get("inputs_embeds") is not None:
        raise Unsupported("Two models have embeddings of their own: pass input_ids, not inputs_embeds.")
    device, config = model.device, copy.deepcopy(config)
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    config.max_new_tokens, config.max_length = max(1, config.max_length - prompt.shape[1]), None
    if config.min_new_tokens is not None:
        config.min_length = None  # was made of it
    # what needs a tokenizer that we are not given, or a forward for each text
    config.stop_strings, config.guidance_scale = None, None

    def instead(
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> T:
        return make(model, input_ids, generation_config, model_kwargs, logits_processor)

    return model.generate(prompt.to(device), **inputs, generation_config=config, custom_generate=instead)


def same_vocabulary(one: nn.Module, other: nn.Module, told: int | None) -> int:
    """How many token ids two models share. told: `len(tokenizer)`, where they pad the table of one tokenizer to
    different lengths. Raises `Unsupported` where they differ and nobody told."""
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (one, other)]
    if told is None and len(set(sizes)) > 1:
        raise Unsupported(
            f"The models have {sizes[0]} and {sizes[1]} tokens. Where they share a tokenizer and pad its table "
            f"differently, pass vocabulary=len(tokenizer); else take models of one tokenizer."
        )
    if told is not None and told > min(sizes):
        raise Unsupported(f"vocabulary={told} is more than the models' {sizes[0]} and {sizes[1]} tokens.")
    return min(sizes) if told is None else told


@dataclass
class Reading:
    """What a draft model takes to read a prompt, in prefills of the target; None before it has read one."""

    share: float | None = None


class Ahead:
    """A draft model that follows the text of a target, and looks ahead of it.

    Made when the target's prefill is done, and nothing more: it reads the prompt once that is affordable (`prepare`),
    and looks ahead from then on. own: its sequence. It holds the text alone: of a tree that was looked at nothing stays
    in its cache, so that the model may be of any kind that can be a target, patched too.
    temperature: beside that of the call, whose processors are applied to drafts too, but for those that the caller
    made."""

    def __init__(self, model: nn.Module, target: Target, temperature: float, vocabulary: int, reading: Reading) -> None:
        make = lambda model, ids, config, kwargs, processors: (Target(model, ids, config, kwargs), processors)
        self.own, self.processors = prepared(model, target.ids, target.config, make)
        self.temperature, self.device, self.started = temperature, target.ids.device, False
        self.prompt, self.reading = self.own.ids.shape[1], reading
        if reading.share is None:
            reading.share = weights(model) / weights(target.model)
        self.step = weights(model, head=True) / weights(target.model, head=True)  # of one, in the target's
        banned = torch.tensor(sorted(placeholders(model.config) | target.placeholders), dtype=torch.long)
        self.vocabulary, self.banned = vocabulary, banned[banned < vocabulary].to(self.device)

    def prepare(self, payoff: Payoff | None) -> None:
        """Read the prompt, where that is affordable."""
        if self.started:
            return
        if payoff is None:
            self._start()
        elif (share := payoff.once(self.reading.share, self._start)) is not None:
            self.reading.share = share

    def _start(self) -> None:
        self.started = True
        self.own.prefill()

    def read(self, ids: Tensor) -> Tensor:
        """Follow the target up to ids [1, T], longer than what was read before: [1, V] probabilities behind them."""
        own, ids = self.own, ids.to(self.own.ids.device)
        if own.ids.shape[1] == self.prompt:
            own.accept(Tree(ROOT, (int(own.ids[0, -1]),)), Verdict((0,), int(ids[0, own.ids.shape[1]])))
        tokens = ids[0, own.ids.shape[1] - 1 :].tolist()  # the first is not in the cache yet
        chain = Tree(Shape.chain(len(tokens) - 1), tuple(tokens))
        logits = own.check(chain)[-1:]
        if len(tokens) > 1:
            own.accept(chain, Verdict(tuple(range(len(tokens) - 1)), tokens[-1]))
        else:
            settle(own.cache, 1, [])
        return self.probabilities(logits, [[]])

    def look(self, tree: Tree, nodes: Sequence[int]) -> Tensor:
        """[len(nodes), V] probabilities behind nodes of a tree whose root is the last token that was read."""
        above = tree.shape.ancestors[list(nodes)].any(0).tolist()
        shape, kept = tree.shape.keep(above)
        smaller = Tree(shape, tuple(tree.tokens[node] for node in kept))
        logits = self.own.check(smaller)
        settle(self.own.cache, len(smaller), [])
        place = {node: i for i, node in enumerate(kept)}
        return self.probabilities(logits[[place[node] for node in nodes]], [tree.text(node) for node in nodes])

    def probabilities(self, logits: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        """[N, V] over the tokens that both models have and that may be drafted, in fp32, where the target is. texts:
        what stands between the last token read and each row."""
        logits = logits.to(torch.float32, copy=True)
        if len(self.processors):
            ids = self.own.ids
            whole = [torch.cat([ids, ids.new_tensor([text], dtype=ids.dtype)], 1) for text in texts]
            logits = torch.cat([self.processors(text, row[None]) for text, row in zip(whole, logits)])
        logits = logits[:, : self.vocabulary].to(self.device) / self.temperature
        logits = logits.index_fill(1, self.banned, -torch.inf)
        none = logits.isneginf().all(1, keepdim=True)  # what processors left may not be drafted: then any draft will do
        return torch.where(none, 0.0, logits).index_fill(1, self.banned, -torch.inf).softmax(-1)


def weights(model: nn.Module, head: bool = False) -> int:
    """How many of a model's weights work on each token of a prompt; with the `head`, of an answer."""
    layers = sum(p.numel() for p in model.base_model.parameters()) - model.get_input_embeddings().weight.numel()
    return layers + (model.get_output_embeddings().weight.numel() if head else 0)


class Accepted:
    """How many of n drafts a step are accepted, for some n: means in which old steps count less and less.

    most: the greatest n. Before anything was checked, twice the drafts are taken to bring half a token more: enough to
    be tried, the fewest first."""

    def __init__(self, most: int, forget: float = 0.97) -> None:
        steps = [n for n in (4, 8, 16, 32, 64) if n < most]
        self.sums = {n: (math.log2(1 + n) / 2, 1.0) for n in (*steps, most)}
        self.forget = forget

    def note(self, size: int, accepted: int) -> None:
        total, steps = self.sums[size]
        self.sums[size] = self.forget * total + accepted, self.forget * steps + 1

    def sizes(self) -> list[tuple[int, float]]:
        """(drafts, how many of them are expected to be accepted)."""
        return [(n, total / steps) for n, (total, steps) in self.sums.items()]
