"""Forwards that give the logits of answers alone, for losses that look at tokens."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor, nn

from vtok.text.align.stats import IGNORE


def answer_width(labels: Tensor) -> int:
    """How many of the last columns hold all supervised tokens, and the row before the first, which predicts it."""
    return labels.shape[1] - int((labels != IGNORE).any(0).nonzero()[0]) + 1


def log_means(trainer: Any, metrics: dict[str, Tensor]) -> None:
    """Let one of TRL's trainers log the mean of each metric [B] over all processes."""
    mode = "train" if trainer.model.training else "eval"
    for name, values in metrics.items():
        trainer._metrics[mode][name].append(trainer.accelerator.gather(values).mean().item())


def add_answer_logits(model: nn.Module) -> None:
    """Let `model(..., labels=labels, answer_logits=n)` give the logits of the last n columns, and no loss.

    vtok is told by the labels where the prompts end; transformers' own forward would make a loss of them, for which it
    needs the logits of all columns. As TRL does, the forward of the instance is replaced, since a function that calls
    parts of the model would bypass what wraps it (DDP, FSDP, PEFT)."""
    forward = model.forward

    @functools.wraps(type(model).forward)  # whose signature `generate` and the trainer read
    def with_answers(self: nn.Module, *args: Any, answer_logits: int | None = None, **kwargs: Any) -> Any:
        if answer_logits is None:
            return forward(*args, **kwargs)
        kwargs.pop("labels")
        return forward(*args, logits_to_keep=answer_logits, **kwargs)

    model.forward = types.MethodType(with_answers, model)
