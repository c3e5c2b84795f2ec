"""From r to Q*: what a DPO model says of each token (https://arxiv.org/abs/2404.12358).

beta (log p - log p_ref) of a token is its reward, up to a shaping that telescopes: a model trained by DPO is a map of
which tokens of an answer were good. The sum over a part of an answer is that part's value, so that plain beam search of
such a model (`generate(num_beams=5)`) is a search guided by value. Rewards of chosen and rejected answers may both fall
in a training; that is no defect, but what the theory expects behind supervised fine-tuning.
"""

from __future__ import annotations

from torch import Tensor

from vtok.text.align.stats import TokenStats


def token_rewards(stats: TokenStats, *, beta: float = 0.1) -> Tensor:
    """[B, T-1] of the rows that predict tokens; 0 where nothing is supervised. beta: that of the DPO training."""
    return beta * stats.margin


def values(stats: TokenStats, *, beta: float = 0.1) -> Tensor:
    """[B, T-1] the sum of rewards up to and with each token: what a partial answer is worth.

    The last column is DPO's reward of the answer, by which the best of several is taken."""
    return token_rewards(stats, beta=beta).cumsum(1)
