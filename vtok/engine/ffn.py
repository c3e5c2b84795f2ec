"""The feed-forward network (FFN) of a decoder layer: its activations seen, and most of its neurons left out.

A gated FFN is `down(act(gate(x)) * up(x))`; what enters `down` are the activations of its neurons. The engine stands
in for the `forward` of those layers' `mlp` that a compressor asks about (`needs` "ffn"), and of no others. The pass
over the decoder reaches it through a keyword that the layer hands to its attention, which runs first: a replay under
gradient checkpointing goes the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vtok.errors import Unsupported
from vtok.kernels.sparse_ffn import gather_neurons, gathered_ffn

KEYWORD = "vtok_ffn"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# transformers' names of activations that are one function of torch, and the kernels' names of these
NAMES = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def activations(mlp: nn.Module, x: Tensor) -> Tensor:
    """[B, L, F] what enters `down_proj`, from x [B, L, D]."""
    return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)


@functools.cache
def _named() -> dict[type, str]:
    return {type(ACT2FN[theirs]): ours for theirs, ours in NAMES.items()}


def activation(mlp: nn.Module) -> str | Callable[[Tensor], Tensor]:
    """The name of an FFN's activation where the kernels have one for it, else the activation itself."""
    return _named().get(type(mlp.act_fn), mlp.act_fn)


def silence(values: Tensor, index: Tensor, where: Tensor) -> Tensor:
    """Activations [B, L, F] with 0 for the neurons outside `index` [B, K], in the tokens `where` [B, L or 1] bool."""
    core = torch.zeros_like(values[:, 0], dtype=torch.bool).scatter_(1, index, True)  # [B, F]
    return values.masked_fill(where[..., None] & ~core[:, None], 0.0)


@dataclass(frozen=True)
class Core:
    """Which neurons the text behind a prompt goes through. State of a sequence, so its cache holds it.

    index: layer -> [B, K] long, ascending; filled while the prompt passes. rows: [B] bool, the samples for which it
    holds; the others use all neurons. whole: whether it holds for all, known on the host.
    """

    rows: Tensor
    whole: bool
    index: dict[int, Tensor] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Core:
        """The same of other rows of the batch."""
        return Core(change(self.rows), self.whole, {layer: change(x) for layer, x in self.index.items()})

    def same(self, other: Core) -> bool:
        """Whether both have equal neurons. Waits for the device."""
        return all(torch.equal(x, y) for x, y in zip(self.index.values(), other.index.values()))

    def repeats(self) -> int:
        """r where the samples are groups of r neighbours with equal neurons (the beams of a prompt), else 1. Waits for
        the device."""
        pairs = [(x[1:] == x[:-1]).all(1).cpu() for x in self.index.values()]  # [B - 1] each
        starts = [0, *(i + 1 for i, equal in enumerate(torch.stack(pairs).all(0).tolist()) if not equal)]
        sizes = {end - start for start, end in zip(starts, [*starts[1:], len(self.rows)])}
        return sizes.pop() if len(sizes) == 1 else 1


class Copies:
    """The weights of a core's neurons, copied a layer at a time when first used; equal neighbours share theirs."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.repeats = core.repeats()
        self.weights: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, layer: int, mlp: nn.Module, x: Tensor) -> Tensor:
        """The layer's FFN of x [B, T, D] through the core alone."""
        if layer not in self.weights:
            parts = [getattr(mlp, name) for name in PROJECTIONS]
            if any(type(part) is not nn.Linear for part in parts):
                raise Unsupported("The FFN got adapters or other weights after vtok.patch. Unpatch, and patch again.")
            index = self.core.index[layer][:: self.repeats]
            with torch.no_grad():
                self.weights[layer] = gather_neurons(*(part.weight for part in parts), index)
        b, _, d = x.shape
        y = gathered_ffn(x.reshape(b // self.repeats, -1, d), *self.weights[layer], activation(mlp))
        return y.view(x.shape)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weights in self.weights.values() for weight in weights)


def check_all(layers: nn.ModuleList, method: str, copies: bool) -> None:
    """Raise `Unsupported` if the FFNs of these decoder layers are not ones that `method` can work with."""
    for layer in layers:
        check(layer, method, copies)
    check_formula(layers[0].mlp, method)


def check(layer: nn.Module, method: str, copies: bool) -> None:
    """Raise `Unsupported`, with the reason, if the FFN of a decoder layer is not one that `method` can work with.

    copies: whether weights of single neurons will be copied."""

    def refuse(reason: str) -> None:
        raise Unsupported(f"{method} works on bias-free gated FFNs (Llama, Mistral, Qwen2, Qwen3): {reason}")

    mlp = getattr(layer, "mlp", None)
    if hasattr(mlp, "experts"):
        refuse("this decoder is a mixture of experts, whose tokens each use other neurons.")
    if not hasattr(layer, "self_attn") or not all(hasattr(mlp, name) for name in (*PROJECTIONS, "act_fn")):
        refuse(f"{type(mlp).__name__} is no gate_proj, up_proj, down_proj and act_fn behind a self_attn.")
    for name in PROJECTIONS:
        part = getattr(mlp, name)
        base = getattr(part, "base_layer", part)  # below adapters of PEFT
        weight = getattr(base, "weight", None)
        if type(base) is not nn.Linear or type(weight) is not nn.Parameter or not weight.is_floating_point():
            kind = type(weight).__name__ if type(base) is nn.Linear else type(base).__name__
            advice = "Patch the model before it is sharded" if kind == "DTensor" else "Load the model in bf16 or fp16"
            refuse(f"{name} is quantised, sharded or of a kind of its own ({kind}). {advice}.")
        if base.bias is not None:
            refuse(f"{name} has a bias.")
        if weight.is_meta or weight.ndim != 2 or not weight.numel():
            refuse(f"the weights of {name} are not on a device (offloaded or sharded).")
        if copies and part is not base:
            refuse(
                f"{name} carries an adapter ({type(part).__module__.split('.')[0]}). Merge it into the weights first."
            )


def check_formula(mlp: nn.Module, method: str) -> None:
    """Raise `Unsupported` if an FFN that has the right parts makes something else of them."""
    weight = mlp.down_proj.weight
    x = torch.linspace(-1, 1, weight.shape[0], dtype=weight.dtype, device=weight.device)[None, None]
    devices = [weight.device] if weight.is_cuda else []
    results = []
    for forward in (mlp, lambda x: mlp.down_proj(activations(mlp, x))):
        with torch.no_grad(), torch.random.fork_rng(devices):  # adapters may have dropout: the same draw for both
            torch.manual_seed(0)
            results.append(forward(x))
    if not torch.equal(*results):
        raise Unsupported(f"{method} cannot work on {type(mlp).__name__}, which is not down(act(gate(x)) * up(x)).")


class Visit:
    """What goes through one layer's FFN in one forward. Stages look at `values`, and may change what comes out.

    x: [B, L, D], what enters. output: [B, L, D] where a stage has computed it by itself.
    """

    def __init__(self, layer: int, mlp: nn.Module, x: Tensor, dense: Callable[[Tensor], Tensor]) -> None:
        self.layer, self.mlp, self.x, self.dense = layer, mlp, x, dense
        self.output: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """[B, L, F] the activations."""
        if self._values is None:
            self._values = activations(self.mlp, self.x)
        return self._values

    @values.setter
    def values(self, values: Tensor) -> None:
        self._values = values

    def result(self) -> Tensor:
        """[B, L, D] what comes out."""
        if self.output is not None:
            return self.output
        return self.dense(self.x) if self._values is None else self.mlp.down_proj(self._values)
