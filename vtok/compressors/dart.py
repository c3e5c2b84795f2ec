"""DART: drop the visual tokens that duplicate a few pivot tokens, whatever their importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtok.compressors.fastv import FastV
from vtok.errors import InvalidValue
from vtok.options import AtLeast0, Keep
from vtok.types import Attention

NORMS = {"l2": 2, "l1": 1}
STEPS = 8192  # keys are as large as each other where they differ by less than that part of the largest


@dataclass(frozen=True, kw_only=True)
class DART(FastV):
    """Pivots are the visual and the text tokens with the largest keys at decoder layer `layer - 1`. The visual pivots
    stay, and beside them each pivot, visual ones first, keeps the same number of the remaining visual tokens: those
    whose hidden states are least similar to its own by cosine (Section 3.2).

    keep: of the sample's visual tokens that remain after that layer; the paper's main setting is 128 of 576.
    layer: how many decoder layers see all tokens.
    visual_pivots, text_pivots: how many of each; text is that between the first visual token and the anchor.
    norm: by which keys are large, over all heads: "l2", or "l1" as in the official code. Keys are rotated by their
        positions, which changes their L1 norm: padding in front of a prompt can then change what is kept.
    anchor: where the text ends, see `InLLM`.
    Several pictures of a sample share the pivots.
    Differs from the paper: the Euclidean norm, see `norm`; hidden states are those that enter the layer, where the
    official code takes those that leave it, under the weights of the decoder's last norm; where the count is no
    multiple, the first pivots keep one more, and the visual pivots count; pivots take their turn by the size of their
    keys, where the official code goes through a Python set. Of these `norm="l1"` alone is an option.
    """

    name = probed = "dart"
    paper = (
        "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, arXiv 2502.11494"
    )
    examples = ({"keep": 0.4, "visual_pivots": 1, "text_pivots": 2},)

    keep: Keep = 128 / 576
    visual_pivots: AtLeast0 = 4
    text_pivots: AtLeast0 = 4
    norm: Literal["l2", "l1"] = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.visual_pivots + self.text_pivots == 0:
            raise InvalidValue("dart needs a pivot: visual_pivots and text_pivots cannot both be 0.")

    def score(self, attention: Attention) -> Tensor:
        key, n = attention.key, attention.query.shape[2]
        past = key.shape[2] - n
        size = torch.linalg.vector_norm(key[:, :, past:].float(), NORMS[self.norm], (1, 3))  # [B, Q]
        # models that normalise their keys may leave nothing but rounding between them: then they tie
        size = (size / size.nan_to_num(0.0).amax(1, keepdim=True).clamp(min=1e-30) * STEPS).round()
        index = torch.where(attention.instruction < 0, n, attention.instruction - past)  # behind the end where none is
        text = size.new_zeros(len(size), n + 1, dtype=torch.bool).scatter_(1, index, True)[:, :n]
        visual = attention.visual[:, past:]
        count = torch.tensor(attention.remaining, device=size.device)
        limits = self.visual_pivots, self.text_pivots
        kept = least_duplicated(attention.hidden, size, visual, text & ~visual, count, *limits)
        return torch.nn.functional.pad(kept.float(), (past, 0))


def least_duplicated(
    hidden: Tensor, size: Tensor, visual: Tensor, text: Tensor, count: Tensor, visual_pivots: int, text_pivots: int
) -> Tensor:
    """[B, L] bool: `count` [B] of each sample's visual tokens, all where it has fewer, none where it has no pivot.

    hidden: [B, L, D]. size: [B, L] >= 0, what pivots are the largest by. visual, text: [B, L] bool, no token is both.
    Of the count, the pivots that are there share what the visual ones leave equally, the first ones getting the rest.
    Ties go to the lower index, NaN counts as 0.
    """
    n_visual = visual.sum(1, keepdim=True)  # [B, 1]
    count = torch.minimum(count[:, None], n_visual)
    largest = lambda mask, k: _order(-size.nan_to_num(0.0), mask)[:, :k]
    pivots = torch.cat([largest(visual, visual_pivots), largest(text, text_pivots)], 1)  # [B, P]
    n = min(visual_pivots, size.shape[1])
    place = torch.arange(pivots.shape[1], device=size.device)  # [P]
    there = torch.where(place < n, place < count, place - n < text.sum(1, keepdim=True))  # [B, P]
    kept = torch.zeros_like(visual).scatter_(1, pivots[:, :n], there[:, :n])

    rest, sharers = count - kept.sum(1, keepdim=True), there.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    quota = rest // sharers + (there.cumsum(1) <= rest % sharers)  # [B, P]
    quota = quota.masked_fill(~there, 0)
    unit = hidden.float()
    unit = (unit / unit.norm(dim=-1, keepdim=True).clamp(min=1e-12)).nan_to_num(0.0)
    with torch.autocast(hidden.device.type, enabled=False):
        similar = unit.gather(1, pivots[..., None].expand(-1, -1, unit.shape[2])) @ unit.mT  # [B, P, L]
    column = torch.arange(size.shape[1], device=size.device)  # [L]
    for p in range(pivots.shape[1]):
        order = _order(similar[:, p], visual & ~kept)
        kept = kept.scatter(1, order, kept.gather(1, order) | (column < quota[:, p : p + 1]))
    return kept


def _order(value: Tensor, mask: Tensor) -> Tensor:
    """[B, L] indices of the tokens of `mask` by finite `value`, smallest first, and all others behind them."""
    return value.masked_fill(~mask, torch.inf).argsort(dim=1, stable=True)
