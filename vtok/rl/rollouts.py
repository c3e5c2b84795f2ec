"""Training forwards keep what their rollouts kept, on TRL's online trainers (GRPO, RLOO).

Such a trainer generates, then runs prompts and answers again: for the old log-probabilities, for the reference's, and
for the loss, over several iterations, in other batches. Methods that choose by scores may choose otherwise there, in
half precision or where they draw. As in the replay of routers for mixtures of experts, the rollout's choice is
recorded with its sample and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from vtok import adapter as adapters
from vtok.engine.replay import Kept
from vtok.engine.trace import Trace
from vtok.errors import NothingToReport, Unsupported
from vtok.patching import Patch, patches_on

COLUMN = "vtok_kept"  # of the samples that a trainer buffers, shuffles and splits
SEAMS = ("_generate_single_turn", "_generate_and_score_completions", "_compute_loss")
LOGPS = "_get_per_token_logps_and_entropies"


def generates(trainer: Any) -> bool:
    """Whether it is one of TRL's online trainers, as this module knows them."""
    return all(hasattr(trainer, name) for name in (*SEAMS, LOGPS))


def replay(trainer: Any, record: Callable[..., Sequence[Kept]] | None = None) -> None:
    """Let the log-probability forwards of a trainer keep what its rollouts kept, exactly.

    trainer: a GRPOTrainer, RLOOTrainer or a subclass, whose model is patched; its reference model too, if it is.
    record: for rollouts of another engine: record(trainer, prompt_ids, images) gives a `vtok.engine.replay.Kept` for
        each prompt of the last generation, in their order. None takes what the patched model kept in `generate`.

    Raises `Unsupported` where the trainer generates in several turns (tools, environments) or generates elsewhere and
    `record` does not say what was kept there; also where its model is not patched.
    """
    if not generates(trainer):
        raise Unsupported(f"A {type(trainer).__name__} has no rollouts to replay: GRPO's and RLOO's trainers have.")
    if getattr(trainer, "tools", None) or getattr(trainer, "environment_factories", None):
        raise Unsupported("A rollout of several turns (tools, environments) is no single prefill, and not replayed.")
    elsewhere = getattr(trainer, "use_vllm", False) or getattr(trainer, "rollout_func", None) is not None
    if elsewhere and record is None:
        raise Unsupported(
            "The rollouts of this trainer come from another engine: say what it kept by replay(trainer, record=...)."
        )
    replayed = _Replayed(trainer, record)
    for name in (*SEAMS, LOGPS):
        setattr(trainer, name, getattr(replayed, name.lstrip("_")))


def ban_placeholders(trainer: Any) -> None:
    """Let rollouts write no placeholder of a picture or clip, which a training forward would take for one. TRL bans
    those of pictures alone."""
    vlm, adapter = adapters.find(trainer.accelerator.unwrap_model(trainer.model))
    ids = {adapter.token_id(vlm.config, modality) for modality in adapter.encoders}
    config = trainer.generation_config
    config.suppress_tokens = sorted({*(config.suppress_tokens or ()), *ids})


class _Replayed:
    """Stands in for four methods of a trainer; each calls the one that was there."""

    def __init__(self, trainer: Any, record: Callable[..., Sequence[Kept]] | None) -> None:
        self.trainer, self.record = trainer, record
        self.theirs = {name: getattr(trainer, name) for name in (*SEAMS, LOGPS)}
        self.kept: Sequence[Kept] | None = None  # of the samples that are being worked on

    def generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        patch = handle(self.trainer.model)
        before = _trace(patch)
        result = self.theirs["_generate_single_turn"](prompt_ids, images, *args, **kwargs)
        if self.record is not None:
            self.kept = self.record(self.trainer, prompt_ids, images)
        elif _trace(patch) is before:
            raise Unsupported("The patched model saw no prompt in this rollout: it was generated elsewhere.")
        else:
            self.kept = patch.trace.kept()
        if len(self.kept) != len(prompt_ids):
            raise Unsupported(f"A rollout of {len(prompt_ids)} prompts has {len(self.kept)} records of what was kept.")
        return result

    def generate_and_score_completions(self, inputs: Any) -> Any:
        try:
            output = self.theirs["_generate_and_score_completions"](inputs)
            return {**output, COLUMN: list(self.kept)}
        finally:
            self.kept = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        self.kept = inputs[COLUMN]
        try:
            return self.theirs["_compute_loss"](model, inputs)
        finally:
            self.kept = None

    def get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = patches_on(model) if self.kept is not None else []
        with found[0].replaying(self.kept) if found else nullcontext():  # a dense reference has none
            return self.theirs[LOGPS](model, *args, **kwargs)


def _trace(patch: Patch) -> Trace | None:
    try:
        return patch.trace
    except NothingToReport:
        return None


def handle(model: nn.Module) -> Patch:
    """The one patch on a trainer's model. Raises `Unsupported` where it has none."""
    found = patches_on(model)
    if not found:
        raise Unsupported("This trainer's model is not patched: call vtok.patch on it first.")
    return found[0]
