"""What token-level alignment losses are made of: log-probabilities of a policy and its reference, and their KL.

Both sides are log-softmaxes in fp32 or better, so that a probability that underflows gives a large number and no NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.errors import InvalidValue

IGNORE = -100  # label of a token that is not supervised
CHUNK = 256  # supervised tokens that are worked on together: 256 x 152k logits in fp32 are 156 MB


@dataclass(frozen=True)
class TokenStats:
    """Of each token that a row of logits predicts, all [B, T-1]; 0 where nothing is supervised.

    logp, ref_logp: log-probability in nats under the policy and under the reference. Gradients flow to the policy.
    kl: forward KL in nats, of the reference from the policy, over the whole vocabulary; >= 0. Gradients, too.
    mask: bool, whether the token is supervised.
    """

    logp: Tensor
    ref_logp: Tensor
    kl: Tensor
    mask: Tensor

    @property
    def margin(self) -> Tensor:
        """[B, T-1] by how many nats the policy likes a token more than the reference does."""
        return self.logp - self.ref_logp


def token_stats(logits: Tensor, ref_logits: Tensor | None, labels: Tensor, chunk: int = CHUNK) -> TokenStats:
    """Log-probabilities and forward KL of the supervised tokens.

    logits, ref_logits: [B, T, V] of the policy and the reference; the row at t predicts the token at t+1. Without a
        reference `ref_logp` and `kl` are 0.
    labels: [B, T] token ids, -100 where nothing is supervised. chunk: tokens worked on together, >= 1.

    Work and memory go with the supervised tokens. What a chunk needs for its gradient is computed again in the
    backward, so that nothing of the logits' size is made but their gradient. Raises `InvalidValue` where shapes do not
    fit."""
    check_logits(labels, *([logits] if ref_logits is None else [logits, ref_logits]))
    targets = labels[:, 1:]
    mask = targets != IGNORE
    at = mask.nonzero()
    found = _OfTokens.apply(logits, None if ref_logits is None else ref_logits.detach(), at, targets[mask], chunk)
    logp, ref_logp, kl = (torch.zeros_like(mask, dtype=x.dtype).masked_scatter(mask, x) for x in found)
    return TokenStats(logp, ref_logp.detach(), kl, mask)


def check_logits(labels: Tensor, *logits: Tensor) -> None:
    """Raise `InvalidValue` unless logits are [B, T, V], of all models alike, and labels [B, T]."""
    shapes = [tuple(x.shape) for x in logits]
    if len({*shapes}) > 1 or shapes[0][:2] != tuple(labels.shape):
        raise InvalidValue(
            f"Logits are [B, T, V], of all models alike, and labels [B, T]: not {shapes} and {tuple(labels.shape)}."
        )


def to_come(values: Tensor, gamma: float) -> Tensor:
    """[B, T] of each token its own value and gamma times what is to come behind it. values: [B, T]."""
    ahead, found = torch.zeros_like(values[:, 0]), []
    for value in values.flip(1).unbind(1):
        ahead = value + gamma * ahead
        found.append(ahead)
    return torch.stack(found[::-1], 1)


def by_answer(stats: TokenStats, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each answer of values of tokens [2B, T-1]: [B] of the chosen answers and [B] of the rejected ones.

    Raises `InvalidValue` where there is an odd number of rows."""
    if len(values) % 2 or values.shape != stats.mask.shape:
        raise InvalidValue(f"Pairs are 2B rows, chosen answers first, of one width: not {list(values.shape)}.")
    chosen, rejected = values.masked_fill(~stats.mask, 0).sum(1).view(2, -1)
    return chosen, rejected


def of_predicted(stats: TokenStats, values: Tensor, name: str) -> Tensor:
    """Values of tokens [B, T] as those of the rows of `stats`, each of which is of the token behind it: [B, T-1].

    Raises `InvalidValue`, in which `name` is what the values are called."""
    rows, width = stats.mask.shape
    if values.shape != (rows, width + 1):
        raise InvalidValue(f"{name} are [{rows}, {width + 1}], a value for each token, not {list(values.shape)}.")
    return values[:, 1:]


def rows_at(logits: Tensor, at: Tensor) -> Tensor:
    """[N, V] the rows of logits [B, T, V] at `at` [N, 2], in fp32 or better."""
    rows = logits[at[:, 0], at[:, 1]]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _log_softmax(logits: Tensor, at: Tensor) -> Tensor:
    return rows_at(logits, at).log_softmax(-1)


class _OfTokens(torch.autograd.Function):
    """[N] log-probabilities under policy and reference, and KLs, of the tokens that the rows `at` [N, 2] predict.

    Its gradients are known in closed form: that of log p(y) is onehot(y) - p, that of the KL is p - p_ref."""

    @staticmethod
    def forward(ctx, logits: Tensor, ref_logits: Tensor | None, at: Tensor, targets: Tensor, chunk: int):
        ctx.save_for_backward(logits, ref_logits, at, targets)
        ctx.chunk = chunk
        made = logits.new_zeros(3, len(at), dtype=torch.promote_types(logits.dtype, torch.float32))
        for some, y, out in zip(at.split(chunk), targets.split(chunk), made.split(chunk, dim=1)):
            p = _log_softmax(logits, some)
            out[0] = p.gather(1, y[:, None])[:, 0]
            if ref_logits is None:
                continue
            p0 = _log_softmax(ref_logits, some)
            weight = p0.exp()
            # where the reference's probability is 0, so is its share of the KL, even if the policy's is 0 as well
            kl = (weight * (p0 - p)).masked_fill_(weight == 0, 0).sum(-1)
            out[1:] = torch.stack([p0.gather(1, y[:, None])[:, 0], kl])
        return tuple(made)

    @staticmethod
    def backward(ctx, of_logp: Tensor, of_ref: Tensor, of_kl: Tensor):
        logits, ref_logits, at, targets = ctx.saved_tensors
        made = torch.zeros_like(logits)
        for some, y, a, b in zip(*(x.split(ctx.chunk) for x in (at, targets, of_logp, of_kl))):
            p = _log_softmax(logits, some).exp_()
            if ref_logits is None:
                rows = -a[:, None] * p
            else:
                rows = (b - a)[:, None] * p - b[:, None] * _log_softmax(ref_logits, some).exp_()
            rows.scatter_add_(1, y[:, None], a[:, None])
            made[some[:, 0], some[:, 1]] = rows.to(made.dtype)
        return made, None, None, None, None
