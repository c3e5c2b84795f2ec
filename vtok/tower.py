"""What a vision encoder is: what compressors may read of it, its blocks and their parts, and its sizes.

A compressor names what it reads by a *need* and a *layer*; the needs are the methods of `Tower`. While a patched model
encodes, the engine collects what was asked for, and `VisualTokens.encoder` hands it on, [B, V, P, ...]: B pictures,
their V views in the order of the layout's planes, crops row-major and padding included, and the P patches of a view,
those of one token next to each other. Where a token is one patch they are in raster order.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok.engine.accounting import VisionShape
from vtok.engine.groups import full
from vtok.errors import InvalidValue, Unsupported
from vtok.types import Layout

Layer = int | float | None
OF_PATCHES = frozenset(
    {"encoder_keys", "encoder_mean_keys", "encoder_attention", "encoder_states"}
)  # every tower has them
OF_CLS = frozenset({"cls_attention", "cls_probs"})  # only towers with a CLS token
NEEDS = OF_PATCHES | OF_CLS
ROWS = 1 << 25  # attention probabilities held at once while columns are summed
_KINDS: list[type[Tower]] = []  # those that can be found alone


def layer_index(layer: int | float, n: int) -> int:
    """The index among `n` of an int, which may count from the end, or of a fraction: 0.0 the first, 1.0 the last."""
    index = layer if isinstance(layer, int) else math.floor(layer * (n - 1) + 0.5)
    if not -n <= index < n:
        raise InvalidValue(f"The vision encoder has layers 0 to {n - 1} (or {-n} to -1), not {layer}.")
    return index % n


@dataclass(frozen=True)
class Parts:
    """The modules of one block: two residual branches, attention, then an MLP that treats each token alone.

    first: is given the block's input. attention: is given what `first` made of it.
    key: a module, and a function of (it, its inputs, its output) -> [B, n, d], the mean over heads of the keys.
    second: is given the sum of input and attention. last: what it gives is added to that sum, scaled at most by channel
        or by view.
    """

    first: nn.Module
    attention: nn.Module
    key: tuple[nn.Module, Callable[[nn.Module, tuple, Any], Tensor]]
    second: nn.Module
    last: nn.Module


@dataclass(frozen=True)
class Tower:
    """An encoder that sees views apart, hidden states [views, S, C]. Holds no module, and is made of a config alone.

    A kind of tower is a subclass in a file of `adapters/`. An adapter makes it for a model of its family; `alone` makes
    it for a tower that is no part of one. This class itself describes one of which nothing can be read.

    skip: class and register tokens before the patches.
    merge: side of the square of patches that becomes one token (pixel shuffle).
    features: which of the layers' hidden states, as transformers counts them, the projector reads.
    width: C, 0 where it is not known.
    config: of the whole model, of which `shape` reads the sizes; None for a tower alone.
    """

    skip: int = 0
    merge: int = 1
    features: tuple[int, ...] = (-1,)
    width: int = 0
    config: Any = field(default=None, repr=False, compare=False)

    kind: ClassVar[str] = "vision towers of an unknown kind"
    attention: ClassVar[str] = "self_attn"  # the name of a layer's attention

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "alone" in cls.__dict__:
            _KINDS.append(cls)

    # ---- its modules -----------------------------------------------------------------------------------------------
    @classmethod
    def alone(cls, module: nn.Module) -> Tower | None:
        """The description of a module that is a whole tower of this kind, and can have compressors in its blocks."""
        return None

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """The layers of the tower `module`."""
        raise Unsupported(f"The layers of {self.kind} are not known.")

    def check(self, module: nn.Module, masks: bool) -> None:
        """Raise `Unsupported` for a tower whose blocks are not as `parts` describes them, or take no additive mask
        where the compressor `masks`."""

    def parts(self, block: nn.Module) -> Parts:
        raise Unsupported(f"Tokens cannot be merged in the blocks of {self.kind}.")

    def mask(self, kwargs: dict[str, Any], bias: Tensor) -> dict[str, Any]:
        """The keywords of the attention's call, with `bias` [B, n] added to the logits of each key."""
        if kwargs.get("attention_mask") is not None:
            raise Unsupported("A vision tower that is given an attention mask cannot merge tokens.")
        return {**kwargs, "attention_mask": bias[:, None, None]}

    def on_some(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], kept: Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        """Of a tower that takes a list of patches: the arguments of its call with which it runs on some of the cells
        alone, each of which becomes a token. kept: [cells] bool, of all pictures and frames in raster order."""
        raise Unsupported(f"{self.kind} take whole views, and no list of patches.")

    # ---- its sizes -------------------------------------------------------------------------------------------------
    def shape(self) -> VisionShape:
        """What its cost and its projector's depend on. Raises `Unsupported` where the config does not say it all."""
        raise Unsupported(f"FLOPs of {self.kind} cannot be counted.")

    # ---- where its projections are ---------------------------------------------------------------------------------
    def query(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        """[..., S, C] of the attention's input, heads next to each other, before any rotary embedding."""
        return attention.q_proj(hidden)

    def key(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        """[..., S, C], as `query`."""
        return attention.k_proj(hidden)

    # ---- the needs: of one call of a layer's attention, given its input ------------------------------------------
    def cls_attention(self, attention: nn.Module, hidden: Tensor, **kwargs: Any) -> Tensor:
        """[views, P] fp32, the head-mean of the CLS token's logits over the patches, before softmax.

        The mean over heads of q.k is one dot product over the whole width, so no head is split."""
        query = self.query(attention, hidden[:, :1]).float()  # [views, 1, C]
        key = self.key(attention, hidden[:, self.skip :]).float()  # [views, P, C]
        return (query @ key.transpose(1, 2)).squeeze(1) * (attention.head_dim**-0.5 / attention.num_heads)

    def cls_probs(self, attention: nn.Module, hidden: Tensor, **kwargs: Any) -> Tensor:
        """[views, P] fp32, the head-mean of the CLS token's attention; with what it gives to itself the sum is 1."""
        query = self._heads(attention, self.query(attention, hidden[:, :1]))  # [views, H, 1, d]
        key = self._heads(attention, self.key(attention, hidden))  # [views, H, S, d]
        rows = (query @ key.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1)
        return rows.mean(1).squeeze(1)[:, self.skip :]

    def encoder_keys(self, attention: nn.Module, hidden: Tensor, **kwargs: Any) -> Tensor:
        """[views, P, C] keys, heads next to each other, before any rotary embedding: equal patches have equal keys."""
        return self.key(attention, hidden[..., self.skip :, :])

    def encoder_mean_keys(self, attention: nn.Module, hidden: Tensor, **kwargs: Any) -> Tensor:
        """[views, P, d] fp32, the mean of `encoder_keys` over heads."""
        return self._heads(attention, self.key(attention, hidden[..., self.skip :, :])).mean(-3)

    def encoder_attention(self, attention: nn.Module, hidden: Tensor, **kwargs: Any) -> Tensor:
        """[views, P] fp32, the head-mean of the attention that each patch gets from all tokens of its view together: 1
        where it gets as much as it gives. What encoders without CLS have in its place."""
        query = self._heads(attention, self.query(attention, hidden))  # [views, H, S, d]
        key = self._heads(attention, self.key(attention, hidden))
        return received(query, key, attention.head_dim**-0.5)[:, self.skip :]

    def encoder_states(self, hidden: Tensor) -> Tensor:
        """[views, P, C] hidden states, as they are, so that gradient flows."""
        return hidden[..., self.skip :, :]

    # ---- the engine's side -----------------------------------------------------------------------------------------
    def probe(self, layers: Sequence[nn.Module], need: str, layer: Layer) -> tuple[nn.Module, Callable[..., Tensor]]:
        """The module whose calls show it, and a function of (module, args, kwargs, output) of a call that reads it.

        Of n layers there are n + 1 hidden states, the first going in: "encoder_states" counts them as transformers
        does, all else counts layers. None is the state that the projector reads, and the layer that makes it."""
        n = len(layers)
        if layer is None and len(self.features) > 1:
            raise Unsupported(
                f"The projector reads the encoder's states {self.features} together, so there is no one layer that it "
                f"reads: name a layer (an int, or a fraction of the depth)."
            )
        projected = layer_index(self.features[0], n + 1)
        if need == "encoder_states":
            state = projected if layer is None else layer_index(layer, n + 1)
            read = functools.partial(_of_layer, self.encoder_states, state > 0)
            return layers[max(state - 1, 0)], read
        index = max(projected - 1, 0) if layer is None else layer_index(layer, n)
        return getattr(layers[index], self.attention), functools.partial(_of_attention, getattr(self, need))

    def arrange(self, x: Tensor, layouts: Sequence[Layout]) -> tuple[Tensor, ...]:
        """What was read of all pictures of a call, [all views, P, ...] -> for each picture [V, P, ...]."""
        views = [sum(plane.views for plane in layout.planes) for layout in layouts]
        if len(x) != sum(views):
            raise Unsupported(f"The vision encoder saw {len(x)} views where {sum(views)} were expected.")
        if self.merge > 1:
            rows, cols = layouts[0].planes[0].view_shape
            x = x.unflatten(1, (rows, self.merge, cols, self.merge)).transpose(2, 3).flatten(1, 4)
        return x.split(views)

    def _heads(self, attention: nn.Module, x: Tensor) -> Tensor:
        """[..., S, C] -> [..., H, S, d] in fp32."""
        return x.float().unflatten(-1, (attention.num_heads, -1)).transpose(-3, -2)


def received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """[..., S] the attention that each token gets, the sum over queries of the head-mean; query, key [..., H, S, d]."""
    step = max(1, ROWS // key[..., 0].numel())
    sums = key.new_zeros(*key.shape[:-3], key.shape[-2])
    for rows in query.split(step, dim=-2):
        sums = sums + (rows @ key.transpose(-2, -1) * scaling).softmax(-1).sum(-2).mean(-2)
    return sums


def find(model: nn.Module) -> tuple[nn.Module, Tower] | None:
    """The vision tower in whose blocks compressors can act, inside `model` (or itself), and its description, or None.

    Raises `Unsupported` where there are several."""
    import vtok.adapters

    for module in pkgutil.iter_modules(vtok.adapters.__path__):
        importlib.import_module(f"vtok.adapters.{module.name}")
    found = [(module, tower) for module in model.modules() for kind in _KINDS if (tower := kind.alone(module))]
    if len(found) > 1:
        names = ", ".join(type(module).__name__ for module, _ in found)
        raise Unsupported(f"{type(model).__name__} holds {len(found)} vision towers ({names}): patch the one you mean.")
    return found[0] if found else None


def _of_attention(function: Callable[..., Tensor], module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor:
    if not args:
        args, kwargs = (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}
    with torch.no_grad():
        return function(module, full(args[0]), **kwargs)


def _of_layer(function: Any, after: bool, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor:
    if not after:
        return function(args[0] if args else kwargs["hidden_states"])
    return function(output[0] if isinstance(output, tuple) else output)
