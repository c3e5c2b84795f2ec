"""AlignDistil: DPO's reward, distilled token by token (https://arxiv.org/abs/2503.02832).

What RLHF with DPO's reward would lead to is known for each token: a mixture of logits of the DPO model and its
reference. The teacher here is that mixture, with a DPO model of swapped pairs in the reference's place, and a weight
that grows with how much both disagree about a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.text.align.stats import CHUNK, IGNORE, check_logits, rows_at

TEACHERS = ("contrast", "adaptive", "fixed")
LEAST = 1e-3  # of the weight, by which the loss is divided


def aligndistil(
    logits: Tensor,
    dpo_logits: Tensor,
    other_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.1,
    strength: float = 10.0,
    teacher: str = "contrast",
    temperature: float = 1.0,
    by_length: bool = True,
    chunk: int = CHUNK,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each answer, [B], and what to log of it, detached.

    logits, dpo_logits, other_logits: [B, T, V] of the student, of a DPO model, and of a DPO model trained with chosen
    and rejected swapped (or the reference). labels: [B, T], -100 where nothing is supervised. strength: the paper's
    beta2, 10 on given answers and 15 on the student's own. by_length: the mean over tokens, not their sum.

    With a = strength |p_dpo - p_other|_1 + 0.001 the teacher z* is z_dpo + a (z_dpo - z_other) ("contrast"), or
    a z_dpo + (1 - a) z_other ("adaptive"); the loss of a token is (beta / a) KL(student || softmax(z* / temperature)).
    "fixed" is "adaptive" with a = beta / strength, and the factor strength: the exact optimum of RLHF.

    The official code masks by labels that are not shifted, so that the first token of an answer is not learnt; here it
    is. Nothing of the logits' size is made but their gradient. `teacher_weight` is a's mean. Raises `InvalidValue`."""
    if teacher not in TEACHERS:
        raise InvalidValue(f"teacher is one of {', '.join(TEACHERS)}, not {teacher!r}.")
    check_logits(labels, logits, dpo_logits, other_logits)
    mask = labels[:, 1:] != IGNORE
    how = (beta, strength, teacher, temperature)
    found, weights = _ReverseKL.apply(logits, dpo_logits.detach(), other_logits.detach(), mask.nonzero(), how, chunk)
    spread = lambda values: torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values).sum(1)
    lengths = mask.sum(1).clamp(min=1)
    losses = spread(found)
    return losses / lengths if by_length else losses, {"teacher_weight": spread(weights.detach()) / lengths}


def _teacher(dpo: Tensor, other: Tensor, how: tuple[float, float, str, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [N, V] of the teacher, the factor of the KL [N], and the weight [N]."""
    beta, strength, teacher, temperature = how
    if teacher == "fixed":
        weight = dpo.new_full(dpo.shape[:1], beta / strength)
        factor = dpo.new_full(dpo.shape[:1], strength)
    else:
        weight = strength * (dpo.softmax(-1) - other.softmax(-1)).abs().sum(-1) + LEAST
        factor = beta / weight
    a = weight[:, None]
    mixed = dpo + a * (dpo - other) if teacher == "contrast" else a * dpo + (1 - a) * other
    return (mixed / temperature).log_softmax(-1), factor, weight


class _ReverseKL(torch.autograd.Function):
    """[N] factor times KL(student || teacher) of the rows `at` [N, 2], and the teacher's weights.

    Its gradient by the logits is p (log p - log q - KL); the teacher is made again for it."""

    @staticmethod
    def forward(ctx, logits: Tensor, dpo: Tensor, other: Tensor, at: Tensor, how: tuple, chunk: int):
        ctx.save_for_backward(logits, dpo, other, at)
        ctx.how, ctx.chunk = how, chunk
        made = logits.new_empty(2, len(at), dtype=torch.promote_types(logits.dtype, torch.float32))
        for some, out in zip(at.split(chunk), made.split(chunk, dim=1)):
            p, gap, factor, weight = _gaps(logits, dpo, other, some, how)
            out.copy_(torch.stack([factor * (p * gap).sum(-1), weight]))
        ctx.mark_non_differentiable(made[1])
        return made[0], made[1]

    @staticmethod
    def backward(ctx, of_loss: Tensor, _: Tensor):
        logits, dpo, other, at = ctx.saved_tensors
        made = torch.zeros_like(logits)
        for some, gradient in zip(at.split(ctx.chunk), of_loss.split(ctx.chunk)):
            p, gap, factor, _ = _gaps(logits, dpo, other, some, ctx.how)
            rows = (gradient * factor)[:, None] * p * (gap - (p * gap).sum(-1, keepdim=True))
            made[some[:, 0], some[:, 1]] = rows.to(made.dtype)
        return made, None, None, None, None, None


def _gaps(logits: Tensor, dpo: Tensor, other: Tensor, at: Tensor, how: tuple) -> tuple[Tensor, ...]:
    """Probabilities of the student, log p - log q, factor and weight, of some rows."""
    student, dpo, other = (rows_at(x, at) for x in (logits, dpo, other))
    log_p = student.log_softmax(-1)
    log_q, factor, weight = _teacher(dpo, other, how)
    p = log_p.exp()
    return p, (log_p - log_q).masked_fill(p == 0, 0), factor, weight
