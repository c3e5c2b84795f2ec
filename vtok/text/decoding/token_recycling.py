"""Token Recycling: drafts are what the model itself found likely behind a token, the last time it saw it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vtok import options
from vtok.errors import InvalidValue, Unsupported
from vtok.options import AtLeast0, AtLeast1
from vtok.text.decoding.loop import Decoder, Drafter, Running
from vtok.text.decoding.payoff import Payoff
from vtok.text.decoding.second import weights
from vtok.text.decoding.target import Target
from vtok.text.decoding.tree import Shape, Tree, Verdict, shape

NONE = -1  # no token, or none known; and the place above a template's root
PAIRS = 1 << 16  # of two tokens, how many are remembered
TRUST = 4  # trials at a place that weigh as much as what is believed of it before
SIZES = (1, 2, 3, 7, 15, 31, 63)  # how many drafts may be asked for, beside all; few, since each is to be timed
# The tree "2.2.2" of the paper's code: how many children its nodes have, level by level, the root first.
COUNTS = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    (2, 0, 0, 1, 0, 0, 0, 0),
)


def paths(counts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """A template from how many children its nodes have, level by level."""
    level, found = [()], []
    for children in counts:
        level = [(*path, rank) for path, n in zip(level, children, strict=True) for rank in range(n)]
        found += level
    return tuple(found)


TEMPLATE = paths(COUNTS)


class Table:
    """What is likely behind each token, and behind each pair of tokens.

    rows: [V, K] int32, on the host: the tokens that the model found likeliest behind a token, NONE where unknown.
    pairs: (the token before, a token) -> the same where both stood, of the latest `PAIRS`.
    """

    def __init__(self, vocabulary: int, k: int) -> None:
        self.rows = torch.full((vocabulary, k), NONE, dtype=torch.int32).numpy()
        self.pairs: dict[tuple[int, int], list[int]] = {}

    def behind(self, before: int, token: int) -> list[int]:
        """Up to K followers, the likeliest first: those of the pair, then those of the token."""
        k, row = self.rows.shape[1], [known for known in self.rows[token].tolist() if known != NONE]
        pair = self.pairs.get((before, token))
        return row if pair is None else [*pair, *(known for known in row if known not in pair)][:k]

    def fill(self, template: Shape, places: Iterable[int], before: int, root: int, nodes: int) -> dict[int, int]:
        """A template filled from a root on, at the first of these places, parents before children, at which a token is
        known. before: what stands before the root. Returns place -> token, the root's and up to `nodes` more."""
        tokens, followers = {NONE: before, 0: root}, {}
        for place in places:
            if len(tokens) > nodes + 1:
                break
            parent, rank = template.parents[place], template.ranks[place]
            if parent not in tokens:
                continue
            if parent not in followers:
                followers[parent] = self.behind(tokens[template.parents[parent]], tokens[parent])
            if rank < len(followers[parent]):
                tokens[place] = followers[parent][rank]
        del tokens[NONE]
        return tokens

    def write(self, before: Sequence[int], tokens: Sequence[int], logits: Tensor, banned: frozenset[int]) -> None:
        """Behind each token, its likeliest followers: logits [R, V]. before: the token before each, NONE where that is
        not known. What is there twice takes the later row; `banned` ones are no followers."""
        if inside := [token for token in banned if token < logits.shape[1]]:
            logits = logits.index_fill(1, torch.tensor(inside, device=logits.device), -torch.inf)
        best = logits.topk(self.rows.shape[1], -1).indices.int().cpu().numpy()
        last = {token: row for row, token in enumerate(tokens)}
        self.rows[list(last)] = best[list(last.values())]
        for pair, row in zip(zip(before, tokens), best.tolist()):
            self._remember(pair, row)

    def follow(self, text: Sequence[int], banned: frozenset[int]) -> None:
        """Behind each token of a text comes first what really followed, then what was known."""
        for before, token, follower in zip([NONE, *text], text, text[1:]):
            if token in banned or follower in banned:
                continue
            k, row = self.rows.shape[1], self.rows[token].tolist()
            self.rows[token] = [follower, *(known for known in row if known != follower)][:k]
            others = self.pairs.get((before, token), [])
            self._remember((before, token), [follower, *(known for known in others if known != follower)][:k])

    def _remember(self, pair: tuple[int, int], row: list[int]) -> None:
        if pair[0] == NONE:
            return
        self.pairs.pop(pair, None)  # so that it comes last
        self.pairs[pair] = row
        if len(self.pairs) > PAIRS:
            del self.pairs[next(iter(self.pairs))]


class Places:
    """How often a draft was accepted at each place of a template, once what is above it was."""

    def __init__(self, template: Shape) -> None:
        self.template = template
        self.prior = [0.5 ** (rank + 1) for rank in template.ranks]
        self.tried, self.accepted = [0.0] * len(template), [0.0] * len(template)

    def note(self, nodes: Sequence[int], tree: Tree, route: Sequence[int]) -> None:
        """nodes: of each node of the tree its place. route: the accepted nodes of the tree."""
        for node in route:
            for below in tree.shape.children[node]:
                self.tried[nodes[below]] += 1
                self.accepted[nodes[below]] += below in route

    def values(self) -> list[float]:
        """Of each place the chance that its draft is accepted: at most its parent's."""
        values = [1.0]
        for node, parent in enumerate(self.template.parents[1:], 1):
            rate = (self.accepted[node] + TRUST * self.prior[node]) / (self.tried[node] + TRUST)
            values.append(values[parent] * rate)
        return values


@dataclass
class Learned:
    """What stays from request to request."""

    places: Places
    table: Table | None = None


@dataclass(frozen=True, kw_only=True)
class TokenRecycling(Decoder):
    """Drafts a tree from a table that has, for each token, the K tokens that the model found likeliest behind it when
    it last computed them (Section 3). No weights, no training; a table of vocabulary x K numbers, which the object
    keeps, so that later requests begin with it. The output is that of plain `generate`.

    template: the tree, as paths of ranks: (1, 0) is what is likeliest behind the second likeliest follower.
    k: how many followers are remembered of a token.
    nodes: at most so many drafts a step, those of the template that were accepted most often.
    seed: of how many of the prompt's last tokens the likely followers are remembered too, which takes as many rows of
        the output head; 0 for nothing of the prompt at all. With `adapt` it waits until that is little.
    adapt: whether the number of drafts follows from measured times, down to none where drafts do not pay. False checks
        `nodes` at each step.
    Differs from the paper: `seed` and `adapt`; the table has the followers of pairs of tokens too, of the latest
    65,536, which come before those of the second token alone; what really followed in the prompt comes first, so that
    quotes are drafted; a token not seen yet has no drafts, where the paper's code drafts token 0; placeholders of
    pictures are never drafted; sampling is supported, and is exact.
    """

    paper: ClassVar[str] = "Turning Trash into Treasure: Accelerating Inference with Token Recycling, arXiv 2408.08696"

    template: tuple[tuple[int, ...], ...] = TEMPLATE
    k: AtLeast1 = 8
    nodes: AtLeast1 = 80
    seed: AtLeast0 = 64
    adapt: bool = True
    _learned: Learned = field(init=False, repr=False, compare=False)
    _running: Running = field(init=False, repr=False, compare=False, default_factory=Running)

    def __post_init__(self) -> None:
        options.check_all(self)
        template = Shape.of_paths(self.template)
        if max(template.ranks) >= self.k:
            raise InvalidValue(f"The template has a node with {max(template.ranks) + 1} children, and k is {self.k}.")
        object.__setattr__(self, "_learned", Learned(Places(template)))

    @property
    def prompt_rows(self) -> int:
        return self.seed

    @contextmanager
    def drafting(self, target: Target) -> Iterator[Drafter]:
        yield Recycler(self, target)


class Recycler(Drafter):
    """Token Recycling for one call of `generate`.

    before: the token before the root, NONE where there is none. found: place -> token of what could be drafted now, the
        root first, then those that are accepted most often.
    places: of each node of the last tree."""

    def __init__(self, decoder: TokenRecycling, target: Target) -> None:
        self.learned, self.target = decoder._learned, target
        self.k, self.limit = decoder.k, decoder.nodes
        self.before = int(target.ids[0, -2]) if target.ids.shape[1] > 1 else NONE
        self.found: dict[int, int] = {}
        self.places: list[int] = [0]
        self.unread = [self.follow, self.read] if decoder.seed else []  # what of the prompt is not learned yet

    def prepare(self, payoff: Payoff | None) -> None:
        """Learn from the prompt: what stands in it, then what was likely in it. The latter takes rows of the head, and
        waits until that is little."""
        while self.unread:
            work = self.unread[0]
            share = self.share if work == self.read else 0.0
            if payoff is None:
                work()
            elif payoff.once(share, work) is None:
                return
            del self.unread[0]

    @functools.cached_property
    def share(self) -> float:
        """About how much of the prefill's time `read` takes."""
        model, rows = self.target.model, 0 if self.target.prompt is None else len(self.target.prompt)
        head = model.get_output_embeddings().weight.numel()
        return rows * head / (max(1, self.target.prompt_length) * weights(model))

    def follow(self) -> None:
        """Learn what stands in the text so far."""
        if self.learned.table is not None:
            self.learned.table.follow(self.target.ids[0].tolist(), self.target.placeholders)

    def read(self) -> None:
        """Learn what was likely behind the prompt's tokens."""
        for tokens, logits in self.target.prompt_logits():
            self.write(tokens, logits)
        self.follow()  # what really followed comes first

    def sizes(self) -> list[tuple[int, float]]:
        if self.learned.table is None:
            return []
        places = self.learned.places
        values = places.values()
        order = sorted(range(1, len(values)), key=values.__getitem__, reverse=True)  # parents stay first
        root = int(self.target.ids[0, -1])
        self.found = self.learned.table.fill(places.template, order, self.before, root, self.limit)
        sums = list(itertools.accumulate(values[place] for place in list(self.found)[1:]))
        return [(n, sums[n - 1]) for n in sorted({*SIZES, len(sums)} - {0}) if n <= len(sums)]

    def draft(self, ids: Tensor, depth: int, nodes: int) -> Tree:
        template = self.learned.places.template
        self.places = sorted(place for place in list(self.found)[: nodes + 1] if template.depths[place] <= depth)
        new = {-1: -1} | {place: node for node, place in enumerate(self.places)}
        parents = tuple(new[template.parents[place]] for place in self.places)
        return Tree(shape(parents), tuple(self.found[place] for place in self.places))

    def learn(self, tree: Tree, logits: Tensor, verdict: Verdict) -> None:
        """All nodes teach, and the accepted ones have the last word."""
        if len(tree) > 1:
            self.learned.places.note(self.places, tree, verdict.route)
        known = [node for node, token in enumerate(tree.tokens) if token >= 0]
        order = sorted(known, key=lambda node: (node in verdict.route, node))
        before = [tree.tokens[tree.shape.parents[node]] if node else self.before for node in order]
        if order:
            rows = logits if order == list(range(len(logits))) else logits[order]  # a plain step's is not copied
            self.write([tree.tokens[node] for node in order], rows, before)
        self.before = tree.tokens[verdict.route[-1]]

    def write(self, tokens: Sequence[int], logits: Tensor, before: Sequence[int] = ()) -> None:
        """Remember what is likely behind each token: logits [R, V]. before: the tokens before these, where known.
        Raises `Unsupported` for another vocabulary."""
        learned, vocabulary = self.learned, logits.shape[1]
        if learned.table is None:
            learned.table = Table(vocabulary, min(self.k, vocabulary))
        if len(learned.table.rows) != vocabulary:
            raise Unsupported(
                f"This TokenRecycling knows the followers of {len(learned.table.rows)} tokens, and the model has "
                f"{vocabulary}: make another object for it."
            )
        learned.table.write(before or [NONE] * len(tokens), tokens, logits, self.target.placeholders)
