"""The attention in which a tree of drafts is checked: handed down to decoder layers as a keyword, see engine/probe.py.

Behind a long cache transformers' own attention copies the keys of each head group once a head as soon as there is a
mask, and a tree needs one: a check of four tokens behind 16,000 columns took ten times as long as one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtok.kernels.tree_attention import tree_attention

SHORT = 512  # columns: a shorter cache is copied sooner than folded
BENT = ("softcap", "s_aux", "sinks")  # keywords of attentions that do more than a softmax over columns


@dataclass(frozen=True, eq=False)
class TreeAttention:
    """Stands in for a layer's attention, `forward`, where it is quicker and gives the same.

    tree: [N, N] bool, which of the new tokens see which. padded: whether a column of the cache may be padding.
    """

    tree: Tensor
    padded: bool

    def __call__(
        self,
        forward: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        n, groups = len(self.tree), key.shape[1]
        past, each = key.shape[2] - n, query.shape[1] // groups
        bent = args or any(kwargs.get(name) is not None for name in BENT)
        shared = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] == key.shape[2]
        if bent or not shared or past < SHORT or each == 1 or query.requires_grad:
            return forward(module, query, key, value, mask, *args, **kwargs)
        valid = None
        if self.padded:  # what the root sees of the cache: [B, 1 or H, L]
            valid = (mask[:, :, 0, :past] == 0).expand(key.shape[0], query.shape[1], -1)[:, ::each]
        scaling = kwargs.get("scaling")
        scaling = module.head_dim**-0.5 if scaling is None else scaling
        out = tree_attention(query, key, value, self.tree.to(key.device), scaling, valid)
        return out.transpose(1, 2).contiguous(), None
