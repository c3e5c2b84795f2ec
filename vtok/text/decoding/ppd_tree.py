"""Which trees parallel prompt decoding checks: how many candidates, and how many prompt tokens behind each.

accuracy[d][r]: that the rank-r guess at depth d + 1 is right, by prompt token d + 1. A *path* is a tuple of ranks, one
a depth; its value, the chance that all of it is right, is their product. A *state* k is how many prompt tokens the
node had that was accepted last: so many depths can be guessed now.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Path = tuple[int, ...]
Accuracy = Sequence[Sequence[float]]


def value(accuracy: Accuracy, path: Path) -> float:
    return math.prod(accuracy[depth][rank] for depth, rank in enumerate(path))


def best_paths(accuracy: Accuracy, n: int) -> tuple[Path, ...]:
    """The n paths worth most, best first, fewer where there are fewer. With each path its beginnings, and all better
    ranks, if ranks are in order of accuracy."""
    ordered = [sorted(range(len(row)), key=lambda rank, row=row: (-row[rank], rank)) for row in accuracy]
    start = lambda path: (-value(accuracy, path), len(path), path)
    heap, places, found = [], {}, []

    def push(path: Path, place: int) -> None:
        """The path's child at a place of its depth's order."""
        depth = len(path)
        if depth < len(ordered) and place < len(ordered[depth]):
            child = (*path, ordered[depth][place])
            places[child] = place
            heapq.heappush(heap, start(child))

    push((), 0)
    while heap and len(found) < n:
        path = heapq.heappop(heap)[2]
        found.append(path)
        push(path, 0)
        push(path[:-1], places[path] + 1)
    return tuple(found)


def gain(accuracy: Accuracy, paths: Sequence[Path]) -> float:
    """How many drafts are accepted of a tree with these paths, in the mean."""
    return sum(value(accuracy, path) for path in paths)


def ends(accuracy: Accuracy, paths: Sequence[Path]) -> dict[Path, float]:
    """Of the root, (), and of each path, the chance that it is the last one accepted."""
    last = {path: value(accuracy, path) for path in ((), *paths)}
    for path in paths:
        last[path[:-1]] -= value(accuracy, path)
    return last


@dataclass(frozen=True)
class Template:
    """A tree for one state. paths: of its candidates. prompts: how many prompt tokens the root, (), and each have."""

    paths: tuple[Path, ...]
    prompts: dict[Path, int]

    def __len__(self) -> int:
        return 1 + len(self.paths) + sum(self.prompts.values())


def extended(accuracy: Accuracy, paths: tuple[Path, ...], gains: Sequence[float], budget: int) -> Template | None:
    """A template of at most `budget` nodes, or None where even one prompt token behind each candidate is too much.

    gains: of the best trees by state, from 0 on. All begin with as many prompt tokens as there are states but one; the
    one that is worth least goes, until the rest fits: the chance that its node is the last one accepted, times what
    one more depth gains."""
    last = ends(accuracy, paths)
    prompts = dict.fromkeys(last, len(gains) - 1)
    over = 1 + len(paths) + sum(prompts.values()) - budget
    worth = lambda path: (last[path] * (gains[prompts[path]] - gains[prompts[path] - 1]), -len(path), path)
    heap = [worth(path) for path in prompts]
    heapq.heapify(heap)
    while over > 0:
        while heap and prompts[heap[0][2]] == 1:
            heapq.heappop(heap)
        if not heap:
            return None
        path = heapq.heappop(heap)[2]
        prompts[path] -= 1
        over -= 1
        if prompts[path] > 1:
            heapq.heappush(heap, worth(path))
    return Template(paths, prompts)


def transitions(accuracy: Accuracy, templates: Sequence[Template]) -> torch.Tensor:
    """[K, K] fp64: [i, j], that state j follows on state i."""
    moves = torch.zeros(len(templates), len(templates), dtype=torch.float64)
    for state, template in enumerate(templates):
        for path, likely in ends(accuracy, template.paths).items():
            moves[state, template.prompts[path]] += likely
    return moves


def stationary(moves: torch.Tensor) -> torch.Tensor:
    """[K] how often each state is there in the long run: pi moves = pi, of sum 1."""
    n = len(moves)
    system = torch.cat([moves.T - torch.eye(n, dtype=moves.dtype), torch.ones(1, n, dtype=moves.dtype)])
    right = torch.zeros(n + 1, 1, dtype=moves.dtype)
    right[-1] = 1
    return torch.linalg.lstsq(system, right, driver="gelsd").solution[:, 0]


def expected(accuracy: Accuracy, templates: Sequence[Template]) -> float:
    """Accepted drafts a step in the long run."""
    gains = torch.tensor([gain(accuracy, template.paths) for template in templates], dtype=torch.float64)
    return float(stationary(transitions(accuracy, templates)) @ gains)


def best_templates(accuracy: Accuracy, budget: int) -> tuple[Template, ...]:
    """The templates of all states, of at most `budget` nodes each, that accept most in the long run: the number of
    candidates is tried out. budget: 1 + prompt tokens at least."""
    states = range(len(accuracy) + 1)
    best, most = None, -1.0
    for candidates in range(budget):
        paths = [best_paths(accuracy[:state], candidates) for state in states]
        gains = [gain(accuracy, some) for some in paths]
        templates = [extended(accuracy, some, gains, budget) for some in paths]
        if None in templates:
            break
        if (now := expected(accuracy, templates)) > most:
            best, most = tuple(templates), now
    return best
