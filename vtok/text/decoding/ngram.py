"""N-gram drafts: what came behind the same words the last time they were in the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from vtok import options
from vtok.options import AtLeast1
from vtok.text.decoding.loop import Decoder, Drafter, Running
from vtok.text.decoding.payoff import Rates
from vtok.text.decoding.target import Target
from vtok.text.decoding.tree import Tree, Verdict

PRIOR = 0.5  # chance that a draft is accepted, before any was


class Index:
    """Where each run of tokens was seen.

    longest: the longest runs that are looked up. banned: tokens that end a continuation.
    """

    def __init__(self, longest: int, banned: frozenset[int] = frozenset()) -> None:
        self.longest, self.banned = longest, banned
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # run -> the places behind it, in order

    def extend(self, tokens: Sequence[int]) -> None:
        """More text."""
        for token in tokens:
            end = len(self.tokens)  # what ends here is followed by this token
            for n in range(1, min(self.longest, end) + 1):
                self._ends.setdefault(tuple(self.tokens[end - n :]), []).append(end)
            self.tokens.append(token)

    def continuations(self, length: int, most: int = 1) -> tuple[int, list[list[int]]]:
        """What came behind the longest run that the text ends with: the run's length (0 where none was seen before),
        and up to `most` texts of up to `length` tokens, the latest first."""
        for n in range(min(self.longest, len(self.tokens)), 0, -1):
            ends = self._ends.get(tuple(self.tokens[-n:]), [])
            texts: list[list[int]] = []
            for end in reversed(ends[-4 * most :]):
                text = self._text(end, length)
                if text and text not in texts:
                    texts.append(text)
            if texts:
                return n, texts[:most]
        return 0, []

    def _text(self, start: int, length: int) -> list[int]:
        """What stands from a place on, and once the text ends there, again: a circle goes on as one."""
        text = [self.tokens[start + i % (len(self.tokens) - start)] for i in range(length)]
        stop = next((i for i, token in enumerate(text) if token in self.banned), len(text))
        return text[:stop]


@dataclass(frozen=True, kw_only=True)
class NGram(Decoder):
    """Drafts what followed the text's last tokens where they stood before, in the prompt or in the answer. It costs no
    forward, and helps where answers repeat: quotes, code, tables. The output is that of plain `generate`.

    longest: how many last tokens are looked up; fewer where these were not seen before.
    length: at most so many drafts below each other.
    texts: at most so many different continuations, as one tree.
    adapt: whether the number of drafts follows from measured times, down to none where drafts do not pay. False checks
        all that were found at each step.
    Differs from the paper: several continuations; `adapt`; sampling is supported, and is exact.
    """

    paper: ClassVar[str] = "Prompt Lookup Decoding, Saxena 2023"

    longest: AtLeast1 = 3
    length: AtLeast1 = 10
    texts: AtLeast1 = 1
    adapt: bool = True
    _running: Running = field(init=False, repr=False, compare=False, default_factory=Running)

    def __post_init__(self) -> None:
        options.check_all(self)

    @contextmanager
    def drafting(self, target: Target) -> Iterator[Drafter]:
        yield Lookup(target, self.longest, self.length, self.texts)


class Lookup(Drafter):
    """N-gram drafts for one call of `generate`."""

    kind = "ngram"

    def __init__(self, target: Target, longest: int, length: int, texts: int) -> None:
        self.length, self.most = length, texts
        self.index = Index(longest, target.placeholders)
        self.index.extend(target.ids[0].tolist())
        self.rates = {n: Rates(PRIOR) for n in range(1, longest + 1)}
        self.n, self.found = 0, []

    def sizes(self) -> list[tuple[int, float]]:
        self.n, self.found = self.index.continuations(self.length, self.most)
        if not self.found:
            return []
        deepest = max(map(len, self.found))
        return [(self._tree(depth), accepted) for depth, accepted in self.rates[self.n].sizes(deepest)]

    def _tree(self, depth: int) -> int:
        """How many drafts there are to a depth."""
        return len(Tree.of_texts(0, [text[:depth] for text in self.found])) - 1

    def draft(self, ids: Tensor, depth: int, nodes: int) -> Tree:
        depth = max((d for d in range(1, self.length + 1) if self._tree(d) <= nodes), default=1)
        return Tree.of_texts(int(ids[0, -1]), [text[:depth] for text in self.found])

    def learn(self, tree: Tree, logits: Tensor, verdict: Verdict, mine: bool = True) -> None:
        """mine: whether the tree was drafted here."""
        if mine and len(tree) > 1:
            self.rates[self.n].note(max(tree.shape.depths), len(verdict.route) - 1)
        self.index.extend(verdict.tokens(tree))
