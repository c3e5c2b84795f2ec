"""Trees of drafted tokens: what every decoder here is made of.

A decoder (`loop.Decoder`) is what `model.generate(custom_generate=...)` takes. For each call it starts a drafter, and
the loop asks that, step after step:

    tree = drafter.draft(ids, depth)        # a `Tree`; its root is the last token of ids, drafts hang below it
    logits = target.check(tree)             # one forward of the model over all nodes, [N, V]
    verdict = drafter.verify(tree, scores)  # a `Verdict`: the accepted route, and the token behind it
    drafter.learn(tree, logits, verdict)    # what the drafter wants to know of the step

So a new decoder writes `draft`, and `verify` where its drafts are more than tokens: where they were drawn from a
distribution of their own. `verify` asks `scores` for a node's distribution after processors and temperature. Then the
loop truncates at the end of the text, compacts the cache to the route and goes on.

Nodes are numbered with parents first; node 0, the root, is a token that was emitted and is not in the cache yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.errors import InvalidValue


@dataclass(frozen=True)
class Shape:
    """Who hangs below whom.

    parents: of each node its parent, which comes before it; -1 for the root, node 0.
    """

    parents: tuple[int, ...]

    @staticmethod
    def of_paths(paths: Iterable[Sequence[int]]) -> Shape:
        """A template from paths of child ranks: (1, 0) is the first child of the root's second child.

        Nodes are ordered by depth, and in a level by path. Raises `InvalidValue` where a path's parent or an earlier
        sibling is not among the paths."""
        ordered = sorted({tuple(path) for path in paths} - {()}, key=lambda path: (len(path), path))
        place = {(): 0} | {path: i for i, path in enumerate(ordered, 1)}
        for path in ordered:
            before = path[:-1] if path[-1] == 0 else (*path[:-1], path[-1] - 1)
            if before not in place:
                raise InvalidValue(f"The template has the path {path}, and not {before}, which comes before it.")
        return shape((-1, *(place[path[:-1]] for path in ordered)))

    @staticmethod
    def chain(drafts: int) -> Shape:
        """So many drafts, one below the other."""
        return shape(tuple(range(-1, drafts)))

    def __len__(self) -> int:
        return len(self.parents)

    @functools.cached_property
    def depths(self) -> tuple[int, ...]:
        """Of each node; 0 for the root."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @functools.cached_property
    def ranks(self) -> tuple[int, ...]:
        """The how-manieth child of its parent each node is, from 0; 0 for the root."""
        ranks = [0] * len(self)
        for siblings in self.children:
            for rank, node in enumerate(siblings):
                ranks[node] = rank
        return tuple(ranks)

    @functools.cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Of each node, in order."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], 1):
            children[parent].append(node)
        return tuple(map(tuple, children))

    @functools.cached_property
    def ancestors(self) -> Tensor:
        """[N, N] bool: [i, j], whether j is i or above it. What a node may see of the tree."""
        seen = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], 1):
            seen[node] |= seen[parent]
        return seen

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, len(self) - 1))

    def route(self, node: int) -> tuple[int, ...]:
        """From the root to a node, both included."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))

    @functools.cached_property
    def routes(self) -> tuple[tuple[int, ...], ...]:
        """From the root to each leaf."""
        return tuple(self.route(node) for node, below in enumerate(self.children) if not below)

    def keep(self, nodes: Sequence[bool]) -> tuple[Shape, list[int]]:
        """Without the nodes that are False here, and all that hangs below those. Returns the shape that is left, and
        of each of its nodes the number here."""
        new, kept = {-1: -1}, []
        for node, parent in enumerate(self.parents):
            if nodes[node] and parent in new:
                new[node] = len(kept)
                kept.append(node)
        return shape(tuple(new[self.parents[node]] for node in kept)), kept

    def upto(self, depth: int) -> Shape:
        """No deeper than this."""
        return self if max(self.depths) <= depth else self.keep([d <= depth for d in self.depths])[0]


@functools.lru_cache(4096)
def shape(parents: tuple[int, ...]) -> Shape:
    """The shape with these parents. Shapes come again, and know their masks."""
    return Shape(parents)


@dataclass(frozen=True)
class Tree:
    """Drafted tokens on a shape.

    tokens: of each node, the root's first. A node that stands for no token (-1) is never accepted.
    embeds: [M, D] for nodes that stand for no token: what the model is given for them, in their order; else None.
    """

    shape: Shape
    tokens: tuple[int, ...]
    embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, node: int, token: int) -> int | None:
        """The child of a node that drafts this token, or None."""
        return next((below for below in self.shape.children[node] if self.tokens[below] == token), None)

    def text(self, node: int) -> list[int]:
        """The drafted tokens from below the root down to a node."""
        return [self.tokens[at] for at in self.shape.route(node)[1:]]

    def upto(self, depth: int) -> Tree:
        """No deeper than this."""
        if max(self.shape.depths) <= depth:
            return self
        smaller, kept = self.shape.keep([d <= depth for d in self.shape.depths])
        embeds = self.embeds
        if embeds is not None:
            given = [node for node, token in enumerate(self.tokens) if token < 0]
            embeds = embeds[[i for i, node in enumerate(given) if node in set(kept)]]
        return Tree(smaller, tuple(self.tokens[node] for node in kept), embeds)

    @staticmethod
    def of_texts(root: int, texts: Iterable[Sequence[int]]) -> Tree:
        """Continuations of the root as one tree; what they begin with in common is there once."""
        parents, tokens, place = [-1], [root], {}
        for text in texts:
            node = 0
            for token in text:
                if (node, token) not in place:
                    place[node, token] = len(parents)
                    parents.append(node)
                    tokens.append(token)
                node = place[node, token]
        return Tree(shape(tuple(parents)), tuple(tokens))


@dataclass(frozen=True)
class Verdict:
    """What the model makes of a tree.

    route: the accepted nodes, from the root on. last: the token behind them, which no draft had.
    """

    route: tuple[int, ...]
    last: int

    def tokens(self, tree: Tree) -> list[int]:
        """What is emitted: at least one token."""
        return [*(tree.tokens[node] for node in self.route[1:]), self.last]

    def cut(self, tree: Tree, tokens: int) -> Verdict:
        """With only the first of the emitted tokens, so many of them."""
        if tokens >= len(self.route):
            return self
        return Verdict(self.route[:tokens], tree.tokens[self.route[tokens]])


def follow(tree: Tree, choose: Callable[[int], int], ends: Container[int] = ()) -> Verdict:
    """Go down the tree as long as a child drafts what the model chooses, and no further than a token of `ends`: behind
    it plain decoding would choose nothing.

    choose: of a node the token that plain decoding would emit behind it, by arg max or by a draw. For drafts that are
    tokens without a distribution this is exact in both: a draft y is accepted with the probability q(y) that the model
    gives it, also among siblings, and where all are rejected the token comes from what is left of q.
    """
    route = [0]
    while True:
        token = choose(route[-1])
        below = None if token in ends else tree.child(route[-1], token)
        if below is None:
            return Verdict(tuple(route), token)
        route.append(below)
