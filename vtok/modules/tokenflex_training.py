"""What turns a model with a fixed projector into one with a trained, flexible one: two steps of the recipe.

    projector = TokenFlexProjector(...)
    align(model, projector, batches, sampler)                     # copy the model's own projector, the rest frozen
    Trainer(..., callbacks=[FlexibleTokens(projector, sampler)])  # then the task, tokens drawn anew in each step

Any trainer that takes transformers' callbacks will do, TRL's too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from vtok import adapter as adapters
from vtok.compressors.tokenflex import TokenFLEX
from vtok.modules.tokenflex import TokenFlexProjector, TokenSampler
from vtok.patching import Patch, patch
from vtok.types import Selection, VisualTokens

PLACE = "token_projector"  # the attribute of the core model that holds the projector while it is trained


def projector_for(model: nn.Module, mult: int = 3, pool: str = "resize") -> TokenFlexProjector:
    """A fresh projector of the model's sizes, in its dtype and on its device."""
    vlm, adapter = adapters.find(model)
    width = adapter.tower(vlm.config).width
    out = vlm.get_input_embeddings().weight
    return TokenFlexProjector(width, out.shape[1], mult, pool).to(out)


@dataclass(frozen=True, kw_only=True)
class _Aligned(TokenFLEX):
    """Hands `sink` how far the made tokens are from the dense ones at their places."""

    sink: Callable[[Tensor], None]
    adaptive: ClassVar[bool] = False

    def select(self, tokens: VisualTokens) -> Selection:
        selection = super().select(tokens)
        made, dense = (x[selection.keep].float() for x in (selection.features, tokens.features.detach()))
        self.sink(F.mse_loss(made, dense) / dense.var().clamp(min=1e-12))
        return selection


def align(
    model: nn.Module,
    projector: TokenFlexProjector,
    batches: Iterable[Mapping[str, Tensor]],
    sampler: TokenSampler,
    lr: float = 1e-3,
) -> list[float]:
    """One step on each of `batches` (model inputs with pictures). Only the projector's weights change.

    Returns the losses: the squared distance to the model's own tokens, as a fraction of their variance."""
    adam = torch.optim.AdamW(projector.parameters(), lr=lr, weight_decay=0.0)
    found: list[Tensor] = []
    losses = []
    for step, inputs in enumerate(batches):
        with patch(model, _Aligned(keep=sampler.at(step), weights=projector, sink=found.append)):
            model(**inputs, use_cache=False, logits_to_keep=1)
        loss = torch.stack(found).mean()
        found.clear()
        adam.zero_grad()
        loss.backward(inputs=list(projector.parameters()))
        adam.step()
        losses.append(loss.item())
    return losses


class FlexibleTokens(TrainerCallback):
    """Patches the trainer's model with another number of tokens in every step.

    While training the projector is the core model's `token_projector`, so that optimisers, checkpoints and
    `model.save_pretrained` see it; at the end the model is as before. Every process draws the same number, which a
    resumed run draws again."""

    def __init__(self, projector: TokenFlexProjector, sampler: TokenSampler) -> None:
        self.projector, self.sampler = projector, sampler
        self.patch: Patch | None = None

    def attach(self, model: nn.Module) -> None:
        """Make the projector's weights the model's; call it before the trainer makes its optimiser."""
        vlm, adapter = adapters.find(model)
        setattr(adapter.core(vlm), PLACE, self.projector)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._remove()
        self.patch = patch(model, TokenFLEX(keep=self.sampler.at(state.global_step), weights=self.projector))

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._remove()
        vlm, adapter = adapters.find(model)
        delattr(adapter.core(vlm), PLACE)

    def _remove(self) -> None:
        if self.patch is not None:
            self.patch.remove()
            self.patch = None
