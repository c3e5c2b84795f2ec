"""timm's vision transformers, alone or inside another model (open_clip's TimmModel, transformers' TimmWrapper)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import Unsupported
from vtok.vit import Parts, Vit

# module of timm -> its towers, and the blocks in which attention and MLP follow each other, each behind its norm
KNOWN = {
    "timm.models.vision_transformer": (("VisionTransformer",), ("Block",)),
    "timm.models.eva": (("Eva",), ("EvaBlock",)),
}


def _is(module: nn.Module, which: int) -> bool:
    """Whether a module is one of the towers (0) or of the blocks (1). A model of timm has imported timm, so that this
    need not."""
    return any(
        name in sys.modules and isinstance(module, tuple(getattr(sys.modules[name], cls) for cls in kinds[which]))
        for name, kinds in KNOWN.items()
    )


class TimmVit(Vit):
    family = "timm vision transformers"

    def owns(self, module: nn.Module) -> bool:
        return _is(module, 0)

    def check(self, tower: nn.Module, masks: bool) -> None:
        name = type(tower).__name__
        for block in tower.blocks:
            if not _is(block, 1):
                raise Unsupported(
                    f"The blocks of this {name} ({type(block).__name__}) are not an attention and then an MLP, each "
                    f"behind its own norm, so there is no place between the two at which to merge tokens."
                )
            if not hasattr(block.attn, "k_norm"):
                raise Unsupported(f"{type(block.attn).__name__} does not show its keys.")
            if masks and "attn_mask" not in inspect.signature(block.attn.forward).parameters:
                raise Unsupported('This timm has no attention masks: pip install "timm>=1.0.16".')
        if getattr(tower, "rope", None) is not None:
            raise Unsupported(
                f"This {name} rotates its keys by their positions, and a merged token stands for several positions."
            )

    def protected(self, tower: nn.Module) -> int:
        return tower.num_prefix_tokens

    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]:
        return tower.blocks

    def parts(self, block: nn.Module) -> Parts:
        # keys go through k_norm, an identity where there is no norm, in whichever way they were projected
        return Parts(block.norm1, block.attn, (block.attn.k_norm, _head_mean), block.norm2, block.mlp)

    def mask(self, kwargs: dict[str, Any], bias: Tensor) -> dict[str, Any]:
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise Unsupported("A vision tower that is given an attention mask cannot merge tokens.")
        return {**kwargs, "attn_mask": bias[:, None, None]}


def _head_mean(norm: nn.Module, inputs: tuple, keys: Tensor) -> Tensor:
    """[B, H, n, d] -> [B, n, d]."""
    return keys.mean(1, dtype=torch.float32)
