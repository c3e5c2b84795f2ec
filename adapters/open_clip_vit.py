"""open_clip's own vision transformers. Its TimmModel holds one of timm's, see `timm_vit.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtok.errors import Unsupported
from vtok.tower import Parts, Tower

HOME = "open_clip.transformer"


class OpenClipTower(Tower):
    kind: ClassVar[str] = "open_clip vision transformers"

    @classmethod
    def alone(cls, module: nn.Module) -> Tower | None:
        whole = HOME in sys.modules and isinstance(module, sys.modules[HOME].VisionTransformer)
        return cls(skip=1) if whole else None

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        return module.transformer.resblocks

    def check(self, module: nn.Module, masks: bool) -> None:
        for block in self.blocks(module):
            if not isinstance(block.attn, nn.MultiheadAttention):
                raise Unsupported(
                    f"{type(block).__name__} of open_clip is not supported: blocks with torch's MultiheadAttention are."
                )
            if not block.attn.batch_first:
                raise Unsupported("open_clip towers with batch_first=False are not supported.")

    def parts(self, block: nn.Module) -> Parts:
        attention = block.attn
        return Parts(block.ln_1, attention, (attention, _head_mean), block.ln_2, block.mlp)

    def mask(self, kwargs: dict[str, Any], bias: Tensor) -> dict[str, Any]:
        if kwargs.get("attn_mask") is not None:
            raise Unsupported("A vision tower that is given an attention mask cannot merge tokens.")
        return {**kwargs, "key_padding_mask": bias}  # added to the logits, where it is no bool


def _head_mean(attention: nn.MultiheadAttention, inputs: tuple, output: Any) -> Tensor:
    """[B, n, d], projected again, as torch's attention does not show its keys: the mean over heads of the projections
    is the projection by the mean over heads of the weights, a matrix of one head's width."""
    width, heads = attention.embed_dim, attention.num_heads
    weight = attention.in_proj_weight[width : 2 * width].unflatten(0, (heads, -1)).mean(0)  # [d, C]
    bias = attention.in_proj_bias
    if bias is not None:
        bias = bias[width : 2 * width].unflatten(0, (heads, -1)).mean(0)
    return nn.functional.linear(inputs[0], weight, bias)
