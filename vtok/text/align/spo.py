"""SPO: advantages of segments from rollouts, without a critic (https://arxiv.org/abs/2505.23564).

Chain: an answer is cut where the policy was unsure; the value at a cut is the mean outcome of rollouts that continue
there. Tree: rollouts branch after every so many tokens; a node's value is the mean of its children's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtok.errors import InvalidValue

SURE = 0.9  # probability from which on a token was no choice


def cut_points(probabilities: Tensor, interval: int = 5, sure: float = SURE) -> list[int]:
    """Tokens behind which an answer is cut: before every `interval`-th unsure token; -1 is before the first.

    probabilities: [T] of the answer's tokens under the policy that wrote it."""
    if interval < 1:
        raise InvalidValue(f"interval is at least 1, not {interval!r}.")
    return [int(place) - 1 for place in (probabilities < sure).nonzero()[::interval, 0]]


def chain_advantages(probabilities: Tensor, values: Mapping[int, float], outcome: float, sure: float = SURE) -> Tensor:
    """[T] advantages: of each segment, how much the value rose over it; 0 for tokens that were no choice.

    probabilities: [T]. values: of each cut, -1 being the empty answer. outcome: of the answer, the value at its end.
    Without a value at -1 the first segment has none to be held against, and gets 0. Raises `InvalidValue` for cuts
    outside the answer."""
    n = len(probabilities)
    if bad := [place for place in values if not -1 <= place < n]:
        raise InvalidValue(f"Cuts of {n} tokens are from -1 to {n - 1}, not {bad[0]}.")
    known = {**values, n - 1: outcome}
    made, before, start = torch.zeros(n), None, 0
    for place in sorted(known):
        if before is not None:
            made[start : place + 1] = known[place] - before
        before, start = known[place], place + 1
    return made.masked_fill(probabilities.cpu() > sure, 0).to(probabilities.device)


@dataclass(frozen=True)
class Node:
    """A segment of a tree of rollouts. ids: its tokens, as they were sampled. score: of a leaf; 0 where unfinished."""

    ids: tuple[int, ...] = ()
    children: tuple[Node, ...] = ()
    score: float = 0.0
    value: float = field(init=False)

    def __post_init__(self) -> None:
        values = [child.value for child in self.children]
        object.__setattr__(self, "value", sum(values) / len(values) if values else self.score)

    @property
    def std(self) -> float:
        """Standard deviation of the children's values."""
        return (sum((child.value - self.value) ** 2 for child in self.children) / len(self.children)) ** 0.5


@dataclass(frozen=True)
class Edge:
    """A sample: the tokens behind the prompt, the segment that continues them, and the advantage of all its tokens."""

    before: tuple[int, ...]
    segment: tuple[int, ...]
    advantage: float


def tree_edges(root: Node, *, scale: bool = False) -> list[Edge]:
    """The segments of a tree that are better or worse than their siblings; those with advantage 0 are left out.

    The advantage is the child's value less the parent's; with scale=True also by the standard deviation of the parent's
    children, as GRPO does. Tokens stay ids: text that is tokenised anew may be cut elsewhere."""
    edges: list[Edge] = []

    def visit(node: Node, before: tuple[int, ...]) -> None:
        for child in node.children:
            gain = child.value - node.value
            if gain:
                edges.append(Edge(before, child.ids, gain / (node.std + 1e-8) if scale else gain))
            visit(child, before + child.ids)

    visit(root, root.ids)
    return edges


def in_rows(edges: Sequence[Edge], prompt: Sequence[int], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Edges as a batch: ids [N, T], a mask [N, T] of the segments and advantages [N, T], padded on the right."""
    rows = [[*prompt, *edge.before, *edge.segment] for edge in edges]
    width = max(map(len, rows), default=0)
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.bool)
    gains = torch.zeros(len(rows), width)
    for i, (row, edge) in enumerate(zip(rows, edges)):
        ids[i, : len(row)] = torch.tensor(row)
        part = slice(len(row) - len(edge.segment), len(row))
        mask[i, part], gains[i, part] = True, edge.advantage
    return ids, mask, gains
