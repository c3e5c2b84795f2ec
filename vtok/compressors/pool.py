"""Baseline: average pooling on the token grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.stages.pre_llm import PreLLM
from vtok.types import Layout, Plane, Selection, VisualTokens, keep_count, share


@dataclass(frozen=True, kw_only=True)
class Pool(PreLLM):
    """Replace each cell of a coarser grid by the mean of its tokens, plane by plane.

    keep: fraction or count of the tokens that enter the language model, per picture, which each plane (a frame, a
        thumbnail) gets its share of. Each is at most that, as near as a grid of about the plane's aspect comes; at a
        fraction every plane that has tokens keeps at least one.
    The mean, taken in fp32, stands at the place of the token in the middle of its cell.
    Differs from the paper: there is none; a baseline.
    """

    name = "pool"
    paper = "baseline"
    by_grid = True
    merges = True

    def counts(self, layout: Layout) -> list[int]:
        """How many tokens each plane may keep."""
        counts = share(keep_count(layout.n, self.keep), [plane.size for plane in layout.planes])
        if isinstance(self.keep, int):
            return counts
        # but for a mosaic of which all was padding
        return [max(1, count) if plane.size else 0 for plane, count in zip(layout.planes, counts)]

    def count(self, layout: Layout) -> int:
        grids = (coarser(*each) for each in zip(layout.planes, self.counts(layout)) if each[1])
        return sum(rows * cols for rows, cols in grids)

    def select(self, tokens: VisualTokens) -> Selection:
        b, n, d = tokens.features.shape
        layout = tokens.layout
        counts = self.counts(layout)
        index, into, means = [], [], []
        for plane, start, count in zip(layout.planes, layout.starts, counts):
            if count == 0:
                into.append(torch.full((plane.size,), -1))
                continue
            cell, middle, size = cells(plane, *coarser(plane, count))
            index.append(start + middle)
            into.append(start + middle[cell])
            own = tokens.features[:, start : start + plane.size].float()
            sums = own.new_zeros(b, len(middle), d).index_add(1, cell.to(own.device), own)
            means.append(sums / size.to(sums)[:, None])
        index = torch.cat(index).to(tokens.features.device)
        features = tokens.features.index_copy(1, index, torch.cat(means, 1).to(tokens.features.dtype))
        merged = torch.cat(into).to(tokens.features.device).expand(b, n)
        return Selection.of_indices(index.expand(b, -1), n, features=features, merged_into=merged)


def coarser(plane: Plane, count: int) -> tuple[int, int]:
    """(rows, cols) of the coarser grid: at most `count` cells, as many as possible, and about the plane's aspect.

    Best is the largest cells * sqrt(a), where a <= 1 is the one aspect over the other: a stripe with one more cell is
    no better grid. From 10 cells on four fifths of the count are used at least, 97 % on average.
    """

    def worth(grid: tuple[int, int]) -> float:
        wide, high = grid[1] * plane.rows, grid[0] * plane.cols
        return grid[0] * grid[1] * math.sqrt(min(wide, high) / max(wide, high))

    rows = range(1, min(plane.rows, count) + 1)
    return max(((r, min(plane.cols, count // r)) for r in rows), key=worth)


def cells(plane: Plane, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """Partition a plane into rows x cols cells; token y of Y is in row floor(y * rows / Y) of them.

    Returns the cell of each token, [plane.size], and of each cell, [rows * cols], its middle token and its size."""
    y, middle_y, high = _cut(plane.rows, rows)
    x, middle_x, wide = _cut(plane.cols, cols)
    middle = middle_y[:, None] * plane.cols + middle_x
    return (y[:, None] * cols + x).flatten(), middle.flatten(), (high[:, None] * wide).flatten()


def _cut(n: int, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The part of each of n places, [n]; of each part, [parts], the middle place (the lower of two) and the length."""
    edges = (torch.arange(parts + 1) * n + parts - 1) // parts  # first place of each part, and n
    return torch.arange(n) * parts // n, (edges[:-1] + edges[1:] - 1) // 2, edges.diff()
