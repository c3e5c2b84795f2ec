"""LOGO: preference optimisation for long contexts, without a reference (https://arxiv.org/abs/2410.18533).

SimPO against several rejected answers, on short inputs whose positions imitate long ones. Written from the paper; the
official code cuts the second rejected answer wrongly and does not shift its extra loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.text.align.stats import TokenStats, by_answer


def logo(
    stats: TokenStats, *, beta: float = 10.0, gap: float = 0.3, sft: float = 0.1, rejected: int = 2
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each prompt, [B], and what to log of it, detached.

    stats: of (1 + rejected) B rows: all chosen answers, all first rejected ones, all second ones, ... gap: by which the
    chosen answer is to be better. sft: weight of the chosen answer's negative log-probability.

    With a an answer's mean log-probability: -log sigmoid(beta (a_w - mean of a_l - gap)) - sft a_w. `rewards/chosen`,
    `rewards/rejected`, [B]. Raises `InvalidValue`."""
    if rejected < 1 or len(stats.logp) % (1 + rejected):
        raise InvalidValue(f"{len(stats.logp)} rows are no chosen answers with {rejected} rejected ones each.")
    mask = stats.mask.to(stats.logp.dtype)
    means = ((stats.logp * mask).sum(1) / mask.sum(1).clamp(min=1)).view(1 + rejected, -1)
    chosen, other = means[0], means[1:].mean(0)
    losses = -F.logsigmoid(beta * (chosen - other - gap)) - sft * chosen
    return losses, {"rewards/chosen": (beta * chosen).detach(), "rewards/rejected": (beta * other).detach()}


def simpo(stats: TokenStats, *, beta: float = 2.0, gap: float = 0.25, sft: float = 0.0) -> tuple[Tensor, dict]:
    """LOGO with one rejected answer is SimPO, with a gap in units of mean log-probability."""
    by_answer(stats, stats.logp)  # raises for odd rows
    return logo(stats, beta=beta, gap=gap, sft=sft, rejected=1)


def spread_positions(lengths: Sequence[int], total: int, generator: torch.Generator | None = None) -> Tensor:
    """[sum of lengths] positions of chunks in order, as if they lay scattered in a context of `total` tokens.

    Within a chunk positions follow each other; the first chunk begins at 0 and the last ends at total - 1; what is left
    over lies between them, at random. One chunk alone ends at total - 1 with its last token and is not moved otherwise.
    For models with one position a token, not for M-RoPE. Raises `InvalidValue` where the chunks do not fit."""
    free = total - sum(lengths)
    if free < 0 or not lengths or min(lengths) < 1:
        raise InvalidValue(f"Chunks of {list(lengths)} tokens do not fit into {total} positions.")
    if len(lengths) == 1:
        return torch.arange(free, total)
    cuts = torch.randint(0, free + 1, (len(lengths) - 2,), generator=generator).sort().values.tolist()
    made, at = [], 0
    for length, shift in zip(lengths, [0, *cuts, free]):
        made.append(torch.arange(at + shift, at + shift + length))
        at += length
    return torch.cat(made)
