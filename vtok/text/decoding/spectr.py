"""SpecTr: several chains of drafts, drawn independently, of which the target takes as much as it can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from vtok import options
from vtok.options import AtLeast1, Positive
from vtok.text.decoding.coupling import Chance, fitted, kseq
from vtok.text.decoding.loop import Decoder, Drafter, Running, Scores
from vtok.text.decoding.payoff import Payoff, Rates
from vtok.text.decoding.second import Ahead, Reading, same_vocabulary
from vtok.text.decoding.target import Target
from vtok.text.decoding.tree import Tree, Verdict, shape

PRIOR = 0.6  # chance that one of the drafts at a depth is accepted, before any was


@dataclass(frozen=True, kw_only=True)
class SpecTr(Decoder):
    """K chains of L drafts of a small model, accepted by k-SEQ: `generate(..., do_sample=True, custom_generate=SpecTr(
    draft=small))`. The output is distributed as that of plain sampling, and is plain greedy's where that is asked for.

    draft: a causal model of the same tokenizer that takes the same inputs. chains: K. length: L; the paper's are 8 and
        8.
    temperature: of the drafts, on top of the call's own; the call's processors are applied to drafts too, but for those
        that the caller made.
    vocabulary: `len(tokenizer)`, where the models pad the table of one tokenizer to different lengths.
    adapt: whether the length of chains follows from measured times, down to no drafts where they do not pay. False
        drafts `length` tokens at each step.
    Differs from the paper: chains that begin alike are computed once. Not for greedy decoding, where chains that follow
    the draft model's likeliest tokens would do better, nor for flat drafts: `DySpec` draws without replacement, and
    more of that is accepted.
    """

    paper: ClassVar[str] = "SpecTr: Fast Speculative Decoding via Optimal Transport, arXiv 2310.15141"

    draft: nn.Module = field(repr=False)
    chains: AtLeast1 = 4
    length: AtLeast1 = 4
    temperature: Positive = 1.0
    vocabulary: AtLeast1 | None = None
    adapt: bool = True
    _rates: Rates = field(init=False, repr=False, compare=False, default_factory=lambda: Rates(PRIOR))
    _reading: Reading = field(init=False, repr=False, compare=False, default_factory=Reading)
    _running: Running = field(init=False, repr=False, compare=False, default_factory=Running)

    def __post_init__(self) -> None:
        options.check_all(self)

    @contextmanager
    def drafting(self, target: Target) -> Iterator[Drafter]:
        shared = same_vocabulary(target.model, self.draft, self.vocabulary)
        ahead = Ahead(self.draft, target, self.temperature, shared, self._reading)
        with ahead.own.checking():
            yield Chains(ahead, self.chains, self.length, Chance(), self._rates)


class Chains(Drafter):
    """SpecTr for one call of `generate`.

    nodes: of each chain the nodes below the root. p: node -> [V] of what its children were drawn."""

    def __init__(self, ahead: Ahead, chains: int, length: int, chance: Chance, rates: Rates) -> None:
        self.ahead, self.chains, self.length, self.chance, self.rates = ahead, chains, length, chance, rates
        self.nodes: list[list[int]] = []
        self.p: dict[int, Tensor] = {}
        self.making = ahead.step / chains

    def prepare(self, payoff: Payoff | None) -> None:
        self.ahead.prepare(payoff)

    def sizes(self) -> list[tuple[int, float]]:
        lengths = self.rates.sizes(self.length) if self.ahead.started else []
        return [(self.chains * length, accepted) for length, accepted in lengths]

    def draft(self, ids: Tensor, depth: int, nodes: int) -> Tree:
        parents, tokens = [-1], [int(ids[0, -1])]
        ends, self.nodes, self.p = [0] * self.chains, [[] for _ in range(self.chains)], {}
        for _ in range(min(self.length, depth, nodes // self.chains)):
            level = sorted(set(ends))
            rows = (
                self.ahead.look(Tree(shape(tuple(parents)), tuple(tokens)), level)
                if level[-1]
                else self.ahead.read(ids)
            )
            self.p |= dict(zip(level, rows))
            below: dict[tuple[int, int], int] = {}
            for chain, node in enumerate(ends):
                token = self.chance.draw(self.p[node])
                if (node, token) not in below:
                    below[node, token] = len(tokens)
                    parents.append(node)
                    tokens.append(token)
                ends[chain] = below[node, token]
                self.nodes[chain].append(ends[chain])
        return Tree(shape(tuple(parents)), tuple(tokens))

    def verify(self, tree: Tree, scores: Scores) -> Verdict:
        if not scores.sample or len(tree) == 1:
            return scores.follow()
        live, route = self.nodes, [0]
        for depth in range(len(live[0])):
            node, q = route[-1], scores.probabilities(route[-1])
            drafts = [tree.tokens[chain[depth]] for chain in live]
            choice = kseq(fitted(self.p[node], q), q, drafts, self.chance)
            if choice.draft is None:
                return Verdict(tuple(route), choice.token)
            route.append(live[choice.draft][depth])
            live = [chain for chain in live if chain[depth] == route[-1]]
        return Verdict(tuple(route), self.chance.draw(scores.probabilities(route[-1])))

    def learn(self, tree: Tree, logits: Tensor, verdict: Verdict) -> None:
        if len(tree) > 1:
            self.rates.note(max(tree.shape.depths), len(verdict.route) - 1)
