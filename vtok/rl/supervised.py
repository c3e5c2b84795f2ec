"""Supervised fine-tuning by token-level losses, for text and pictures, on TRL's SFTTrainer.

trainer = AnswerTrainer(model, args=SFTConfig("out"), processing_class=processor, train_dataset=rows, objective=IFT())

A loss is a mean over answers, each by itself, so that accumulated batches give what one gives. Models that vtok patched
are trained on fewer visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from trl import SFTTrainer
from trl.trainer.utils import use_adapter

from vtok.errors import InvalidValue, Unsupported
from vtok.rl.answers import add_answer_logits, answer_width, log_means
from vtok.text.align.aligndistil import aligndistil
from vtok.text.align.ift import ift, mixed_embeddings, shifted_predictions
from vtok.text.align.stats import IGNORE, token_stats
from vtok.text.align.tl_training import weighted_nll

Inputs = dict[str, Any]
Result = tuple[Tensor, dict[str, Tensor]]


class AnswerTrainer(SFTTrainer):
    """SFTTrainer with one of the objectives below. Takes the arguments of SFTTrainer, without packing.

    Raises `InvalidValue` for a batch in which nothing is supervised, and `Unsupported` for packing."""

    loss_is_scaled_for_ga = False  # Trainer averages over accumulated batches

    def __init__(self, *args: Any, objective: Callable[[Any, nn.Module, Inputs], Result], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.packing or self.padding_free:
            raise Unsupported("Packed rows are no answers: set packing=False and padding_free=False.")
        self.objective = objective
        self.vlm = self.model.get_base_model() if is_peft_model(self.model) else self.model
        add_answer_logits(self.vlm)
        for teacher in getattr(objective, "models", ()):
            teacher.to(self.accelerator.device).eval()
            add_answer_logits(teacher.get_base_model() if is_peft_model(teacher) else teacher)

    def compute_loss(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over answers."""
        if not bool((inputs["labels"] != IGNORE).any()):
            raise InvalidValue("Nothing of this batch is supervised: were the answers cut off (max_length)?")
        losses, metrics = self.objective(self, model, {**inputs, "use_cache": False})
        log_means(self, metrics)
        return (losses.mean(), {}) if return_outputs else losses.mean()


def answer_logits(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Logits [B, W, V] and labels [B, W] of the last columns, in which the answers are."""
    width = answer_width(inputs["labels"])
    return model(**inputs, answer_logits=width).logits, inputs["labels"][:, -width:]


@dataclass(frozen=True)
class IFT:
    """Intuitive fine-tuning, see `vtok.text.align.ift`. share: of the predicted tokens' embeddings; two forwards.

    share=0 and gamma=0 are SFT, but for its mean, which is over tokens."""

    share: float = 0.2
    gamma: float = 0.95
    detach: bool = False

    def __call__(self, trainer: AnswerTrainer, model: nn.Module, inputs: Inputs) -> Result:
        with self._mixed(trainer, model, inputs) if self.share else nullcontext():
            logits, labels = answer_logits(model, inputs)
        stats = token_stats(logits, None, labels)
        return ift(stats.logp, stats.mask, gamma=self.gamma, detach=self.detach), {}

    @contextmanager
    def _mixed(self, trainer: AnswerTrainer, model: nn.Module, inputs: Inputs) -> Iterator[None]:
        """A forward whose text embeddings hold what the model predicts. Pictures come in behind them."""
        labels, predicted = inputs["labels"], inputs["input_ids"].clone()
        with torch.no_grad():
            logits, tail = answer_logits(model, inputs)
        width = tail.shape[1]
        predicted[:, -width:] = shifted_predictions(logits, predicted[:, -width:])
        supervised = labels != IGNORE

        def mix(module: nn.Module, args: tuple[Any, ...], given: Tensor) -> Tensor:
            with torch.no_grad():
                other = module.forward(predicted).to(given.dtype)  # not through this hook
            return mixed_embeddings(given, other, supervised, self.share)

        hook = trainer.vlm.get_input_embeddings().register_forward_hook(mix)
        try:
            yield
        finally:
            hook.remove()


@dataclass(frozen=True)
class WeightedNLL:
    """TL-Training's weighted tokens. weigh: of (input_ids, labels), [B, T] each, gives the weights [B, T] >= 0.

    See `vtok.text.align.tl_training.key_weights`."""

    weigh: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, trainer: AnswerTrainer, model: nn.Module, inputs: Inputs) -> Result:
        logits, labels = answer_logits(model, inputs)
        stats = token_stats(logits, None, labels)
        weights = self.weigh(inputs["input_ids"], inputs["labels"])[:, -labels.shape[1] :][:, 1:]
        return weighted_nll(stats.logp, stats.mask, weights.to(stats.logp.dtype)), {}


@dataclass(frozen=True)
class AlignDistil:
    """AlignDistil on given answers, see `vtok.text.align.aligndistil`.

    dpo, other: a DPO model and one trained on swapped pairs; models, or names of adapters of a PEFT policy, of which
    "" is the base without any. options: of `aligndistil`. Patched policies want teachers that are patched alike."""

    dpo: Any
    other: Any
    options: Mapping[str, Any]
    learnt: ClassVar[str] = "default"

    @property
    def models(self) -> list[nn.Module]:
        return [model for model in (self.dpo, self.other) if isinstance(model, nn.Module)]

    def __call__(self, trainer: AnswerTrainer, model: nn.Module, inputs: Inputs) -> Result:
        with torch.no_grad():
            dpo, other = (self._logits(trainer, teacher, inputs) for teacher in (self.dpo, self.other))
        logits, labels = answer_logits(model, inputs)
        return aligndistil(logits, dpo, other, labels, **self.options)

    def _logits(self, trainer: AnswerTrainer, teacher: Any, inputs: Inputs) -> Tensor:
        if isinstance(teacher, nn.Module):
            return answer_logits(teacher, inputs)[0]
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if teacher and teacher not in getattr(policy, "peft_config", {}):
            raise InvalidValue(f"The policy has no adapter {teacher!r}: {sorted(getattr(policy, 'peft_config', {}))}.")
        with use_adapter(policy, adapter_name=teacher or None):
            return answer_logits(trainer.model, inputs)[0]
