"""Token-level losses as objects, for `PreferenceTrainer`: an objective is called with statistics, columns and beta.

Each is a function of `vtok.text.align` with its options. `needs` names the columns that it reads: "signs", "weights",
"states" (the reference's last hidden states). Your own: subclass `Objective`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from vtok.errors import InvalidValue
from vtok.text.align.logo import logo
from vtok.text.align.rrpo import rrpo
from vtok.text.align.sparsepo import MaskHead, activation_mask, sparsepo
from vtok.text.align.stats import TokenStats
from vtok.text.align.tdpo import tdpo
from vtok.text.align.treg import treg
from vtok.text.align.weighted import weighted_dpo

Result = tuple[Tensor, dict[str, Tensor]]  # losses [B], and metrics [B] each


@dataclass
class Learnt(ModelOutput):
    """What a policy's forward gives, and what an objective learns beside it."""

    logits: Tensor | None = None
    learnt: Tensor | None = None


class Objective:
    """A loss of pairs. Subclasses are called with (stats, columns, beta) and give the losses and what to log.

    rejected: answers that each row rejects. reference: whether `ref_logp` and `kl` of the statistics are read; where
    not, no reference is run."""

    needs: ClassVar[frozenset[str]] = frozenset()
    rejected: int = 1
    reference: bool = True

    def __call__(self, stats: TokenStats, columns: Mapping[str, Tensor], beta: float) -> Result:
        """stats: of (1 + rejected) B rows, chosen answers first. columns: as many rows [T] each, of tokens."""

    def attach(self, model: nn.Module) -> None:
        """Put what is to be learnt besides the model into it, so that it is optimised and saved with it."""

    def asks(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the policy's forward is given beside its inputs. Its output "learnt", if any, becomes a column."""
        return {}


class DPO(Objective):
    """DPO of all tokens."""

    def __call__(self, stats: TokenStats, columns: Mapping[str, Tensor], beta: float) -> Result:
        return weighted_dpo(stats, stats.kl.new_ones(columns["labels"].shape), beta=beta)


class WeightedDPO(Objective):
    """DPO of weighted tokens; with the weights of `vtok.rl.scores.critical` it is cDPO.

    Rows have `chosen_weights`, `rejected_weights` or both."""

    needs = frozenset({"weights"})

    def __call__(self, stats: TokenStats, columns: Mapping[str, Tensor], beta: float) -> Result:
        return weighted_dpo(stats, _scores(columns), beta=beta)


@dataclass(frozen=True)
class RRPO(Objective):
    """RRPO: DPO of the phrases that differ, and a KL on the chosen answer, see `vtok.text.align.rrpo`."""

    alpha: float = 0.01
    needs: ClassVar[frozenset[str]] = frozenset({"signs"})

    def __call__(self, stats: TokenStats, columns: Mapping[str, Tensor], beta: float) -> Result:
        return rrpo(stats, columns["signs"], alpha=self.alpha, beta=beta)


@dataclass(frozen=True)
class TDPO(Objective):
    """TDPO 1 and 2, see `vtok.text.align.tdpo`."""

    alpha: float = 0.5
    version: int = 2

    def __call__(self, stats: TokenStats, columns: Mapping[str, Tensor], beta: float) -> Result:
        return tdpo(stats, beta=beta, alpha=self.alpha, version=self.version)


@dataclass(frozen=True)
class TREG(Objective):
    """T-REG on DPO, or with `simpo_margin` on SimPO. `chosen_weights` and `rejected_weights` are the scores, see
    `vtok.rl.scores.contrast`."""

    alpha: float = 0.25
    simpo_margin: float | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    def __call__(self, stats: TokenStats, columns: Mapping[str, Tensor], beta: float) -> Result:
        scores = _scores(columns)
        if bool((scores.abs() > 0.5).any()):
            raise InvalidValue("T-REG's scores are in [-0.5, 0.5], of both answers: see vtok.rl.scores.contrast.")
        return treg(stats, scores, alpha=self.alpha, beta=beta, simpo_margin=self.simpo_margin)


@dataclass(frozen=True)
class LOGO(Objective):
    """LOGO, see `vtok.text.align.logo`; with rejected=1 and sft=0 SimPO. It has no reference, and wants a `beta` of 2
    to 10. Rows have as many rejected answers: the columns `rejected`, `rejected_2`, ..."""

    gap: float = 0.3
    sft: float = 0.1
    rejected: int = 2
    reference = False

    def __call__(self, stats: TokenStats, columns: Mapping[str, Tensor], beta: float) -> Result:
        return logo(stats, beta=beta, gap=self.gap, sft=self.sft, rejected=self.rejected)


@dataclass
class SparsePO(Objective):
    """SparsePO. masks: "common" or "independent", learnt by a `MaskHead`, or "activations", not learnt.

    l1: weight of the masks' sums. The head is the model's submodule `mask_head`: it is trained and saved with it; with
    LoRA it is trained, but checkpoints of adapters do not have it."""

    masks: str = "common"
    l1: float = 1e-3
    dropout: float = 0.01
    head: MaskHead | None = field(default=None, init=False, repr=False)
    needs: ClassVar[frozenset[str]] = frozenset({"states"})

    def attach(self, model: nn.Module) -> None:
        if self.masks == "activations":
            return
        config: Any = model.config
        width = config.get_text_config().hidden_size
        head = self.head = MaskHead(width, self.masks, self.dropout).to(next(model.parameters()).device)
        model.add_module("mask_head", head)
        forward = model.forward

        @functools.wraps(type(model).forward)
        def with_masks(_: nn.Module, *args: Any, mask_states: Tensor | None = None, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            if mask_states is None:
                return out
            # here, since what wraps the model (DDP) has to see all that is trained
            return Learnt(logits=out.logits, learnt=torch.stack(head(mask_states), -1))

        model.forward = types.MethodType(with_masks, model)

    def asks(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {} if self.head is None else {"mask_states": columns["states"][:, :-1]}

    def __call__(self, stats: TokenStats, columns: Mapping[str, Tensor], beta: float) -> Result:
        if missing := {"states", *(["learnt"] if self.head else [])} - set(columns):
            raise InvalidValue(f"SparsePO reads what this trainer does not give: {', '.join(sorted(missing))}.")
        if self.head is None:
            mask = activation_mask(columns["states"], columns["labels"])
            return sparsepo(stats, mask, mask, beta=beta)
        of_rewards, of_kl = columns["learnt"].unbind(-1)
        part = self.l1 / 2 if self.masks == "common" else self.l1
        return sparsepo(stats, of_rewards, of_kl, beta=beta, l1_rewards=part, l1_kl=part)


def _scores(columns: Mapping[str, Tensor]) -> Tensor:
    if "weights" not in columns:
        raise InvalidValue(
            "This objective reads the columns chosen_weights and rejected_weights, and the rows have none."
        )
    return columns["weights"]
