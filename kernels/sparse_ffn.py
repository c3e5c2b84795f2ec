"""A gated feed-forward network of which each sample uses only some neurons."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def sparse_ffn(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, index: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """`(activation(x Wg) * (x Wu)) Wd` over the neurons `index` alone, as if all others gave 0 (CoreInfer, 2410.18311).

    x: [B, T, D]. gate, up: [F, D] and down: [D, F], weights as `torch.nn.Linear` holds them; there are no biases.
    index: [B, K] long, 0 <= index < F, the neurons of each sample, distinct. activation: elementwise.
    Returns [B, T, D] in x's dtype; sums run over the neurons in the order of `index`. Differentiable in x and in the
    weights. The chosen weights are copied (3 K D values a sample): who calls often with one `index` keeps what
    `gather_neurons` gives and calls `gathered_ffn`.
    """
    return gathered_ffn(x, *gather_neurons(gate, up, down, index), activation)


def gather_neurons(gate: Tensor, up: Tensor, down: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of some neurons, three [B, K, D] copies; see `sparse_ffn`. Of `down` it is the columns, as rows."""
    return gate[index], up[index], down.t()[index]


def gathered_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """`sparse_ffn` on weights that `gather_neurons` copied, [B, K, D] each. x: [B, T, D] -> [B, T, D]."""
    inner = activation(torch.bmm(x, gate.mT)) * torch.bmm(x, up.mT)  # [B, T, K]
    return torch.bmm(inner, down)
