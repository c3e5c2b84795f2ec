"""RRPO for text, pictures and clips, on TRL's DPOTrainer (https://arxiv.org/abs/2504.12083).

trainer = RRPOTrainer(model, args=RRPOConfig("out", nframes=16), processing_class=processor, train_dataset=pairs)

A row is `prompt`, `chosen` and `rejected` as in TRL, with columns of pictures or clips (`vtok.rl.clips`). The loss is
`vtok.text.align.rrpo`. Models that vtok patched are trained on fewer visual tokens.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, use_adapter

from vtok.errors import InvalidValue, PatchStateError, Unsupported
from vtok.media import Sampling
from vtok.patching import patches_on
from vtok.rl.clips import COLUMNS
from vtok.rl.preferences import TEXT, PairCollator, Phrases, checked
from vtok.text.align.rrpo import rrpo
from vtok.text.align.stats import IGNORE, TokenStats, token_stats


@dataclass
class RRPOConfig(DPOConfig):
    """Options of `RRPOTrainer` beside those of `DPOConfig`, of which `beta` scales rewards (the paper's: 0.1 to 0.9).

    alpha: weight of the KL, >= 0. The KL is a sum over the chosen answer: long answers want less.
    phrases: what the two answers are compared by: "words" or "tokens" (their diff), "markup" (<MASK>...</MASK> around
        the phrases), or "all" (every token: with alpha=0 this is DPO).
    nframes, fps, max_frames: which frames of a clip are taken, see `vtok.media.Sampling`.
    dense_reference: whether a patched model is meant to be held against a reference that sees all visual tokens.
    max_length: tokens of prompt and answer; longer pairs are left out, as a cut answer would lose phrases on one side.
        None, the default, is the only value with pictures and clips, whose tokens must not be cut.

    Raises `InvalidValue`, also for options of DPO's that RRPO has no use for."""

    alpha: float = field(default=0.01, metadata={"help": "Weight of the KL to the reference."})
    phrases: str = field(default="words", metadata={"help": "words, tokens, markup or all."})
    nframes: int | None = field(default=None, metadata={"help": "Frames of a clip."})
    fps: float | None = field(default=None, metadata={"help": "Frames of a clip in a second."})
    max_frames: int = field(default=16, metadata={"help": "Frames of a clip at most."})
    dense_reference: bool = field(default=False, metadata={"help": "The reference is dense, and meant to be."})
    max_length: int | None = field(default=None, metadata={"help": "Longer pairs of text are left out."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.alpha >= 0 and self.beta > 0):
            raise InvalidValue(f"alpha must be >= 0 and beta > 0, got alpha={self.alpha!r} and beta={self.beta!r}.")
        if self.phrases not in get_args(Phrases):
            raise InvalidValue(f"phrases is one of {', '.join(get_args(Phrases))}, not {self.phrases!r}.")
        _ = self.sampling  # raises
        plain = {"loss_type": ["sigmoid"], "loss_weights": None, "ld_alpha": None, "f_divergence_type": "reverse_kl"}
        plain |= {"label_smoothing": 0.0, "use_weighting": False, "padding_free": False}
        plain |= {"precompute_ref_log_probs": False, "truncation_mode": "keep_start"}
        for name, only in plain.items():
            if getattr(self, name) != only:
                raise InvalidValue(f"RRPO has no {name}={getattr(self, name)!r}: leave it at {only!r}.")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.nframes, self.fps, self.max_frames)


class RRPOTrainer(DPOTrainer):
    """DPOTrainer with RRPO's loss, for text, pictures and clips. Takes the arguments of DPOTrainer.

    args: an `RRPOConfig`. ref_model: `vtok.rl.patch_reference(trainer)` patches it as the model is, before the first
    step; with LoRA and no `ref_model` the reference is the model without its adapter, patch and all. A reference that
    is to see all visual tokens is given as `ref_model`, and `args.dense_reference=True` says that it is no mistake.

    Pairs that teach nothing are left out, with a warning that says how many; of streamed data sets, none are. Raises
    `InvalidValue` and `Unsupported` for what cannot be trained, before the training where it can be known."""

    _tag_names = ["trl", "rrpo"]
    _name = "RRPO"
    _paper = {  # for model cards
        "title": "Self-alignment of Large Video Language Models with Refined Regularized Preference Optimization",
        "id": "2504.12083",
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: RRPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **given: Any,
    ) -> None:
        args = RRPOConfig("RRPO") if args is None else args
        if not isinstance(args, RRPOConfig):
            raise InvalidValue(f"args is an RRPOConfig, not {type(args).__name__}.")
        if given.get("compute_metrics") is not None:
            raise Unsupported("compute_metrics wants the logits of whole rows, and RRPO makes those of answers alone.")
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                model if isinstance(model, str) else get_config_model_id(model.config)
            )
        pairs = PairCollator(processing_class, args.phrases, args.sampling, args.max_length, args.pad_to_multiple_of)
        train_dataset = checked(train_dataset, pairs)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: checked(some, pairs) for name, some in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = checked(eval_dataset, pairs)
        given |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "processing_class": processing_class}
        super().__init__(model, ref_model, args, data_collator=data_collator or pairs, **given)
        if self.aux_loss_enabled:
            raise Unsupported("RRPO does not add a router's loss to its own: set router_aux_loss_coef=0.")
        _add_answer_logits(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        if self.ref_model is not None:
            _add_answer_logits(self.accelerator.unwrap_model(self.ref_model))

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Nothing: DPOTrainer would tokenise text, and knows of no signs. The collator does it."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that stay: DPOTrainer would drop clips, and of text keep the ids alone."""
        self._signature_columns = [*TEXT, *COLUMNS, "fps"]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """RRPO's loss. DPOTrainer's own has log-probabilities alone, and the KL is over the whole vocabulary."""
        stats, signs, outputs = self._stats(model, inputs)
        losses, metrics = rrpo(stats, signs, alpha=self.args.alpha, beta=self.beta)
        chosen, rejected = metrics["rewards/chosen"], metrics["rewards/rejected"]
        metrics |= {"rewards/margins": chosen - rejected, "rewards/accuracies": (chosen > rejected).float()}
        logps = stats.logp.detach().sum(1).view(2, -1)
        metrics |= dict(zip(("logps/chosen", "logps/rejected"), logps))
        mode = "train" if self.model.training else "eval"
        for name, values in metrics.items():
            self._metrics[mode][name].append(self.accelerator.gather(values).mean().item())
        return (losses.mean(), outputs) if return_outputs else losses.mean()

    def _stats(self, model: Any, inputs: Mapping[str, Any]) -> tuple[TokenStats, Tensor, Any]:
        """Of the columns in which answers are: `TokenStats`, signs, and the policy's outputs, with their logits."""
        given = {name: value for name, value in inputs.items() if name not in ("completion_mask", "signs")}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)
        first = int((labels != IGNORE).any(0).nonzero()[0])
        width = labels.shape[1] - first + 1  # the row before the first supervised token predicts it
        given |= {"labels": labels, "answer_logits": width, "use_cache": False}
        reference = self._reference(given).logits
        outputs = model(**given)
        return token_stats(outputs.logits, reference, labels[:, -width:]), inputs["signs"][:, -width:], outputs

    def _reference(self, given: Mapping[str, Any]) -> Any:
        """What the reference gives: `ref_model`, or with LoRA the policy without its adapter, or with the one it began
        with."""
        context, reference = nullcontext(), self.ref_model
        if reference is None:
            reference, policy = self.model, self.accelerator.unwrap_model(self.model)
            context = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        else:
            self._check_reference()
        checkpointing = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing), context:
            return reference(**given)

    def _check_reference(self) -> None:
        """Margins between models that see different tokens are no rewards, unless that is meant."""
        policy, reference = (repr([p.compressors for p in patches_on(m)]) for m in (self.model, self.ref_model))
        if policy == reference or (self.args.dense_reference and reference == "[]"):  # a method's weights may be copies
            return
        raise PatchStateError(
            f"The model is patched with {policy} and its reference with {reference}. Before the training call "
            f"vtok.rl.patch_reference(trainer), or set dense_reference=True where it is to see all visual tokens."
        )


def _add_answer_logits(model: nn.Module) -> None:
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
