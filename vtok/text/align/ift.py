"""IFT: fine-tuning that sees its own next tokens (https://arxiv.org/abs/2405.11870).

Pairs and a reference are not needed. A first pass predicts the answer; its tokens are mixed into the embeddings of the
second; and the loss of each token counts for what comes after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.text.align.stats import to_come


def mixed_embeddings(embeddings: Tensor, predicted: Tensor, supervised: Tensor, share: float = 0.2) -> Tensor:
    """[B, T, H] (1 - share) of the embeddings and `share` of the predicted tokens' at supervised places, else as given.

    embeddings: [B, T, H] of the text, pictures in place. predicted: [B, T, H] embeddings of what was predicted for each
    place, which is by the row before it. supervised: [B, T] bool. Raises `InvalidValue` for a share outside [0, 1]."""
    if not 0 <= share <= 1:
        raise InvalidValue(f"share is from 0 to 1, not {share!r}.")
    return torch.where(supervised[..., None], (1 - share) * embeddings + share * predicted, embeddings)


def shifted_predictions(logits: Tensor, input_ids: Tensor) -> Tensor:
    """[B, T] the likeliest token of each place by the row before it; the first stays. logits: [B, T, V]."""
    return torch.cat([input_ids[:, :1], logits[:, :-1].argmax(-1)], 1)


def ift(logp: Tensor, mask: Tensor, *, gamma: float = 0.95, detach: bool = False) -> Tensor:
    """The loss of each answer, [B]: the mean over its tokens of weight times negative log-probability.

    logp: [B, T] of tokens. mask: [B, T] bool, supervised. gamma: in [0, 1], how far a token answers for later ones; 0
    switches the weights off, which is SFT. A token's weight is the discounted sum of its own and all later losses; the
    weights of an answer have the mean 1. detach: whether no gradient goes through the weights; in the official code it
    does. Raises `InvalidValue`."""
    if not 0 <= gamma <= 1:
        raise InvalidValue(f"gamma is from 0 to 1, not {gamma!r}.")
    losses = -logp.masked_fill(~mask, 0)
    lengths = mask.sum(1).clamp(min=1)
    if gamma == 0:
        return losses.sum(1) / lengths
    coming = to_come(losses, gamma).masked_fill(~mask, 0)
    weights = coming * lengths[:, None] / coming.sum(1, keepdim=True).clamp(min=1e-12)
    weights = weights.detach() if detach else weights
    return (losses * weights).sum(1) / lengths
