"""The loop of `generate` with drafts: what `custom_generate` is given."""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Container
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from vtok.engine.cache import NAME
from vtok.errors import PatchStateError, Unsupported
from vtok.text.decoding.payoff import Payoff, Stats
from vtok.text.decoding.target import Target
from vtok.text.decoding.tree import Tree, Verdict, follow, shape

ROOT = shape((-1,))
ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)  # ways to generate a text token by token
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")  # beside the text


class Scores:
    """What the model says behind each node of a checked tree, after processors, found when asked for.

    logits: [N, V]. ids: [1, T], with the tree's root as the last token. ends: tokens that end the text.
    """

    def __init__(
        self,
        tree: Tree,
        logits: Tensor,
        ids: Tensor,
        processors: LogitsProcessorList,
        sample: bool = False,
        ends: Container[int] = (),
    ) -> None:
        self.tree, self.logits, self.ids, self.processors, self.sample = tree, logits, ids, processors, sample
        self.ends = ends
        self._at: dict[int, Tensor] = {}
        self._highest: list[int] | None = None

    def raw(self, node: int) -> Tensor:
        """[1, V] fp32 logits, a copy."""
        return self.logits[node][None].to(copy=True, dtype=torch.float32, device=self.ids.device)

    def at(self, node: int) -> Tensor:
        """[1, V] what plain `generate` would choose from behind this node: processors have seen the node's own text."""
        if node not in self._at:
            text = torch.tensor([self.tree.text(node)], device=self.ids.device, dtype=self.ids.dtype)
            self._at[node] = self.processors(torch.cat([self.ids, text], 1), self.raw(node))
        return self._at[node]

    def probabilities(self, node: int) -> Tensor:
        """[V] the distribution that plain sampling would draw from."""
        return self.at(node)[0].softmax(-1)

    def choose(self, node: int) -> int:
        """The token that plain `generate` would emit behind this node; a draw where it samples."""
        if self.sample:
            return int(torch.multinomial(self.probabilities(node)[None], 1))
        if len(self.processors):
            return int(self.at(node).argmax(-1))
        if self._highest is None:  # all at once: one wait for the device
            self._highest = self.logits.argmax(-1).tolist()
        return self._highest[node]

    def follow(self) -> Verdict:
        """The route that plain `generate` would take, by its own draws, and none behind a token that ends the text."""
        return follow(self.tree, self.choose, self.ends)


class Drafter(ABC):
    """Drafts for one call of `generate`."""

    kind: str = ""  # of what is on offer: drafts of one kind take one time each
    making: float = 0.0  # what it takes to make a draft, about, in plain steps

    def prepare(self, payoff: Payoff | None) -> None:
        """Before each step: what costs time once may be done now, if payoff affords it, or is None."""

    @abstractmethod
    def sizes(self) -> list[tuple[int, float]]:
        """What could be drafted: (drafts, how many of them are expected to be accepted). `Payoff` chooses."""

    @abstractmethod
    def draft(self, ids: Tensor, depth: int, nodes: int) -> Tree:
        """What may come behind ids [1, T]: a tree whose root is the last token of ids, with about so many drafts below
        it, no deeper than `depth` >= 1. It may be the root alone."""

    def verify(self, tree: Tree, scores: Scores) -> Verdict:
        """What of a checked tree is accepted. Here for drafts that are tokens, without a distribution of their own."""
        return scores.follow()

    def learn(self, tree: Tree, logits: Tensor, verdict: Verdict) -> None:
        """A tree was checked, with or without drafts: logits [N, V], and what is emitted of it."""


@dataclass
class Running:
    """What goes on with a decoder: who uses it, and how it went."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    stats: Stats | None = None
    payoff: Payoff = field(default_factory=Payoff)

    def __reduce__(self) -> tuple:
        """A decoder's copy begins anew: nobody uses it, and it may run elsewhere, in other times."""
        return Running, ()


class Decoder(ABC):
    """A way to draft. An object is what `model.generate(**inputs, custom_generate=...)` takes, for one sequence at a
    time, and gives what plain `generate` gives. It may be used again, and keeps what it learned; not by two threads at
    a time."""

    adapt: bool  # whether drafts are as many as pay, by measured times; else as many as can be had
    _running: Running

    @abstractmethod
    def drafting(self, target: Target) -> AbstractContextManager[Drafter]:
        """Within, drafts for a sequence whose prefill is done."""

    @property
    def prompt_rows(self) -> int:
        """Of how many of the prompt's last tokens the drafter wants the logits (`Target.prompt_logits`)."""
        return 0

    @property
    def stats(self) -> Stats:
        """How the last call went. Raises `NothingToReport` before the first."""
        return Stats.of(self._running.stats)

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `generate`, which prepared all of it. Raises `Unsupported` for what drafts cannot do."""
        asked = Asked.of_generate()
        refuse(input_ids, generation_config, asked)
        if not self._running.lock.acquire(blocking=False):
            raise PatchStateError(
                f"This {type(self).__name__} is decoding for another thread: give each thread an object of its own."
            )
        try:
            target = Target(model, input_ids, generation_config, model_kwargs, asked.kwargs)
            target.processors = logits_processor
            return Run(self, target, stopping_criteria, asked.streamer).all()
        finally:
            self._running.lock.release()


@dataclass(frozen=True)
class Asked:
    """What `generate` was asked for and does not hand on to a custom_generate."""

    streamer: Any = None
    assistant_model: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of_generate() -> Asked:
        """Of the call of `generate` that we are in: transformers drops these before it calls us, and a streamer that
        is never ended would leave its reader waiting."""
        frame, code = inspect.currentframe(), inspect.unwrap(GenerationMixin.generate).__code__
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        if frame is None:  # called by hand
            return Asked()
        known = frame.f_locals
        return Asked(known.get("streamer"), known.get("assistant_model"), dict(known.get("kwargs", {})))


def wanted(config: Any, *outputs: str) -> list[str]:
    """Which of these outputs `generate` was asked to return."""
    return [name for name in outputs if config.return_dict_in_generate and getattr(config, name)]


def refuse(ids: Tensor, config: Any, asked: Asked) -> None:
    """Raise `Unsupported` for ways to generate that drafts do not go with."""
    complaint, mode = None, config.get_generation_mode(asked.assistant_model)
    if mode is GenerationMode.ASSISTED_GENERATION:
        complaint = "an assistant drafts already: give assistant_model (or prompt lookup) or custom_generate, not both"
    elif mode not in ONE_BY_ONE:
        complaint = (
            f"greedy search and sampling alone, and this is {mode.value.replace('_', ' ')} (num_beams and others)"
        )
    elif len(ids) > 1:
        complaint = f"rows would accept different numbers of tokens: one prompt a call, here are {len(ids)}"
    elif wanted(config, "output_attentions", "output_hidden_states"):
        complaint = "attentions and hidden states are of single tokens: leave output_attentions and _hidden_states off"
    if complaint is not None:
        raise Unsupported(f"Decoding with drafts: {complaint}.")


class Run:
    """One call of `generate`."""

    def __init__(self, decoder: Decoder, target: Target, criteria: Any, streamer: Any) -> None:
        self.decoder, self.target, self.criteria, self.streamer = decoder, target, criteria, streamer
        config = target.config
        self.sample, self.max_length = bool(config.do_sample), config.max_length
        ends = config._eos_token_tensor
        self.ends = frozenset() if ends is None else frozenset(ends.flatten().tolist())
        self.scores: tuple | None = () if wanted(config, "output_scores") else None
        self.logits: tuple | None = () if wanted(config, "output_logits") else None
        self.stats = Stats(prompt=target.ids.shape[1])
        self.payoff = decoder._running.payoff

    def all(self) -> Any:
        """Prefill, then step by step until something stops it."""
        target, payoff = self.target, self.payoff
        payoff.begin()
        logits = target.prefill(self.decoder.prompt_rows)
        payoff.prefilled()
        began = payoff.clock()
        with self.decoder.drafting(target) as drafter, target.checking(), target.model._optimize_model_for_decode():
            payoff.spent(payoff.clock() - began)
            done = self._step(drafter, self._root(), logits)
            while not done:
                drafter.prepare(payoff if self.decoder.adapt else None)
                payoff.start()
                before = self.stats.tokens
                tree = self._draft(drafter)
                done = self._step(drafter, tree, target.check(tree))
                payoff.stop(len(tree) - 1, self.stats.tokens - before, drafter.kind)
        self.decoder._running.stats = self.stats
        return self._result()

    def _draft(self, drafter: Drafter) -> Tree:
        """What to check next; the last token alone where drafts do not pay."""
        ids = self.target.ids
        room = self.max_length - ids.shape[1] - 1  # drafts that may be emitted before the last token
        room = min(room, self.target.room)
        sizes = drafter.sizes() if room > 0 else []
        if self.decoder.adapt:
            nodes = self.payoff.choose(sizes, drafter.kind, drafter.making)
        else:
            nodes = max((n for n, _ in sizes), default=0)
        return drafter.draft(ids, room, nodes).upto(room) if nodes else self._root()

    def _root(self) -> Tree:
        """The last token alone; no token (-1) where the prompt was given as embeddings."""
        ids = self.target.ids
        return Tree(ROOT, (int(ids[0, -1]) if ids.shape[1] else -1,))

    def _step(self, drafter: Drafter, tree: Tree, logits: Tensor) -> bool:
        """Emit what is accepted of a checked tree. Returns whether this was all."""
        scores = Scores(tree, logits, self.target.ids, self.target.processors, self.sample, self.ends)
        try:
            verdict = drafter.verify(tree, scores)
            verdict, done = self._until_the_end(tree, verdict, scores)
        except BaseException:  # of a processor, a streamer, a criterion: the caller may go on with the cache
            self.target.drop(tree)
            raise
        self.target.accept(tree, verdict)
        drafter.learn(tree, logits, verdict)
        self.stats.note(len(tree) - 1, len(verdict.route))
        return done

    def _until_the_end(self, tree: Tree, verdict: Verdict, scores: Scores) -> tuple[Verdict, bool]:
        """What is emitted, token by token, until a criterion stops it; and whether one did."""
        tokens = verdict.tokens(tree)
        ids = torch.cat([self.target.ids, torch.tensor([tokens], device=self.target.ids.device)], 1)
        length = self.target.ids.shape[1]
        for i, node in enumerate(verdict.route, 1):
            if self.scores is not None:
                self.scores += (scores.at(node),)
            if self.logits is not None:
                self.logits += (scores.raw(node),)
            if self.streamer is not None:
                self.streamer.put(ids[0, length + i - 1 : length + i].cpu())
            if bool(self.criteria(ids[:, : length + i], self.scores).all()):
                return verdict.cut(tree, i), True
        return verdict, False

    def _result(self) -> Any:
        if self.streamer is not None:
            self.streamer.end()
        if not self.target.config.return_dict_in_generate:
            return self.target.ids
        held = {NAME: self.target.cache}
        return GenerateDecoderOnlyOutput(sequences=self.target.ids, scores=self.scores, logits=self.logits, **held)
