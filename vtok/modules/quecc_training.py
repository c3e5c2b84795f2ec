"""What trains a `QueCCProjector` for a model at hand: the paper's two stages (Section 4, Appendix) as one loop.

projector = projector_for(model, kernel=4)
train(model, projector, batches, steps=1000)                              # the projector, all else frozen
train(model, projector, batches, steps=1000, lr=2e-5, decoder=True)       # and the language model with it
projector.save("quecc.safetensors")
vtok.patch(model, "quecc", weights="quecc.safetensors")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from vtok import adapter as adapters
from vtok.compressors.quecc import QueCC
from vtok.errors import InvalidValue
from vtok.modules.quecc import HEADS, LAYERS, QueCCProjector
from vtok.patching import patch

DEPTH = 24  # layers of the encoder that the paper's LAYERS are of


def projector_for(
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
    core = adapter.core(vlm)
    depth, tower = len(adapter.encoder_layers(core)), adapter.tower(vlm.config)
    if layers is None:
        layers = tuple(round(layer * depth / DEPTH) for layer in LAYERS)
    out = vlm.get_input_embeddings().weight
    dim = tower.width * tower.merge**2
    projector = QueCCProjector(dim, out.shape[1], kernel, layers=layers, heads=heads, partial=partial).to(out.device)
    own = getattr(core, "multi_modal_projector", None)
    pairs = [(getattr(own, "linear_1", None), projector.mlp[0]), (getattr(own, "linear_2", None), projector.mlp[2])]
    if all(theirs is not None and theirs.weight.shape == ours.weight.shape for theirs, ours in pairs):
        with torch.no_grad():
            for theirs, ours in pairs:
                ours.weight.copy_(theirs.weight)
                if theirs.bias is not None:
                    ours.bias.copy_(theirs.bias)
    return projector


def train(
    model: nn.Module,
    projector: QueCCProjector,
    batches: Iterable[Mapping[str, Any]],
    steps: int,
    *,
    lr: float = 1e-3,
    warmup: float = 0.03,
    weight_decay: float = 0.0,
    max_norm: float = 1.0,
    decoder: bool = False,
    stop: Sequence[int] = (),
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the projector in the patched model by the model's own loss, one step on each of the first `steps` batches.

    batches: model inputs with labels (-100 on the prompt, whose text is the question).
    lr: the highest, reached after the fraction `warmup` of the steps and then falling as a cosine; the paper has 1e-3,
        and 2e-5 with the decoder.
    decoder: train the language model and its head, too.
    stop: see `QueCC`. on_step: called with each step and its loss.

    Returns the losses. The model's modes and `requires_grad` flags are then what they were, and so are all its weights
    unless `decoder`. Without gradient flows what comes before: encoder and question."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidValue(f"steps must be an int >= 1, got {steps!r}")
    vlm, adapter = adapters.find(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    losses = []
    try:
        model.requires_grad_(False).train()
        trained = list(projector.requires_grad_(True).train().parameters())
        if decoder:
            for module in (adapter.core(vlm).language_model, vlm.lm_head):
                module.requires_grad_(True)
            trained += [parameter for parameter in model.parameters() if parameter.requires_grad]
        adam = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _share(step, steps, math.ceil(warmup * steps)))
        with patch(model, QueCC(weights=projector, stop=stop)):
            for step, inputs in enumerate(islice(batches, steps)):
                loss = model(**inputs, use_cache=False).loss
                if loss is None:
                    raise InvalidValue("The model gave no loss: each batch needs labels, -100 on the prompt.")
                loss.backward()
                nn.utils.clip_grad_norm_(trained, max_norm)
                adam.step()
                adam.zero_grad()
                schedule.step()
                losses.append(loss.item())
                if on_step is not None:
                    on_step(step, losses[-1])
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        projector.eval()
    return losses


def _share(step: int, steps: int, warmup: int) -> float:
    """Of the highest learning rate, in a step: up in a line, down as a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
