"""cDPO: critical tokens, at which a wrong answer goes wrong (https://arxiv.org/abs/2411.19943).

Two models, tuned on right and on wrong answers, say of each token of a rejected answer how much it belongs to right
ones. The loss is `weighted_dpo` with the weights of `critical_weights`, as in the paper. The official code takes the
log-sigmoid of each position's difference instead, paddings included, which is another loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtok.text.align.stats import CHUNK, IGNORE, check_logits, rows_at


def critical_weights(
    right_logits: Tensor, wrong_logits: Tensor, labels: Tensor, contrast: float = 1.0, chunk: int = CHUNK
) -> Tensor:
    """[B, T] in [0, 1], one a token: 1 - s, s = softmax((1 + contrast) z_right - contrast z_wrong) of the token.

    right_logits, wrong_logits: [B, T, V] of the models tuned on right and on wrong answers; the row at t predicts the
    token at t+1. labels: [B, T], -100 where nothing is supervised, which weighs 0. For rejected answers; chosen ones
    weigh 1. On tokens of high entropy s is small whatever the models think: weights near 1 are no finding.

    Raises `InvalidValue` where shapes do not fit."""
    check_logits(labels, right_logits, wrong_logits)
    mask = labels[:, 1:] != IGNORE
    at, targets = mask.nonzero(), labels[:, 1:][mask]
    weights = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    for some, y in zip(at.split(chunk), targets.split(chunk)):
        right, wrong = rows_at(right_logits, some), rows_at(wrong_logits, some)
        likely = ((1 + contrast) * right - contrast * wrong).softmax(-1).gather(1, y[:, None])[:, 0]
        weights[some[:, 0], some[:, 1] + 1] = 1 - likely.float()
    return weights


def critical_token(correct: Sequence[int], most: int = 3) -> int | None:
    """The token from which on a wrong answer cannot be saved: its index, or None.

    correct: for each token, how many of the rollouts that continue behind it (the paper: 64) were right. It is the
    first with none right, provided that behind it never more than `most` are; else the search goes on behind those."""
    start = 0
    for place, right in enumerate(correct):
        if right > most:
            start = place + 1
    return next((place for place in range(start, len(correct)) if correct[place] == 0), None)
