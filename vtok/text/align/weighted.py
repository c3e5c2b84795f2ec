"""DPO in which each token has a weight: what RRPO, cDPO and any credit of tokens are made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vtok.text.align.stats import TokenStats, by_answer, of_predicted


def weighted_dpo(stats: TokenStats, weights: Tensor, *, beta: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, [B], and what to log of it, detached.

    stats: of 2B rows, the chosen answers and then the rejected ones. weights: [2B, T], one a token; 1 for all is DPO.
    beta: nats of margin to nats of reward. -log sigmoid(beta (sum of w_t margin_t, chosen less rejected)).

    The metrics, [B] each: `rewards/chosen`, `rewards/rejected`, `kl/chosen`, `kl/rejected`. Raises `InvalidValue`."""
    weights = of_predicted(stats, weights, "weights")
    chosen, rejected = by_answer(stats, beta * weights * stats.margin.masked_fill(weights == 0, 0))
    return -F.logsigmoid(chosen - rejected), told(stats, chosen, rejected)


def told(stats: TokenStats, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """What all preference losses log: the rewards of both answers and their KL to the reference, [B] each."""
    kl, other = by_answer(stats, stats.kl)
    metrics = {"rewards/chosen": chosen, "rewards/rejected": rejected, "kl/chosen": kl, "kl/rejected": other}
    return {name: value.detach() for name, value in metrics.items()}
