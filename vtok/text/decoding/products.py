"""Products of a few rows with a model's weights: a check of drafts is made of them, and a plain step of single rows.

A plain step reads the weights once. A check of four tokens need not take longer, but on a CPU torch lets it: products
of several float32 rows go to a library that prepares the weights first. oneDNN's take less, and torch has them, too.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QuickProducts:
    """Within it, products of several rows with a model's plain float32 weights on a CPU are oneDNN's, elsewhere what
    they were. They are rounded otherwise, as those of more rows ever are; a single row's stay bit for bit. Layers whose
    forward is replaced already keep theirs. It may be entered again and again, which takes little time."""

    def __init__(self, model: nn.Module) -> None:
        found = [module for module in model.modules() if type(module) is nn.Linear and _plain(module)]
        self.forwards = [(vars(module), partial(product, module)) for module in found]

    def __enter__(self) -> None:
        for held, forward in self.forwards:
            held.setdefault("forward", forward)

    def __exit__(self, *error: object) -> None:
        for held, forward in self.forwards:
            if held.get("forward") is forward:  # another thread may have been here, too
                held.pop("forward", None)


def _plain(module: nn.Linear) -> bool:
    weight = module.weight
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    dense = type(weight.data) is Tensor and weight.device.type == "cpu" and weight.dtype == torch.float32
    return known and dense and weight.is_contiguous() and "forward" not in vars(module)


def product(module: nn.Linear, x: Tensor) -> Tensor:
    """`module(x)` for x [..., D] without a gradient; a row alone by torch's own product, which reads weights once."""
    if x[..., 0].numel() < 2 or x.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, module.weight, module.bias)
    return torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, "none", [], "")
