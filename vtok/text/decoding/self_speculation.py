"""Self-speculation: the model drafts on a compressed view of its own cache, and checks with all of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vtok import options
from vtok.engine.cache import cache_in, with_cache
from vtok.errors import Unsupported
from vtok.options import AtLeast1
from vtok.patching import patch
from vtok.text.decoding.loop import ROOT, Decoder, Drafter, Running, Scores
from vtok.text.decoding.ngram import Lookup
from vtok.text.decoding.payoff import Payoff, Rates
from vtok.text.decoding.target import Target
from vtok.text.decoding.tree import Shape, Tree, Verdict

PRIOR = 0.7  # chance that a draft is accepted, before any was
GUESS = 0.3  # what choosing the view is taken to cost, in prefills, until it was done once
RUN, SURE = 3, 2  # tokens that n-gram drafts look up; that must have been there before for them to come first
NOT_INPUTS = ("past_key_values", "cache", "use_cache", "return_dict", "labels", "logits_to_keep", "mm_encoder_outputs")


@dataclass
class Learned:
    """What stays from request to request. choosing: what choosing the view took, in prefills."""

    rates: Rates = field(default_factory=lambda: Rates(PRIOR))
    choosing: float = GUESS


@dataclass(frozen=True, kw_only=True)
class SelfSpeculation(Decoder):
    """The model drafts on a part of its own cache, that of the visual tokens which a compressor keeps, and checks on
    the whole: the output is that of the dense model, at nearly the speed of the compressed one. No other model, no
    weights, no training. For a model that is not patched; it is patched for a moment, to see what the compressor keeps.

    draft: a compressor, its name, or several, as `vtok.patch` takes them; None is the family's default.
    length: at most so many drafts a step.
    ngram: whether n-gram drafts are taken where the text's last two tokens were there before.
    adapt: whether the number of drafts follows from measured times, down to none where drafts do not pay; the view is
        chosen once that takes less than the 5 % of the time so far that trying may lose. False chooses at once, and
        drafts `length` tokens at each step.
    Differs from the paper: the cache of a compressed prompt is not computed, its columns are taken from the dense one,
    and those of the answer are dense too. Of methods that merge, the tokens that others were merged into are kept.
    """

    paper: ClassVar[str] = "TriForce: Lossless Acceleration of Long Sequence Generation, arXiv 2404.11912"

    draft: Any = None
    length: AtLeast1 = 6
    ngram: bool = True
    adapt: bool = True
    _learned: Learned = field(init=False, repr=False, compare=False, default_factory=Learned)
    _running: Running = field(init=False, repr=False, compare=False, default_factory=Running)

    def __post_init__(self) -> None:
        options.check_all(self)

    @contextmanager
    def drafting(self, target: Target) -> Iterator[Drafter]:
        with patch(target.model, self.draft):
            pass  # what cannot be patched is refused at once, with the reason
        if cache_in(target.given) is not None or target.given.get("inputs_embeds") is not None:
            raise Unsupported(
                "SelfSpeculation looks at the whole prompt again: give generate its input_ids and pixels, no cache and "
                "no inputs_embeds."
            )
        yield View(self, target)


class View(Drafter):
    """Self-speculation for one call of `generate`.

    small: the sequence on a part of the cache, once that was chosen. kept: its columns of the prompt. agreed: behind
        them, those that are the target's own; then come drafts.
    """

    def __init__(self, decoder: SelfSpeculation, target: Target) -> None:
        self.target, self.learned, self.length, self.method = target, decoder._learned, decoder.length, decoder.draft
        self.lookup = Lookup(target, RUN, decoder.length, 1) if decoder.ngram else None
        self.prompt = target.cache.get_seq_length()
        self.small: Target | None = None
        self.chosen = False
        self.kept = self.agreed = 0

    def prepare(self, payoff: Payoff | None) -> None:
        """Choose the view, where that is affordable."""
        if self.chosen:
            return
        if payoff is None:
            self._choose()
        elif payoff.affords(self.learned.choosing * payoff.prefill):
            began = payoff.clock()
            self._choose()
            payoff.spent(payoff.clock() - began)
            self.learned.choosing = (payoff.clock() - began) / payoff.prefill

    def _choose(self) -> None:
        """Take the columns that the compressor keeps of the prompt out of the cache, the same for all layers."""
        target, self.chosen = self.target, True
        kept = kept_columns(target.model, self.method, self._inputs())
        if len(kept) == self.prompt:  # no picture, or one of which all is kept: drafts would cost what plain steps do
            return
        self.kept, self.agreed = len(kept), target.cache.get_seq_length() - self.prompt
        columns, cache = torch.cat([kept, torch.arange(self.prompt, self.prompt + self.agreed)]), DynamicCache()
        for i, layer in enumerate(target.cache.layers):
            index = columns.to(layer.keys.device)
            cache.update(layer.keys.index_select(2, index), layer.values.index_select(2, index), i)
        self.small = Target(target.model, target.ids, target.config, with_cache(target.kwargs, cache))
        self._follow()

    def _inputs(self) -> dict[str, Any]:
        """The prompt, as the model's forward takes it."""
        known = inspect.signature(self.target.model.forward).parameters.keys() - set(NOT_INPUTS)
        inputs = {name: value for name, value in self.target.given.items() if name in known}
        return {**inputs, "input_ids": self.target.ids[:, : self.prompt]}

    def _follow(self) -> None:
        """Go on where the target is: its text, and its own columns in place of those of drafts."""
        small, target = self.small, self.target
        small.ids, small.kwargs = target.ids, with_cache({**target.kwargs, "attention_mask": None}, small.cache)
        for ours, theirs in zip(small.cache.layers, target.cache.layers):
            for name in ("keys", "values"):
                mine, dense = getattr(ours, name), getattr(theirs, name)
                new = dense[:, :, self.prompt + self.agreed :]
                setattr(ours, name, torch.cat([mine[:, :, : self.kept + self.agreed], new], 2))
        self.agreed = target.cache.get_seq_length() - self.prompt

    def sizes(self) -> list[tuple[int, float]]:
        found = self.lookup.sizes() if self.lookup is not None else []
        if found and (self.lookup.n >= SURE or self.small is None):
            self.kind = self.lookup.kind
            return found
        self.kind = "self"
        return self.learned.rates.sizes(self.length) if self.small is not None else []

    def draft(self, ids: Tensor, depth: int, nodes: int) -> Tree:
        if self.kind == "ngram":
            return self.lookup.draft(ids, depth, nodes)
        small, tokens = self.small, []
        root = last = int(ids[0, -1])
        while len(tokens) < min(depth, nodes):
            step = Tree(ROOT, (last,))
            last = Scores(step, small.check(step), small.ids, self.target.processors).choose(0)
            if last in small.placeholders:
                break
            small.accept(step, Verdict((0,), last))
            tokens.append(last)
        return Tree(Shape.chain(len(tokens)), (root, *tokens))

    def learn(self, tree: Tree, logits: Tensor, verdict: Verdict) -> None:
        if self.kind == "self" and len(tree) > 1:
            self.learned.rates.note(len(tree) - 1, len(verdict.route) - 1)
        if self.lookup is not None:
            self.lookup.learn(tree, logits, verdict, mine=self.kind == "ngram")
        if self.small is not None:
            self._follow()


class Enough(Exception):
    """What is kept is known: the language model need not run."""


def kept_columns(model: nn.Module, method: Any, inputs: dict[str, Any]) -> Tensor:
    """[K] long, ascending, on the CPU: the columns of a prompt that a patched model has in its last layer.

    inputs: of the model's forward, one prompt with its pixels. The patch is gone afterwards, whatever happens. The
    language model runs only where it is needed for the choice."""
    with patch(model, method) as handle:
        hook = None
        if not any(stage.in_layers for stage in handle._engine.stages):
            hook = handle._target().language_model.register_forward_pre_hook(_enough)
        try:
            model(**inputs, use_cache=True, **({"logits_to_keep": 1} if model._supports_logits_to_keep() else {}))
        except Enough:
            pass
        finally:
            if hook is not None:
                hook.remove()
        trace = handle.trace
        return trace.positions_at(trace.shapes.layers - 1)[0]


def _enough(module: nn.Module, args: tuple) -> None:
    raise Enough
