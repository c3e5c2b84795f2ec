"""A gated feed-forward network of which each sample uses only some neurons."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from vtok.errors import InvalidValue
from vtok.kernels.dispatch import dispatch, operation

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
TOKENS = 64  # of a sample; with more, reading the weights is no longer what takes the time, and torch is as fast


def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    index: Tensor,
    activation: str | Callable[[Tensor], Tensor],
    backend: str = "auto",
) -> Tensor:
    """`(activation(x Wg) * (x Wu)) Wd` over the neurons `index` alone, as if all others gave 0 (CoreInfer, 2410.18311).

    x: [B, T, D]. gate, up: [F, D] and down: [D, F], weights as `torch.nn.Linear` holds them; there are no biases.
    index: [B, K] long, 0 <= index < F, the neurons of each sample, distinct.
    activation: a name of `ACTIVATIONS`, or any elementwise function, which takes torch.
    backend: "auto", "torch" or "triton", see `dispatch`; torch alone has a gradient, in x and in the weights. Triton is
    for decoding: "auto" takes it for at most `TOKENS` tokens a sample. It sums in fp32 whatever the type.
    Returns [B, T, D] in x's dtype; sums run over the neurons in the order of `index`. The chosen weights are copied
    (3 K D values a sample): who calls often with one `index` keeps what `gather_neurons` gives and calls
    `gathered_ffn`.
    """
    return gathered_ffn(x, *gather_neurons(gate, up, down, index), activation, backend)


def gather_neurons(gate: Tensor, up: Tensor, down: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of some neurons, three [B, K, D] copies; see `sparse_ffn`. Of `down` it is the columns, as rows."""
    return gate[index], up[index], down.t()[index]


def gathered_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str | Callable[[Tensor], Tensor],
    backend: str = "auto",
) -> Tensor:
    """`sparse_ffn` on weights that `gather_neurons` copied, [B, K, D] each. x: [B, T, D] -> [B, T, D]."""
    if activation in ACTIVATIONS:
        few = x.shape[1] <= TOKENS and x.dtype != torch.float64
        return dispatch(gated_sum, backend if few or backend != "auto" else "torch", x, gate, up, down, activation)
    if backend == "triton" or not callable(activation):
        known = ", ".join(map(repr, ACTIVATIONS))
        raise InvalidValue(f"activation must be {known}, or for the torch backend a function; got {activation!r}")
    return _gated_sum(x, gate, up, down, activation)


@operation(lambda x, gate, up, down, activation: torch.empty_like(x, memory_format=torch.contiguous_format))
def gated_sum(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """`gathered_ffn` in plain torch, with a named activation."""
    return _gated_sum(x, gate, up, down, ACTIVATIONS[activation])


def _gated_sum(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    inner = activation(torch.bmm(x, gate.mT)) * torch.bmm(x, up.mT)  # [B, T, K]
    return torch.bmm(inner, down)
