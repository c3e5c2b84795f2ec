"""RTO: a DPO model's token rewards for policy-gradient training (https://arxiv.org/abs/2404.18922).

The official code trains a critic by PPO. Here the rewards become advantages of GRPO: what is still to come, against the
mean of its group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.text.align.stats import to_come


def shaped_rewards(
    dpo_logp: Tensor,
    ref_logp: Tensor,
    policy_logp: Tensor,
    mask: Tensor,
    outcome: Tensor,
    *,
    beta: float = 0.05,
    clip: float = 0.05,
    kl: float = 0.01,
    outcome_clip: float = 10.0,
) -> Tensor:
    """[B, T] rewards of tokens; 0 where the mask is not.

    dpo_logp, ref_logp, policy_logp: [B, T] log-probabilities of the tokens under a DPO model, its reference and the
    policy. mask: [B, T] bool, of the answers. outcome: [B] rewards of whole answers, at their last tokens.

    clip(beta (dpo - ref), +-clip) - kl (policy - ref) + [last] clip(outcome, +-outcome_clip). The first clip is needed:
    log-ratios of tokens have heavy tails. Raises `InvalidValue`."""
    if not dpo_logp.shape == ref_logp.shape == policy_logp.shape == mask.shape or outcome.shape != mask.shape[:1]:
        raise InvalidValue(f"Log-probabilities and mask are [B, T] and outcome [B]: not {tuple(outcome.shape)}.")
    mask = mask.bool()
    rewards = (beta * (dpo_logp - ref_logp)).clamp(-clip, clip) - kl * (policy_logp - ref_logp)
    rewards = rewards.masked_fill(~mask, 0)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = places.where(mask, -1).amax(1)
    ends = (places == last[:, None]) & mask
    return rewards + ends * outcome.clamp(-outcome_clip, outcome_clip)[:, None]


def advantages(rewards: Tensor, mask: Tensor, group: int, *, gamma: float = 1.0, scale: bool = True) -> Tensor:
    """[B, T] what comes from each token on, less the mean of its group's whole returns; 0 where the mask is not.

    rewards: [B, T]. mask: [B, T]. group: answers to one prompt, which stand one behind the other. scale: divide by the
    standard deviation of the group's returns, as GRPO does. Raises `InvalidValue` where B is no multiple of `group`."""
    if len(rewards) % group:
        raise InvalidValue(f"{len(rewards)} answers are no groups of {group}.")
    mask = mask.bool()
    rewards = rewards.masked_fill(~mask, 0)
    coming = to_come(rewards, gamma)
    first = mask.long().argmax(1, keepdim=True)  # padding before an answer discounts nothing
    returns = coming.gather(1, first)[:, 0].view(-1, group)
    coming = coming - returns.mean(1).repeat_interleave(group)[:, None]
    if scale and group > 1:
        coming = coming / (returns.std(1).repeat_interleave(group)[:, None] + 1e-4)
    return coming.masked_fill(~mask, 0)
