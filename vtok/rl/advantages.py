"""Advantages of tokens in GRPO: what a sample's one advantage cannot say.

vtok.rl.token_advantages(trainer, rto(dpo_model, reference))      # before trainer.train()

TRL's loss takes advantages [B, T]; here the method that makes them is wrapped, and what it gave is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer import add_fused_lm_head

from vtok.errors import InvalidValue, Unsupported
from vtok.rl import rollouts
from vtok.text.align.rto import advantages, shaped_rewards

Samples = dict[str, Any]


def token_advantages(trainer: Any, give: Callable[[Any, Samples], Tensor]) -> Any:
    """Let a GRPOTrainer train with advantages of tokens.

    give: of the trainer and its samples, of which `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask`,
    [B, T] each, and `advantages` [B] are read; gives advantages [B, T] of the completions' tokens. What SPO's
    `chain_advantages` gives is stacked into that. Returns the trainer. Raises `Unsupported` for other trainers, and
    `InvalidValue` in training, where what is given has another shape."""
    if not rollouts.generates(trainer):
        raise Unsupported(f"A {type(trainer).__name__} has no rollouts: advantages of tokens are for GRPO's trainers.")
    theirs = trainer._generate_and_score_completions

    def with_tokens(inputs: Any) -> Samples:
        samples = theirs(inputs)
        made = give(trainer, samples)
        if made.shape != samples["completion_ids"].shape:
            wanted = list(samples["completion_ids"].shape)
            raise InvalidValue(f"Advantages of tokens are {wanted} here, not {list(made.shape)}.")
        return {**samples, "advantages": made.detach()}

    trainer._generate_and_score_completions = with_tokens
    return trainer


def rto(
    dpo_model: nn.Module, reference: nn.Module, *, beta: float = 0.05, clip: float = 0.05, kl: float = 0.0
) -> Callable[[Any, Samples], Tensor]:
    """RTO for `token_advantages`: a DPO model's token rewards, beside GRPO's own advantage of the outcome.

    To what GRPO gives is added what is still to come of `shaped_rewards`, less its group's mean; it is not scaled. With
    scale_rewards="none" that is RTO's reward with no clip of the outcome. kl: weight of the policy's KL, for which
    its log-probabilities are computed once more; 0 leaves it to the trainer's own `beta`. The models are of
    transformers, without adapters; patch them as the policy where it is patched."""
    judges: list[nn.Module] = []

    def give(trainer: Any, samples: Samples) -> Tensor:
        mask, group = samples["completion_mask"].bool(), trainer.num_generations
        if len(mask) % group:
            raise Unsupported(f"A process has {len(mask)} samples, which are no groups of {group}: change the batch.")
        if not judges:
            judges.extend((dpo_model, reference))
            for model in judges:  # as TRL does with its own, whose log-probabilities are made in this way
                add_fused_lm_head(model.to(trainer.accelerator.device).eval(), temperature=trainer.temperature)
        with torch.no_grad():
            dpo, ref = (_logps(trainer, model, samples) for model in judges)
            policy = _logps(trainer, trainer.model, samples) if kl else ref
        none = torch.zeros_like(samples["advantages"])
        rewards = shaped_rewards(dpo, ref, policy, mask, none, beta=beta, clip=clip, kl=kl)
        return samples["advantages"][:, None] * mask + advantages(rewards, mask, group, scale=False)

    return give


def _logps(trainer: Any, model: nn.Module, samples: Samples) -> Tensor:
    """[B, T] of the completions' tokens, with the samples' pictures."""
    ids = torch.cat([samples["prompt_ids"], samples["completion_ids"]], 1)
    mask = torch.cat([samples["prompt_mask"], samples["completion_mask"]], 1)
    names = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles")
    names += ("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")
    media = {name: samples[name] for name in names if samples.get(name) is not None}
    width = samples["completion_ids"].shape[1]
    return trainer._get_per_token_logps_and_entropies(model, ids, mask, width, **media)[0]
