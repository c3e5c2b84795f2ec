"""TDPO: DPO with a leash for each token (https://arxiv.org/abs/2404.11999)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.text.align.stats import TokenStats, by_answer
from vtok.text.align.weighted import told


def tdpo(
    stats: TokenStats, *, beta: float = 0.1, alpha: float = 0.5, version: int = 2
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, [B], and what to log of it, detached.

    stats: of 2B rows, the chosen answers and then the rejected ones. With m an answer's margin and D the sum of its
    tokens' forward KL: -log sigmoid(beta u), where

        version 1: u = m_w - m_l - (D_l - D_w)
        version 2: u = m_w - m_l - alpha (D_l - sg(D_w)), sg: no gradient

    Version 2 does not gain by leaving the reference on chosen answers; the paper takes 1 for small learning rates and 2
    for large ones. The rewards that are logged are beta (m + D). Raises `InvalidValue`."""
    if version not in (1, 2):
        raise InvalidValue(f"version is 1 or 2, not {version!r}.")
    (m_w, m_l), (d_w, d_l) = by_answer(stats, stats.margin), by_answer(stats, stats.kl)
    leash = d_l - d_w if version == 1 else alpha * (d_l - d_w.detach())
    return -F.logsigmoid(beta * (m_w - m_l - leash)), told(stats, beta * (m_w + d_w), beta * (m_l + d_l))
