"""Preference training by token-level losses, for text, pictures and clips, on TRL's DPOTrainer.

trainer = PreferenceTrainer(model, args=PreferenceConfig("out"), processing_class=processor, train_dataset=pairs,
                            objective=TDPO(alpha=0.5))

A row is `prompt`, `chosen` and `rejected` as in TRL, with columns of pictures or clips (`vtok.rl.clips`). Objectives
are in `vtok.rl.objectives`. Models that vtok patched are trained on fewer visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, use_adapter

from vtok.errors import InvalidValue, PatchStateError, Unsupported
from vtok.media import Sampling
from vtok.patching import patches_on
from vtok.rl.answers import add_answer_logits, answer_width, log_means
from vtok.rl.clips import COLUMNS
from vtok.rl.objectives import DPO, Objective
from vtok.rl.preferences import TEXT, WEIGHTS, PairCollator, Phrases, checked, for_models
from vtok.text.align.stats import TokenStats, token_stats


@dataclass
class PreferenceConfig(DPOConfig):
    """Options of `PreferenceTrainer` beside those of `DPOConfig`, of which `beta` scales rewards.

    phrases: what the two answers are compared by, for objectives that read `signs`: "words" or "tokens" (their diff),
        "markup" (<MASK>...</MASK> around the phrases), or "all" (every token).
    nframes, fps, max_frames: which frames of a clip are taken, see `vtok.media.Sampling`.
    dense_reference: whether a patched model is meant to be held against a reference that sees all visual tokens.
    max_length: tokens of prompt and answer; longer pairs are left out, as a cut answer would lose phrases on one side.
        None, the default, is the only value with pictures and clips, whose tokens must not be cut.

    Raises `InvalidValue`, also for options of DPO's that token-level losses have no use for."""

    phrases: str = field(default="all", metadata={"help": "words, tokens, markup or all."})
    nframes: int | None = field(default=None, metadata={"help": "Frames of a clip."})
    fps: float | None = field(default=None, metadata={"help": "Frames of a clip in a second."})
    max_frames: int = field(default=16, metadata={"help": "Frames of a clip at most."})
    dense_reference: bool = field(default=False, metadata={"help": "The reference is dense, and meant to be."})
    max_length: int | None = field(default=None, metadata={"help": "Longer pairs of text are left out."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise InvalidValue(f"beta must be > 0, got beta={self.beta!r}.")
        if self.phrases not in get_args(Phrases):
            raise InvalidValue(f"phrases is one of {', '.join(get_args(Phrases))}, not {self.phrases!r}.")
        _ = self.sampling  # raises
        plain = {"loss_type": ["sigmoid"], "loss_weights": None, "ld_alpha": None, "f_divergence_type": "reverse_kl"}
        plain |= {"label_smoothing": 0.0, "use_weighting": False, "padding_free": False}
        plain |= {"precompute_ref_log_probs": False, "truncation_mode": "keep_start"}
        for name, only in plain.items():
            if getattr(self, name) != only:
                raise InvalidValue(f"Token-level losses have no {name}={getattr(self, name)!r}: leave it at {only!r}.")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.nframes, self.fps, self.max_frames)


class PreferenceTrainer(DPOTrainer):
    """DPOTrainer with a token-level loss, for text, pictures and clips. Takes the arguments of DPOTrainer.

    objective: of `vtok.rl.objectives`; DPO if left out. args: a `PreferenceConfig`.
    ref_model: `vtok.rl.patch_reference(trainer)` patches it as the model is, before the first step; with LoRA
    and no `ref_model` the reference is the model without its adapter, patch and all. A reference that is to see all
    visual tokens is given as `ref_model`, and `args.dense_reference=True` says that it is no mistake.

    Pairs that teach nothing are left out, with a warning that says how many; of streamed data sets, none are. Raises
    `InvalidValue` and `Unsupported` for what cannot be trained, before the training where it can be known."""

    _tag_names = ["trl", "dpo"]
    _config = PreferenceConfig

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: PreferenceConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        objective: Objective | None = None,
        **given: Any,
    ) -> None:
        args = self._config("out") if args is None else args
        if not isinstance(args, self._config):
            raise InvalidValue(f"args is a {self._config.__name__}, not {type(args).__name__}.")
        self.objective = DPO() if objective is None else objective
        if given.get("compute_metrics") is not None:
            raise Unsupported("compute_metrics wants the logits of whole rows, and here are those of answers alone.")
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                model if isinstance(model, str) else get_config_model_id(model.config)
            )
        rejected = self.objective.rejected
        pairs = PairCollator(
            processing_class, args.phrases, args.sampling, args.max_length, args.pad_to_multiple_of, rejected
        )
        self._answers = pairs.said
        train_dataset = checked(train_dataset, pairs)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: checked(some, pairs) for name, some in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = checked(eval_dataset, pairs)
        given |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "processing_class": processing_class}
        super().__init__(model, ref_model, args, data_collator=data_collator or pairs, **given)
        if self.aux_loss_enabled:
            raise Unsupported("A router's loss is not added to the objective's: set router_aux_loss_coef=0.")
        add_answer_logits(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        if self.ref_model is not None:
            add_answer_logits(self.accelerator.unwrap_model(self.ref_model))
        if not self.objective.reference:
            self.ref_model = None  # DPOTrainer loads one
        self.objective.attach(self.model)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Nothing: DPOTrainer would tokenise text, and knows of no signs. The collator does it."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that stay: DPOTrainer would drop clips, and of text keep the ids alone."""
        self._signature_columns = [*TEXT, *self._answers[2:], *COLUMNS, *WEIGHTS, "fps"]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The objective's. DPOTrainer's own has log-probabilities alone, and KLs are over the whole vocabulary."""
        stats, columns, outputs = self._stats(model, inputs)
        losses, metrics = self.objective(stats, columns, self.beta)
        chosen, rejected = metrics["rewards/chosen"], metrics["rewards/rejected"]
        metrics |= {"rewards/margins": chosen - rejected, "rewards/accuracies": (chosen > rejected).float()}
        logps = stats.logp.detach().sum(1).view(1 + self.objective.rejected, -1)
        metrics |= dict(zip(("logps/chosen", "logps/rejected"), logps))
        log_means(self, metrics)
        return (losses.mean(), outputs) if return_outputs else losses.mean()

    def _stats(self, model: Any, inputs: Mapping[str, Any]) -> tuple[TokenStats, dict[str, Tensor], Any]:
        """Of the columns in which answers are: `TokenStats`; what objectives read beside them; the policy's outputs."""
        given, extra = for_models(inputs)
        width = answer_width(given["labels"])
        given["answer_logits"] = width
        states = {"output_hidden_states": True} if "states" in self.objective.needs else {}
        reference = self._reference(given | states) if self.objective.reference else None
        columns = {name: value[:, -width:] for name, value in (extra | {"labels": given["labels"]}).items()}
        if states and reference is not None:
            if reference.hidden_states is None:
                raise Unsupported(f"{type(self.objective).__name__} reads hidden states, and the reference gives none.")
            columns["states"] = reference.hidden_states[-1][:, -width:]
        outputs = model(**given, **self.objective.asks(columns))
        if "learnt" in outputs:
            columns["learnt"] = outputs["learnt"]
        logits = None if reference is None else reference.logits
        return token_stats(outputs.logits, logits, columns["labels"]), columns, outputs

    def _reference(self, given: Mapping[str, Any]) -> Any:
        """What the reference gives: `ref_model`, or with LoRA the policy without its adapter, or with the one it began
        with."""
        context, reference = nullcontext(), self.ref_model
        if reference is None:
            reference, policy = self.model, self.accelerator.unwrap_model(self.model)
            if not is_peft_model(policy):
                name = type(self.objective).__name__
                raise InvalidValue(
                    f"{name} compares with a reference, and this trainer has none: give ref_model or LoRA."
                )
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
