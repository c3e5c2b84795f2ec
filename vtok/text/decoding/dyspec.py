"""DySpec: a tree of drafts that grows where the draft model believes in it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from torch import Tensor, nn

from vtok import options
from vtok.options import AtLeast1, In, Positive
from vtok.text.decoding.coupling import Chance, fitted, recursive
from vtok.text.decoding.loop import Decoder, Drafter, Running, Scores
from vtok.text.decoding.payoff import Payoff
from vtok.text.decoding.second import Accepted, Ahead, Reading, same_vocabulary
from vtok.text.decoding.target import Target
from vtok.text.decoding.tree import Tree, Verdict, shape

GREEDY = 0.6  # temperature by which drafts are valued where none is drawn
NOTHING = 1e-9  # mass of tokens that were not drawn yet, below which none is drawn


@dataclass(frozen=True, kw_only=True)
class DySpec(Decoder):
    """Drafts a tree whose nodes are worth their place: `generate(..., custom_generate=DySpec(draft=small))`. The output
    is distributed as that of plain sampling, and is plain greedy's where that is asked for.

    A draft is taken to be accepted with the probability that the draft model gives it. So a place in the tree is worth
    the product of that over the path to it, and of the rejection of the siblings before it; what is drawn there is not
    looked at. Siblings are drawn without replacement.

    draft: a causal model of the same tokenizer that takes the same inputs.
    form: "threshold" fills all places worth at least `threshold`, level by level, one forward of the draft model a
        level (Algorithm 2); "budget" the best `nodes` places (Algorithm 1), one forward each time that a best place is
        below a draft that was not looked at yet.
    threshold: about 1 / nodes; the paper's 0.001 is for trees of hundreds. nodes: at most so many drafts. depth: at
        most so many tokens ahead.
    temperature: of the drafts, on top of the call's own; the call's processors are applied to drafts too, but for those
        that the caller made. None is 1 where the call samples; where it is greedy 0.6, the paper's, for the values.
    vocabulary: `len(tokenizer)`, where the models pad the table of one tokenizer to different lengths.
    adapt: whether the number of drafts follows from measured times, down to none where drafts do not pay. False drafts
        all at each step.
    Differs from the paper: acceptance by a uniform variable, see `coupling`; where the target is greedy the likeliest
    tokens are drafted, none drawn. Nodes are not ordered for blocks of the mask.
    """

    paper: ClassVar[str] = "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure, arXiv 2410.11744"

    draft: nn.Module = field(repr=False)
    form: Literal["threshold", "budget"] = "threshold"
    threshold: Annotated[float, In("(0, 1)")] = 1 / 32
    nodes: AtLeast1 = 32
    depth: AtLeast1 = 8
    temperature: Positive | None = None
    vocabulary: AtLeast1 | None = None
    adapt: bool = True
    _accepted: Accepted = field(init=False, repr=False, compare=False)
    _reading: Reading = field(init=False, repr=False, compare=False, default_factory=Reading)
    _running: Running = field(init=False, repr=False, compare=False, default_factory=Running)

    def __post_init__(self) -> None:
        options.check_all(self)
        object.__setattr__(self, "_accepted", Accepted(self.nodes))

    @contextmanager
    def drafting(self, target: Target) -> Iterator[Drafter]:
        shared = same_vocabulary(target.model, self.draft, self.vocabulary)
        sampled = target.config.do_sample
        ahead = Ahead(self.draft, target, self.temperature or (1.0 if sampled else GREEDY), shared, self._reading)
        chance = Chance() if sampled else Likeliest()
        with ahead.own.checking():
            yield Growing(self, ahead, chance)


class Likeliest(Chance):
    """No chance: the likeliest come first."""

    def order(self, logp: Tensor) -> Iterator[tuple[int, float]]:
        p, tokens = logp.exp().topk(min(64, len(logp)))
        yield from ((token, x) for token, x in zip(tokens.tolist(), p.tolist()) if x > 0)


# ---- trees -----------------------------------------------------------------------------------------------------------
@dataclass
class Grown:
    """A tree in the making.

    values: of each node, that it is accepted, as the draft model has it. p: node -> [V] of what its children were
    drawn."""

    parents: list[int]
    tokens: list[int]
    values: list[float]
    p: dict[int, Tensor]

    @staticmethod
    def of(root: int) -> Grown:
        return Grown([-1], [root], [1.0], {})

    @property
    def tree(self) -> Tree:
        return Tree(shape(tuple(self.parents)), tuple(self.tokens))

    def add(self, parent: int, token: int, value: float) -> int:
        self.parents.append(parent)
        self.tokens.append(token)
        self.values.append(value)
        return len(self.tokens) - 1


class Slot:
    """The place of a node's next child.

    value: that a draft here is looked at and accepted or rejected: the path's value, less that of earlier siblings."""

    def __init__(self, node: int, value: float) -> None:
        self.node, self.value, self.rest = node, value, 1.0
        self.order: Iterator[tuple[int, float]] | None = None

    def fill(self, grown: Grown, chance: Chance) -> int | None:
        """Draw the child. Returns its node; None where nothing is left to draw."""
        if self.order is None:
            self.order = chance.order(grown.p[self.node].log())
        if self.rest < NOTHING or (drawn := next(self.order, None)) is None:
            return None
        token, p = drawn
        value = self.value * min(1.0, p / self.rest)
        self.value, self.rest = self.value - value, self.rest - p
        return grown.add(self.node, token, value)


Look = Callable[[Tree, Sequence[int]], Tensor]


def by_threshold(root: int, look: Look, chance: Chance, *, threshold: float, nodes: int, depth: int) -> Grown:
    """All places worth at least the threshold, level by level. look: (tree, nodes) -> [len(nodes), V] behind them."""
    grown, level = Grown.of(root), [0]
    for _ in range(depth):
        if not level:
            break
        grown.p |= dict(zip(level, look(grown.tree, level)))
        below = []
        for node in level:
            slot = Slot(node, grown.values[node])
            while slot.value >= threshold and len(grown.tokens) <= nodes:
                if (child := slot.fill(grown, chance)) is None:
                    break
                if grown.values[child] >= threshold:
                    below.append(child)
        level = below if len(grown.tokens) <= nodes else []
    return grown


def by_budget(root: int, look: Look, chance: Chance, *, nodes: int, depth: int) -> Grown:
    """The `nodes` places worth most. Nodes whose children may be next are looked at together."""
    grown, number, depths = Grown.of(root), itertools.count(), [0]
    heap = [(-1.0, next(number), Slot(0, 1.0))]
    while heap and len(grown.tokens) <= nodes:
        _, _, slot = heapq.heappop(heap)
        if slot.node not in grown.p:
            waiting = sorted({slot.node, *(other.node for _, _, other in heap)} - grown.p.keys())
            grown.p |= dict(zip(waiting, look(grown.tree, waiting)))
        if (child := slot.fill(grown, chance)) is None:
            continue
        depths.append(depths[slot.node] + 1)
        heapq.heappush(heap, (-slot.value, next(number), slot))
        if depths[child] < depth:
            heapq.heappush(heap, (-grown.values[child], next(number), Slot(child, grown.values[child])))
    return grown


class Growing(Drafter):
    """DySpec for one call of `generate`.

    p: node -> [V] of what its children were drawn. asked: how many drafts the last tree was to have."""

    def __init__(self, how: DySpec, ahead: Ahead, chance: Chance) -> None:
        self.how, self.ahead, self.chance, self.accepted = how, ahead, chance, how._accepted
        self.p: dict[int, Tensor] = {}
        self.asked = 0
        self.making = ahead.step

    def prepare(self, payoff: Payoff | None) -> None:
        self.ahead.prepare(payoff)

    def sizes(self) -> list[tuple[int, float]]:
        return self.accepted.sizes() if self.ahead.started else []

    def draft(self, ids: Tensor, depth: int, nodes: int) -> Tree:
        look = lambda tree, level: self.ahead.read(ids) if level == [0] else self.ahead.look(tree, level)
        limits, self.asked = {"nodes": nodes, "depth": min(depth, self.how.depth)}, nodes
        if self.how.form == "threshold":
            # fewer drafts than all are to be the best ones, not those of the first levels
            threshold = self.how.threshold if nodes >= self.how.nodes else max(self.how.threshold, 1 / nodes)
            grown = by_threshold(int(ids[0, -1]), look, self.chance, threshold=threshold, **limits)
        else:
            grown = by_budget(int(ids[0, -1]), look, self.chance, **limits)
        self.p = grown.p
        return grown.tree

    def verify(self, tree: Tree, scores: Scores) -> Verdict:
        if not scores.sample or len(tree) == 1:
            return scores.follow()
        route = [0]
        while children := tree.shape.children[route[-1]]:
            q = scores.probabilities(route[-1])
            drafts = [tree.tokens[child] for child in children]
            choice = recursive(q, drafts, fitted(self.p[route[-1]], q), self.chance)
            if choice.draft is None:
                return Verdict(tuple(route), choice.token)
            route.append(children[choice.draft])
        return Verdict(tuple(route), self.chance.draw(scores.probabilities(route[-1])))

    def learn(self, tree: Tree, logits: Tensor, verdict: Verdict) -> None:
        if len(tree) > 1:
            self.accepted.note(self.asked, len(verdict.route) - 1)
