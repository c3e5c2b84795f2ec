"""What compressors may read of the vision encoder, and how a family's tower shows it.

A compressor names it by a *need* and a *layer*; the needs are the methods of `Tower`. While a patched model encodes,
the engine collects what was asked for, and `VisualTokens.encoder` hands it on, [B, V, P, ...]: B pictures, their V
views in the order of the layout's planes, crops row-major and padding included, and the P patches of a view, those of
one token next to each other. Where a token is one patch they are in raster order.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import InvalidValue, Unsupported
from vtok.types import Layout
from vtok.vit import full

Layer = int | float | None
OF_PATCHES = frozenset({"encoder_keys", "encoder_attention", "encoder_states"})  # every tower has them
OF_CLS = frozenset({"cls_attention", "cls_probs"})  # only towers with a CLS token
NEEDS = OF_PATCHES | OF_CLS
ROWS = 1 << 25  # attention probabilities held at once while columns are summed


def layer_index(layer: int | float, n: int) -> int:
    """The index among `n` of an int, which may count from the end, or of a fraction: 0.0 the first, 1.0 the last."""
    index = layer if isinstance(layer, int) else math.floor(layer * (n - 1) + 0.5)
    if not -n <= index < n:
        raise InvalidValue(f"The vision encoder has layers 0 to {n - 1} (or {-n} to -1), not {layer}.")
    return index % n


@dataclass(frozen=True)
class Tower:
    """An encoder that sees views apart, hidden states [views, S, C], as CLIP and SigLIP do. Holds no module.

    skip: tokens before the patches: 1 where there is a CLS token, else 0.
    merge: side of the square of patches that becomes one token (pixel shuffle).
    features: which of the layers' hidden states, as transformers counts them, the projector reads.
    attention: the name of a layer's attention.
    """

    skip: int = 0
    merge: int = 1
    features: int = -1
    attention: str = "self_attn"

    # ---- where the projections are: what other towers override ---------------------------------------------------
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
        projected = layer_index(self.features, n + 1)
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


@dataclass(frozen=True)
class PackedTower(Tower):
    """An encoder that sees the frames of all pictures in one sequence, hidden states [S, C], the patches of a token
    next to each other, with a fused projection and rotary embedding: Qwen-VL's.

    window: side in tokens of the windows by which the tokens are ordered; 0 where they are in raster order.
    """

    window: int = 0

    def query(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        return attention.qkv(hidden).chunk(3, -1)[0]

    def key(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        return attention.qkv(hidden).chunk(3, -1)[1]

    def encoder_attention(self, attention: nn.Module, hidden: Tensor, **kwargs: Any) -> Tensor:
        """[S] fp32; in a layer with windows tokens get nothing from outside of theirs. Waits for the device once."""
        split = lambda x: x.unflatten(-1, (attention.num_heads, -1))  # [S, H, d]
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        query, key = (split(project(attention, hidden)) for project in (self.query, self.key))
        query, key = (x.float().transpose(0, 1) for x in rotate(query, key, *kwargs["position_embeddings"]))
        lengths = kwargs["cu_seqlens"].diff().tolist()
        parts = zip(query.split(lengths, 1), key.split(lengths, 1))
        return torch.cat([received(q, k, attention.head_dim**-0.5) for q, k in parts])

    def arrange(self, x: Tensor, layouts: Sequence[Layout]) -> tuple[Tensor, ...]:
        tokens = x.unflatten(0, (-1, self.merge**2))  # [tokens, m * m, ...]
        if self.window:
            tokens = tokens[window_order(layouts, self.window, x.device).argsort()]
        parts = tokens.split([layout.n for layout in layouts])
        return tuple(part.flatten(0, 1).unflatten(0, (len(y.planes), -1)) for part, y in zip(parts, layouts))


def window_order(layouts: Sequence[Layout], window: int, device: torch.device | None = None) -> Tensor:
    """[tokens] the token, counted in raster order over all frames, at each place of the encoder's sequence."""
    order, start = [], 0
    for plane in (plane for layout in layouts for plane in layout.planes):
        y = torch.arange(plane.rows, device=device) // window
        x = torch.arange(plane.cols, device=device) // window
        of_token = (y[:, None] * plane.cols + x).flatten()  # cols is at least the number of windows in a row
        order.append(start + of_token.argsort(stable=True))
        start += plane.size
    return torch.cat(order)


def _of_attention(function: Callable[..., Tensor], module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor:
    if not args:
        args, kwargs = (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}
    with torch.no_grad():
        return function(module, full(args[0]), **kwargs)


def _of_layer(function: Any, after: bool, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor:
    if not after:
        return function(args[0] if args else kwargs["hidden_states"])
    return function(output[0] if isinstance(output, tuple) else output)
