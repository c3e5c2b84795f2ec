"""What trains a projector (TokenFLEX, QueCC) for a model at hand, by transformers' Trainer.

projector = tokenflex_for(model)
align(model, projector, sampler, batches, steps=300)                       # copy the model's own projector
counts = lambda step: TokenFLEX(keep=sampler.at(step), weights=projector)  # tokens drawn anew in each step
train(model, projector, counts, batches, steps=1000, decoder=True)         # the task

projector = quecc_for(model, kernel=4)
same = lambda step: QueCC(weights=projector)
train(model, projector, same, batches, steps=1000)                         # the paper's stages (Section 4, Appendix)
train(model, projector, same, batches, steps=1000, lr=2e-5, decoder=True)
projector.save("quecc.safetensors")

Any other trainer that takes transformers' callbacks will do, TRL's too: `Projected(projector, counts)`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from vtok import adapter as adapters
from vtok.compressor import Compressor
from vtok.compressors.tokenflex import TokenFLEX
from vtok.errors import InvalidValue
from vtok.modules.quecc import HEADS, LAYERS, QueCCProjector
from vtok.modules.tokenflex import TokenFlexProjector, TokenSampler
from vtok.patching import Patch, patch
from vtok.types import Selection, VisualTokens

PLACE = "token_projector"  # the attribute of the core model that holds the projector while it is trained
DEPTH = 24  # layers of the encoder that QueCC's LAYERS are of


class Projected(TrainerCallback):
    """Patches the trainer's model with `method(step)`, which holds the projector, anew in every step.

    While training the projector is the core model's `token_projector`, so that optimisers, checkpoints and
    `model.save_pretrained` see it; at the end the model is as before. Every process and a resumed run get the same
    method, if it is a function of the step alone."""

    def __init__(self, projector: nn.Module, method: Callable[[int], Compressor]) -> None:
        self.projector, self.method = projector, method
        self.patch: Patch | None = None

    def attach(self, model: nn.Module) -> None:
        """Make the projector's weights the model's; call it before the trainer makes its optimiser."""
        vlm, adapter = adapters.find(model)
        setattr(adapter.core(vlm), PLACE, self.projector)

    def detach(self, model: nn.Module) -> None:
        """The model as it was before."""
        self._unpatch()
        vlm, adapter = adapters.find(model)
        if hasattr(adapter.core(vlm), PLACE):
            delattr(adapter.core(vlm), PLACE)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._unpatch()
        self.patch = patch(model, self.method(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.detach(model)

    def _unpatch(self) -> None:
        if self.patch is not None:
            self.patch.remove()
            self.patch = None


def train(
    model: nn.Module,
    projector: nn.Module,
    method: Callable[[int], Compressor],
    batches: Iterable[Mapping[str, Any]],
    steps: int,
    *,
    lr: float = 1e-3,
    decoder: bool = False,
    loss: Callable[[], Tensor] | None = None,
    **settings: Any,
) -> list[float]:
    """Train the projector in the patched model, one step on each of the first `steps` batches; returns the losses.

    batches: model inputs with labels (-100 on the prompt), for the model's own loss.
    decoder: train the language model and its head, too.
    loss: called after each forward for a loss instead of the model's own; no labels are needed then.
    settings: of `TrainingArguments`. By default a warm-up of 3 %, then a cosine, no weight decay.

    The model's modes and `requires_grad` flags are then what they were, and so are all its weights unless `decoder`.
    Without gradient flows what comes before the projector: encoder and question."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidValue(f"steps must be an int >= 1, got {steps!r}")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    callback = Projected(projector, method)
    vlm, adapter = adapters.find(model)
    try:
        model.requires_grad_(False)
        if decoder:
            for module in (adapter.language_model(adapter.core(vlm)), vlm.lm_head):
                module.requires_grad_(True)
        projector.requires_grad_(True)
        callback.attach(model)
        with tempfile.TemporaryDirectory() as folder:
            how = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0, "report_to": []}
            how |= {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "remove_unused_columns": False}
            how |= {"per_device_train_batch_size": 1, "use_cpu": model.device.type == "cpu", "output_dir": folder}
            args = TrainingArguments(**how | {"max_steps": steps, "learning_rate": lr} | settings)
            trainer = _Trainer(model, args, _only, train_dataset=_Batches(batches, steps), callbacks=[callback])
            trainer.own_loss = loss
            trainer.train()
    finally:
        callback.detach(model)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        projector.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class _Batches(Dataset):
    """Batches as they come, whatever index the trainer asks for."""

    def __init__(self, batches: Iterable[Mapping[str, Any]], steps: int) -> None:
        self.batches, self.steps = iter(batches), steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {**next(self.batches), "use_cache": False}


class _Trainer(Trainer):
    own_loss: Callable[[], Tensor] | None = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.own_loss is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        model(**inputs, logits_to_keep=1)
        return self.own_loss()


def _only(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return rows[0]


# ---- TokenFLEX -------------------------------------------------------------------------------------------------------
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
    sampler: TokenSampler,
    batches: Iterable[Mapping[str, Any]],
    steps: int,
    **settings: Any,
) -> list[float]:
    """Bring the projector's tokens to the model's own at their places; only its weights change. See `train`.

    Returns the losses: the squared distance as a fraction of the variance of the model's own tokens."""
    found: list[Tensor] = []

    def loss() -> Tensor:
        mean = torch.stack(found).mean()
        found.clear()
        return mean

    method = lambda step: _Aligned(keep=sampler.at(step), weights=projector, sink=found.append)
    return train(model, projector, method, batches, steps, loss=loss, **settings)


def _widths(model: nn.Module) -> tuple[int, Tensor]:
    """Width of a patch, and the embeddings of the words, whose width is that of a token."""
    vlm, adapter = adapters.find(model)
    return adapter.tower(vlm.config).width, vlm.get_input_embeddings().weight


def tokenflex_for(model: nn.Module, mult: int = 3, pool: str = "resize") -> TokenFlexProjector:
    """A fresh projector of the model's sizes, in its dtype and on its device."""
    width, out = _widths(model)
    return TokenFlexProjector(width, out.shape[1], mult, pool).to(out)


# ---- QueCC -----------------------------------------------------------------------------------------------------------
def quecc_for(
    model: nn.Module,
    kernel: int,
    layers: Sequence[int | float] | None = None,
    *,
    heads: int = HEADS,
    partial: bool = False,
) -> QueCCProjector:
    """A fresh fp32 projector of the model's sizes, on its device.

    layers: hidden states of the encoder, see `QueCCProjector`; by default the paper's, in proportion to the depth. The
    MLP of a LLaVA's own projector (`linear_1`, `linear_2`) is copied: what it knows need not be learnt again."""
    vlm, adapter = adapters.find(model)
    core, (width, out) = adapter.core(vlm), _widths(model)
    depth = len(adapter.encoder_layers(core))
    if layers is None:
        layers = tuple(round(layer * depth / DEPTH) for layer in LAYERS)
    dim = width * adapter.tower(vlm.config).merge ** 2
    projector = QueCCProjector(dim, out.shape[1], kernel, layers=layers, heads=heads, partial=partial).to(out.device)
    own = getattr(core, "multi_modal_projector", None)
    pairs = [(getattr(own, "linear_1", None), projector.mlp[0]), (getattr(own, "linear_2", None), projector.mlp[2])]
    if all(theirs is not None and theirs.weight.shape == ours.weight.shape for theirs, ours in pairs):
        for theirs, ours in pairs:
            ours.load_state_dict(theirs.state_dict(), strict=False)
    return projector
