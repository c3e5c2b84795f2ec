"""T-REG: a model's own judgement of each token keeps DPO straight (https://arxiv.org/abs/2412.02685).

The same answer is read after two prompts, one that asks for a better answer and one for a worse. Tokens that the former
makes likelier are rewarded, in chosen and rejected answers alike. Written from the paper; no official code was found.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.text.align.stats import TokenStats, by_answer, of_predicted
from vtok.text.align.weighted import told

BETTER = "Make the answer as helpful, correct and harmless as you can."
WORSE = "Make the answer as unhelpful, incorrect and harmful as you can."


def contrast_scores(better: Tensor, worse: Tensor) -> Tensor:
    """In [-0.5, 0.5], of any shape: sigmoid(log p after "better" - log p after "worse") - 1/2 of each token."""
    return torch.sigmoid(better - worse) - 0.5


def treg(
    stats: TokenStats, scores: Tensor, *, alpha: float = 0.25, beta: float = 0.1, simpo_margin: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, [B], and what to log of it, detached.

    stats: of 2B rows, the chosen answers and then the rejected ones. scores: [2B, T] of `contrast_scores`, one a token.
    alpha: weight of the regulariser; the paper's are 0.1 to 0.5. simpo_margin: None regularises DPO; a number >= 0
    SimPO, whose rewards are beta times the mean log-probability, without a reference, and which wants so large a gap.

    L + alpha w (R_w + R_l), R = -beta sum of score_t log p_t, w = sg sigmoid(r_l - r_w): pairs in order count less.
    Beside what all log: `regularizer`. Raises `InvalidValue`."""
    if simpo_margin is None:
        chosen, rejected = by_answer(stats, beta * stats.margin)
    else:
        lengths = by_answer(stats, stats.mask.to(stats.logp.dtype))
        chosen, rejected = (beta * x / n.clamp(min=1) for x, n in zip(by_answer(stats, stats.logp), lengths))
    weight = torch.sigmoid(rejected - chosen).detach()
    regularizer = -beta * sum(by_answer(stats, of_predicted(stats, scores, "scores") * stats.logp))
    losses = -F.logsigmoid(chosen - rejected - (simpo_margin or 0.0)) + alpha * weight * regularizer
    return losses, told(stats, chosen, rejected) | {"regularizer": regularizer.detach()}
