"""Self-speculation: the model drafts on a compressed view of its own cache, and checks with all of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

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
from vtok.text.decoding.view import compressed, guess

PRIOR = 0.7  # chance that a draft is accepted, before any was
RUN, SURE = 3, 2  # tokens that n-gram drafts look up; that must have been there before for them to come first
NOT_INPUTS = ("past_key_values", "cache", "use_cache", "return_dict", "labels", "logits_to_keep", "mm_encoder_outputs")


@dataclass
class Learned:
    """What stays from request to request. choosing: what choosing the view took, in prefills, once it was done."""

    rates: Rates = field(default_factory=lambda: Rates(PRIOR))
    choosing: float | None = None


@dataclass(frozen=True, kw_only=True)
class SelfSpeculation(Decoder):
    """The model drafts on a part of its own cache, that of the visual tokens which a compressor keeps, and checks on
    the whole: the output is that of the dense model, at nearly the speed of the compressed one. No other model, no
    weights, no training. For a model that is not patched; it is patched for a moment, to see what the compressor keeps.

    draft: a compressor, its name, or several, as `vtok.patch` takes them; None is the family's default. One that evicts
        from the cache serves too.
    length: at most so many drafts a step.
    ngram: whether n-gram drafts are taken where the text's last two tokens were there before.
    adapt: whether the number of drafts follows from measured times, down to none where drafts do not pay; the view is
        chosen once that takes less than the 3 % of the time so far that trying may lose. False chooses at once, and
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
        with patch(target.model, self.draft) as handle:  # what cannot be patched is refused at once, with the reason
            if self._learned.choosing is None:
                self._learned.choosing = guess(handle)
        if cache_in(target.given) is not None or target.given.get("inputs_embeds") is not None:
            raise Unsupported(
                "SelfSpeculation looks at the whole prompt again: give generate its input_ids and pixels, no cache and "
                "no inputs_embeds."
            )
        yield View(self, target)


class View(Drafter):
    """Self-speculation for one call of `generate`.

    small: the sequence on a part of the cache, once that was chosen. kept: of each layer its columns of the prompt.
        agreed: how many behind them are the target's own; then come drafts.
    """

    def __init__(self, decoder: SelfSpeculation, target: Target) -> None:
        self.target, self.learned, self.length, self.method = target, decoder._learned, decoder.length, decoder.draft
        self.lookup = Lookup(target, RUN, decoder.length, 1) if decoder.ngram else None
        self.prompt = target.cache.get_seq_length()
        self.small: Target | None = None
        self.chosen = False
        self.kept: list[int] = []
        self.agreed = 0

    def prepare(self, payoff: Payoff | None) -> None:
        """Choose the view, where that is affordable."""
        if self.chosen:
            return
        if payoff is None:
            self._choose()
        elif (share := payoff.once(self.learned.choosing, self._choose)) is not None:
            self.learned.choosing = share

    def _choose(self) -> None:
        """Take the part of the prompt's cache that the compressor leaves, and put the answer so far behind it."""
        target, self.chosen = self.target, True
        encoded = target.kwargs.get("mm_encoder_outputs") or {}
        cache = compressed(target.model, self.method, self._inputs(), encoded, target.cache)
        if cache is None:  # no picture, or one of which all is kept: drafts would cost what plain steps do
            return
        self.kept = [layer.keys.shape[2] for layer in cache.layers]
        attention = target.model.config.get_text_config(decoder=True)._attn_implementation
        if len(set(self.kept)) > 1 and attention != "sdpa":  # whose mask for one token is none at all
            raise Unsupported("Layers that hold different numbers of columns need attn_implementation='sdpa' to draft.")
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
        for ours, theirs, kept in zip(small.cache.layers, target.cache.layers, self.kept):
            for name in ("keys", "values"):
                mine, dense = getattr(ours, name), getattr(theirs, name)
                new = dense[:, :, self.prompt + self.agreed :]
                setattr(ours, name, torch.cat([mine[:, :, : kept + self.agreed], new], 2))
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
