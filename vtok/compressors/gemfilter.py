"""GemFilter: an early layer already knows which tokens of a prompt matter; the decoder runs on those alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vtok.engine.cache import Rows
from vtok.engine.decoder import Seen
from vtok.errors import InvalidValue
from vtok.options import AtLeast0, AtLeast1, Depth, In, Keep
from vtok.stages.prompt import OfPrompt
from vtok.types import keep_counts, ranks


@dataclass(frozen=True, kw_only=True)
class GemFilter(OfPrompt):
    """Score: the dot product of the last token's query and each key at one layer, summed over heads, pooled over
    neighbours (Algorithm 1).

    depth: the layer, as a fraction of the depth or its index. It belongs to the model: the paper has 13 of 32 (Llama
        3.1 8B), 19 of 40, 19 of 32; `vtok.text.calibrate.depth` finds it.
    kernel: neighbours that are averaged, odd.
    first, last: tokens at the ends of the prompt that stay: templates need them. The last token stays in any case.
    heads: "sum" of raw dot products, as the paper, in which heads with large norms win; or "softmax" of each first.
    Differs from the paper: kept tokens keep their positions, where it counts them anew; ends stay.
    Not good for: answers that lie all over the prompt; a second question, as the choice is for the first.
    """

    name = "gemfilter"
    paper = "Discovering the Gems in Early Layers: 1000x Input Token Reduction, arXiv 2409.17422"
    adaptive = True
    examples = ({}, {"keep": 9, "depth": 1, "first": 1, "last": 2})

    keep: Keep = 0.5
    depth: Depth = 0.45
    kernel: Annotated[int, In(">= 1"), "an odd number"] = 5
    first: AtLeast0 = 4
    last: AtLeast1 = 4
    heads: Literal["sum", "softmax"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise InvalidValue(f"kernel must be odd, got {self.kernel}: a token is in the middle of its neighbours.")

    def layer(self, n_layers: int) -> int:
        layer = self.depth if isinstance(self.depth, int) else round(self.depth * (n_layers - 1))
        if layer >= n_layers:
            raise InvalidValue(f"depth must be below the number of decoder layers, {n_layers}, got {self.depth}.")
        return layer

    def choose(self, seen: Seen, rows: Rows, end: Tensor) -> Tensor:
        score = scores(seen.query, seen.key[:, :, -rows.index.shape[1] :], rows.valid, end, self.kernel, self.heads)
        place, counts = rows.valid.cumsum(1) - 1, rows.valid.sum(1)
        behind = counts[:, None] - 1 - place
        stays = (place < self.first) | (behind < self.last)
        stays = stays.scatter(1, end[:, None], True)
        score = score.masked_fill(stays, torch.inf).masked_fill(~rows.valid, -torch.inf)
        budget = keep_counts(counts, self.keep).clamp(min=self.first + self.last)
        return rows.valid & (ranks(score) < budget[:, None])


def scores(query: Tensor, key: Tensor, valid: Tensor, end: Tensor, kernel: int, heads: str) -> Tensor:
    """[B, L] fp32. query: [B, H, L, d]. key: [B, G, L, d]. valid: [B, L] bool. end: [B] column whose query counts."""
    batch, groups, _, width = key.shape
    last = query.gather(2, end[:, None, None, None].expand(-1, query.shape[1], 1, width))  # [B, H, 1, d]
    last = last.view(batch, groups, -1, width).float()
    products = last @ key.float().transpose(2, 3)  # [B, G, H / G, L]
    if heads == "softmax":
        products = products.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
    score = products.sum((1, 2)).masked_fill(~valid, 0.0)
    return F.avg_pool1d(score[:, None], kernel, stride=1, padding=kernel // 2).squeeze(1)
