"""Parallel prompt decoding: trained embeddings behind a token guess the tokens that will follow on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from vtok import options
from vtok.errors import InvalidValue, Unsupported
from vtok.options import AtLeast1, In, Positive
from vtok.text.decoding.coupling import typical
from vtok.text.decoding.loop import Decoder, Drafter, Running, Scores
from vtok.text.decoding.ppd_tree import Template, best_templates, expected
from vtok.text.decoding.target import Target
from vtok.text.decoding.tree import Tree, Verdict, shape

PROMPT = -1  # in place of a token: a node that is a prompt token, never accepted


class Hits:
    """How often the guesses of each depth and rank were right, found out when the text has come so far."""

    def __init__(self, depths: int, ranks: int) -> None:
        # before anything was seen: a guess is right half of the time less a depth, half of that less a rank
        self.hits = [[0.5 ** (depth + rank + 1) for rank in range(ranks)] for depth in range(depths)]
        self.seen = [1.0] * depths
        self.due = 2.0

    def note(self, depth: int, guesses: Sequence[int], token: int) -> None:
        """What was guessed at a depth, from 0 on, and what came."""
        self.seen[depth] += 1
        if token in guesses:
            self.hits[depth][guesses.index(token)] += 1

    @property
    def accuracy(self) -> list[list[float]]:
        return [[hits / seen for hits in row] for row, seen in zip(self.hits, self.seen)]

    def renewed(self) -> bool:
        """Whether twice as much is known as when this was last true."""
        renewed = min(self.seen) >= self.due
        if renewed:
            self.due = 2 * min(self.seen)
        return renewed


@dataclass
class Learned:
    """What stays from request to request. templates: of each state. expected: drafts that are accepted a step with
    them, in the long run."""

    hits: Hits
    templates: tuple[Template, ...] = ()
    expected: float = 0.0

    def plan(self, nodes: int) -> None:
        """Templates of so many nodes for what is known by now."""
        self.templates = best_templates(self.hits.accuracy, nodes)
        self.expected = expected(self.hits.accuracy, self.templates)


@dataclass(frozen=True, kw_only=True)
class PPD(Decoder):
    """Drafts come from prompt tokens that are checked along with the drafts before them: behind each candidate stand up
    to n trained embeddings, and what the model says at the i-th is a guess of the token that follows i places after the
    candidate's next one. One forward a step, no draft model, n vectors of weights. The output is that of plain
    `generate`, whatever the embeddings are worth: random ones only cost time.

    prompts: [n, D], see `ppd_train.train`; the paper has n = 3. nodes: of a tree, candidates and prompt tokens.
    top: ranks that are guessed at each depth.
    accept: "exact"; or, where the call samples, "typical": a draft y is taken if q(y) > min(epsilon, alpha exp(-H(q))),
        and the output is no longer the model's.
    adapt: whether drafts are left out while they cost more time than they save, by measured times.
    Differs from the paper: the accuracy of guesses is measured while decoding, and trees follow it; a prompt token is
    worth what it brings if its node is the last one accepted, not whenever it is accepted. One embedding a prompt token
    (the paper's ensembles were not released). Not for a model without trained prompts, nor for another than they were
    trained for.
    """

    paper: ClassVar[str] = (
        "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient LLM Inference, arXiv 2405.18628"
    )

    prompts: Tensor = field(repr=False, compare=False)
    nodes: Annotated[int, In(">= 2")] = 32
    top: AtLeast1 = 10
    accept: Literal["exact", "typical"] = "exact"
    epsilon: Positive = 0.09
    alpha: Positive = 0.3
    adapt: bool = True
    _learned: Learned = field(init=False, repr=False, compare=False)
    _running: Running = field(init=False, repr=False, compare=False, default_factory=Running)

    def __post_init__(self) -> None:
        options.check_all(self)
        if self.prompts.ndim != 2 or not 0 < len(self.prompts) < self.nodes:
            raise InvalidValue(
                f"prompts are [n, D], with n from 1 to nodes - 1 = {self.nodes - 1}: got {list(self.prompts.shape)}."
            )
        object.__setattr__(self, "_learned", Learned(Hits(len(self.prompts), self.top)))
        self._learned.plan(self.nodes)

    @contextmanager
    def drafting(self, target: Target) -> Iterator[Drafter]:
        table = target.model.get_input_embeddings().weight
        if self.prompts.shape[1] != table.shape[1]:
            raise Unsupported(f"The prompts are for a model of width {self.prompts.shape[1]}, not {table.shape[1]}.")
        yield Prompting(self, target)


class Prompting(Drafter):
    """PPD for one call of `generate`.

    guesses: of each depth the likeliest tokens, best first. behind: of each node of the last tree its prompt tokens.
    open: (index of the text, depth, guesses), of what the text has not come to yet."""

    def __init__(self, how: PPD, target: Target) -> None:
        self.how, self.target, self.learned = how, target, how._learned
        self.prompts = how.prompts.detach().to(target.model.device, target.model.dtype)
        banned = torch.tensor(sorted(target.placeholders), dtype=torch.long)
        self.banned = banned[banned < target.model.config.get_text_config(decoder=True).vocab_size]
        self.guesses: list[list[int]] = []
        self.behind: dict[int, list[int]] = {}
        self.open: list[tuple[int, int, list[int]]] = []

    def sizes(self) -> list[tuple[int, float]]:
        return [(len(self.learned.templates[len(self.guesses)]) - 1, self.learned.expected)]

    def draft(self, ids: Tensor, depth: int, nodes: int) -> Tree:
        template = self.learned.templates[len(self.guesses)]
        parents, tokens, place = [-1], [int(ids[0, -1])], {(): 0}
        for path in sorted(template.paths, key=len):
            known = path[:-1] in place and path[-1] < len(self.guesses[len(path) - 1])  # a vocabulary may be below top
            if known and len(path) <= depth:
                place[path] = len(tokens)
                parents.append(place[path[:-1]])
                tokens.append(self.guesses[len(path) - 1][path[-1]])
        self.behind, given = {}, []
        for path, node in place.items():
            self.behind[node] = []
            for i in range(min(template.prompts[path], depth - len(path))):
                parents.append(self.behind[node][-1] if i else node)
                self.behind[node].append(len(tokens))
                tokens.append(PROMPT)
                given.append(i)
        return Tree(shape(tuple(parents)), tuple(tokens), self.prompts[given] if given else None)

    def verify(self, tree: Tree, scores: Scores) -> Verdict:
        if self.how.accept == "exact" or not scores.sample:
            return scores.follow()
        _, _, route = self._longest(tree, scores, 0)
        return Verdict(route, scores.choose(route[-1]))

    def _longest(self, tree: Tree, scores: Scores, node: int) -> tuple[int, float, tuple[int, ...]]:
        """(length, log-likelihood, route) of the longest typical route from a node on; of several the likeliest."""
        below = [child for child in tree.shape.children[node] if tree.tokens[child] != PROMPT]
        best = (1, 0.0, (node,))
        if not below:
            return best
        q = scores.probabilities(node)
        tokens = [tree.tokens[child] for child in below]
        likely = q[tokens].log().tolist()
        for child, own, taken in zip(below, likely, typical(q, tokens, self.how.epsilon, self.how.alpha)):
            if taken:
                length, more, route = self._longest(tree, scores, child)
                best = max(best, (length + 1, own + more, (node, *route)))
        return best

    def learn(self, tree: Tree, logits: Tensor, verdict: Verdict) -> None:
        """Take the guesses of the prompt tokens behind the last accepted node. The target's ids are those behind it."""
        text = self.target.ids[0].tolist()
        self._compare(text)
        rows = self.behind.get(verdict.route[-1], []) if len(tree) > 1 else []
        if not rows:
            self.guesses = []
            return
        allowed = logits[rows].float().index_fill(1, self.banned.to(logits.device), -torch.inf)
        self.guesses = allowed.topk(min(self.how.top, allowed.shape[1]), -1).indices.tolist()
        self.open += [(len(text) + depth, depth, some) for depth, some in enumerate(self.guesses)]

    def _compare(self, text: list[int]) -> None:
        """Former guesses with what came."""
        for place, depth, some in self.open:
            if place < len(text):
                self.learned.hits.note(depth, some, text[place])
        self.open = [guess for guess in self.open if guess[0] >= len(text)]
        if self.learned.hits.renewed():
            self.learned.plan(self.how.nodes)
