"""Optimisers with less state than AdamW, behind one call; for `Trainer(optimizers=(optimizer, None))` or a loop.

optimizer = vtok.optim.create("apollo_mini", model, lr=1e-4)
vtok.optim.state_bytes(optimizer)       # after a step

What is not here: GaLore, Adam-mini, Adafactor and others have an implementation that holds, in transformers (`optim=`),
torch or bitsandbytes. Of the names below libraries have none, or one that does something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import InvalidValue
from vtok.text.optim.apollo import Apollo
from vtok.text.optim.base import Base
from vtok.text.optim.cosmos import Cosmos
from vtok.text.optim.frugal import Frugal
from vtok.text.optim.lionk import LionK
from vtok.text.optim.spam import Spam, StableSpam
from vtok.text.optim.zeroth import ZerothOrder, without_backward

__all__ = ["available", "create", "groups", "state_bytes", "without_backward"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "apollo": Apollo,
    "apollo_mini": partial(Apollo, rank=1, per="tensor", scale=128.0),
    "cosmos": Cosmos,
    "forward_gradient": partial(ZerothOrder, estimate="forward"),
    "frugal": Frugal,
    "lion": LionK,
    "lion_k": LionK,
    "mezo": ZerothOrder,
    "muon": torch.optim.Muon,
    "spam": Spam,
    "stable_spam": StableSpam,
}


def available() -> list[str]:
    """The names that `create` takes."""
    return sorted(OPTIMIZERS)


def create(name: str, params: nn.Module | Iterable[Any], lr: float | None = None, **options: Any) -> Any:
    """An optimiser by name.

    params: the model, whose trainable parameters are grouped as `groups` says; or tensors, or groups, as of any torch
        optimiser. lr: the method's own by default. options: of the method, see its class; a group may have its own.

    Raises `InvalidValue` for an unknown name, with those there are, and for parameters that the method cannot take."""
    if name not in OPTIMIZERS:
        raise InvalidValue(f"There is no optimiser {name!r}: {', '.join(available())}.")
    make = OPTIMIZERS[name]
    kind = getattr(make, "func", make)
    options |= {} if lr is None else {"lr": lr}
    if isinstance(params, nn.Module):
        if kind is ZerothOrder:
            options["model"] = params
        decay = options.pop("weight_decay", None)
        params = groups(params, decay, plain=issubclass(kind, Base))
    params = list(params)
    if kind is torch.optim.Muon and any(p.ndim != 2 for p in _tensors(params)):
        raise InvalidValue(
            'Muon is for matrices. "lion_k" with kernel="nuclear" takes a model, with AdamW for the rest.'
        )
    return make(params, **options)


def groups(model: nn.Module, weight_decay: float | None = None, plain: bool = True) -> list[dict[str, Any]]:
    """The trainable parameters of a model in up to three groups: weights of linear layers; other matrices and kernels
    (embeddings, the head); biases and norms, which are not decayed.

    weight_decay: of the former two, the method's own by default. plain: mark the latter two as AdamW's."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    linear = {id(m.weight) for m in layers if m.weight.ndim == 2} - embedded
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InvalidValue("The model has no parameter that is trained.")
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    other = {"plain": True} if plain else {}
    found = [
        {"params": [p for p in trained if id(p) in linear], **decay},
        {"params": [p for p in trained if id(p) not in linear and p.ndim > 1], **decay, **other},
        {"params": [p for p in trained if id(p) not in linear and p.ndim <= 1], "weight_decay": 0.0, **other},
    ]
    return [group for group in found if group["params"]]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that an optimiser keeps between steps; 0 before the first."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _tensors(params: list[Any]) -> Iterable[Tensor]:
    for part in params:
        part = part["params"] if isinstance(part, dict) else part
        yield from [part] if isinstance(part, Tensor) else part
