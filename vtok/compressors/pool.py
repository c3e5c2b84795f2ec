"""Baseline: average pooling on the token grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.compressor import Compressor
from vtok.selection import Plane, Selection, VisualTokens, keep_count, share


@dataclass(frozen=True, kw_only=True)
class Pool(Compressor):
    """Replace each cell of a coarser grid by the mean of its tokens, plane by plane.

    keep: fraction or count of the tokens that enter the language model, per picture. The coarser grid is the one with
        the most cells within it, nearest to the plane's aspect.
    The mean stands at the place of the token in the middle of its cell.
    Differs from the paper: there is none; a baseline.
    """

    name = "pool"
    stage = "pre_llm"
    paper = "baseline"
    merges = True

    def select(self, tokens: VisualTokens) -> Selection:
        b, n, d = tokens.features.shape
        layout = tokens.layout
        counts = share(keep_count(n, self.keep), [plane.size for plane in layout.planes])
        index, into, means = [], [], []
        for plane, start, count in zip(layout.planes, layout.starts, counts):
            if count == 0:
                into.append(torch.full((plane.size,), -1))
                continue
            cell, middle = cells(plane, *coarser(plane, count))
            index.append(start + middle)
            into.append(start + middle[cell])
            cell = cell.to(tokens.features.device)
            sums = tokens.features.new_zeros(b, len(middle), d).index_add(
                1, cell, tokens.features[:, start : start + plane.size]
            )
            means.append(sums / torch.bincount(cell, minlength=len(middle)).to(sums)[:, None])
        index = torch.cat(index).to(tokens.features.device)
        features = tokens.features.index_copy(1, index, torch.cat(means, 1))
        merged = torch.cat(into).to(tokens.features.device).expand(b, n)
        return Selection.of_indices(index.expand(b, -1), n, features=features, merged_into=merged)


def coarser(plane: Plane, count: int) -> tuple[int, int]:
    """(rows, cols) of the grid with at most `count` cells that has the most, then the nearest aspect."""
    return max(
        ((rows, min(plane.cols, count // rows)) for rows in range(1, min(plane.rows, count) + 1)),
        key=lambda grid: (
            # near the aspect first: a stripe with one more cell is no better grid
            -round(abs(grid[0] * plane.cols - grid[1] * plane.rows) / max(plane.rows, plane.cols)),
            grid[0] * grid[1],
        ),
    )


def cells(plane: Plane, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Partition a plane into rows x cols cells: for each token its cell, [plane.size], and each cell's middle token."""
    y, x = torch.arange(plane.rows) * rows // plane.rows, torch.arange(plane.cols) * cols // plane.cols
    middle_y = torch.tensor([int((y == r).nonzero().median()) for r in range(rows)])
    middle_x = torch.tensor([int((x == c).nonzero().median()) for c in range(cols)])
    return (y[:, None] * cols + x).flatten(), (middle_y[:, None] * plane.cols + middle_x).flatten()
