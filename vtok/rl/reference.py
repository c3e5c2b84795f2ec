"""What a trainer must know of a patched model: its reference, its checkpoints, and a keep that changes in training.

patch = vtok.patch(model, "divprune", keep=0.25)
trainer = GRPOTrainer(model, ...)       # or DPOTrainer, RLOOTrainer, SFTTrainer, ...
vtok.rl.prepare(trainer)                # before trainer.train()
"""

from __future__ import annotations

import copy
import json
import logging
import random
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

import vtok
from vtok import config as configs
from vtok.engine.replay import Kept
from vtok.errors import InvalidValue, Unsupported
from vtok.patching import Patch, patch, patches_on
from vtok.rl import rollouts

LOG = logging.getLogger(__name__)
FILE = "vtok.json"  # in each checkpoint
Reference = Literal["alike", "dense"]


def prepare(
    trainer: Any,
    reference: Reference = "alike",
    *,
    keep: Sequence[float | int] | None = None,
    seed: int = 0,
    record: Callable[..., Sequence[Kept]] | None = None,
) -> Any:
    """Make one of TRL's or transformers' trainers right for a patched model; before its `train()`.

    reference: "alike" patches the reference model as the model is, so that KL and margins begin at 0; "dense"
        leaves it, on purpose. Where a trainer has none it says nothing.
    keep: values of which each optimiser step takes one, drawn from `seed` and the step, so that all ranks take the
        same: trains one model for several budgets.
    record: see `vtok.rl.replay`, which is switched on for trainers that generate.

    Each checkpoint gets a `vtok.json`, which says how it was trained; resuming one under another patch warns, and
    weights that transformers leaves behind are loaded (`reload`). Rollouts write no placeholders of pictures or clips.
    Returns the trainer. Raises a `VtokError` for what would train wrongly.
    """
    patch_reference(trainer, dense=_is_dense(reference))
    if rollouts.generates(trainer):
        rollouts.ban_placeholders(trainer)
        rollouts.replay(trainer, record)
    trainer.add_callback(PatchCallback(trainer, reference))
    if keep is not None:
        trainer.add_callback(RandomKeep(rollouts.handle(trainer.model), keep, seed))
    return trainer


def patch_reference(trainer: Any, dense: bool = False) -> Patch | None:
    """Patch the reference model of a trainer as its model is patched.

    dense: leave it as it is, on purpose: log-probabilities of the reference are then those of all visual tokens.
    Returns its patch, or None where there is nothing to patch: no reference at all, or LoRA, where the reference is the
    model itself without its adapter. Raises `Unsupported` where the reference's log-probabilities were computed when
    the trainer was built, and where one patch cannot give what is asked for."""
    model, reference = trainer.model, getattr(trainer, "ref_model", None)
    mine = rollouts.handle(model)
    if reference is None:
        if dense and getattr(model, "peft_config", None) and _has_reference(trainer):
            raise Unsupported(
                "The reference of this trainer is its own model without the adapter, and is patched with it: for a "
                "dense one pass a ref_model."
            )
        return None
    if getattr(trainer, "precompute_ref_logps", False) and not dense:
        raise Unsupported(
            "The reference's log-probabilities were computed when the trainer was built, by a model that was not "
            "patched. Leave precompute_ref_log_probs off, or use LoRA and patch the model before the trainer is built."
        )
    found = patches_on(reference)
    if dense and found:
        raise Unsupported(f"The reference was to be dense, and it is patched: {found[0]!r}.")
    if dense:
        return None
    if found:
        if repr(found[0].compressors) != repr(mine.compressors):  # a method's weights may be copies
            raise Unsupported(f"The reference is patched otherwise than the model: {found[0]!r} and {mine!r}.")
        return found[0]
    return patch(reference, [copy.deepcopy(part) for part in mine.compressors])  # weights of a method would be trained


def reload(model: nn.Module, checkpoint: Path) -> None:
    """Load the weights of a checkpoint that a trainer of transformers (5.24) resumed without loading them.

    It saves those of many vision-language models under the names of their first releases, and resumes without turning
    them back, which leaves the model as it was before its training. Does nothing where names fit, and for adapters."""
    file = checkpoint / SAFE_WEIGHTS_NAME
    if not file.is_file() or not isinstance(model, PreTrainedModel):
        return
    with safe_open(file, "pt") as weights:
        unknown = set(weights.keys()) - set(model.state_dict())
    if unknown:
        LOG.warning("%s was resumed without its weights, whose names differ: they are loaded now.", checkpoint)
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


class PatchCallback(TrainerCallback):
    """Writes how the model is patched into each checkpoint, and warns where a training goes on otherwise.

    reference: what was chosen for the reference model; None where nobody chose, which warns if it is dense."""

    def __init__(self, trainer: Any, reference: Reference | None = None) -> None:
        self._trainer, self.reference = weakref.ref(trainer), reference

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer()
        model, reference = trainer.model, getattr(trainer, "ref_model", None)
        if self.reference is None and reference is not None and bool(patches_on(model)) != bool(patches_on(reference)):
            LOG.warning(
                "The model is patched and its reference model is not, so that their log-probabilities differ from the "
                "start. Call vtok.rl.patch_reference(trainer), or with dense=True if that is meant."
            )
        if state.global_step:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self._compare(checkpoint)
            reload(trainer.accelerator.unwrap_model(model), checkpoint)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            file = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / FILE
            file.write_text(json.dumps(self._now(), indent=1) + "\n", encoding="utf-8")

    def _now(self) -> dict[str, Any]:
        found = patches_on(self._trainer().model)
        parts = found[0].compressors if found else ()
        try:
            told = configs.describe(parts)
        except InvalidValue:  # a method's own weights, which no such file holds
            told = {"vtok": vtok.__version__, "compressors": [repr(part) for part in parts]}
        return {**told, "reference": self.reference}

    def _compare(self, checkpoint: Path) -> None:
        file, now = checkpoint / FILE, self._now()
        if not file.is_file():
            LOG.warning("%s does not say whether it was trained compressed; now: %s", checkpoint, _told(now))
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        if any(before.get(key) != now[key] for key in ("compressors", "reference")):
            LOG.warning("%s was trained with %s, and goes on with %s.", checkpoint, _told(before), _told(now))


class RandomKeep(TrainerCallback):
    """One of several values of `keep` for each optimiser step, the same on all ranks.

    patch: of one compressor. values: of its `keep`. seed: with the step's number it decides. Between steps, so in
    evaluations, the patch's own value holds."""

    def __init__(self, patch: Patch, values: Sequence[float | int], seed: int = 0) -> None:
        if not values:
            raise InvalidValue("Give at least one value of keep to draw from.")
        for value in values:
            with patch.using(keep=value):  # raises for what cannot be
                pass
        self.patch, self.values, self.seed = patch, tuple(values), seed
        self._within = ExitStack()

    def keep(self, step: int) -> float | int:
        """What optimiser step number `step` keeps."""
        return random.Random(f"{self.seed} {step}").choice(self.values)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._within.close()  # of a step that failed
        self._within.enter_context(self.patch.using(keep=self.keep(state.global_step)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._within.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._within.close()


def _is_dense(reference: str) -> bool:
    if reference not in ("alike", "dense"):
        raise InvalidValue(f'reference is "alike" or "dense", not {reference!r}.')
    return reference == "dense"


def _has_reference(trainer: Any) -> bool:
    """Whether its loss looks at a reference at all: GRPO's and RLOO's with beta 0 do not."""
    return bool(getattr(trainer, "beta", 0.0)) or bool(getattr(trainer.args, "beta", 0.0))


def _told(config: dict[str, Any]) -> str:
    named = config["compressors"]
    parts = named if all(isinstance(part, str) for part in named) else map(repr, configs.load(config))
    return f"{', '.join(parts) or 'no compressor'} (reference: {config.get('reference') or 'not chosen'})"
