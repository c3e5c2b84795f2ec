"""transformers' CLIP and SigLIP towers, alone or inside a larger model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import Unsupported
from vtok.vit import Parts, Vit

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # by model_type


class ClipTower(Vit):
    family = "clip and siglip towers"

    def owns(self, module: nn.Module) -> bool:
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        return model_type in CLASS_TOKENS and {"embeddings", "encoder"} <= module._modules.keys()

    def check(self, tower: nn.Module, masks: bool) -> None:
        implementation = tower.config._attn_implementation
        if masks and implementation not in ("sdpa", "eager"):
            raise Unsupported(
                f"{implementation} takes no additive mask. Load the vision tower with attn_implementation='sdpa' "
                f"(a dictionary sets it for each part of a model), or turn proportional attention off."
            )

    def protected(self, tower: nn.Module) -> int:
        return CLASS_TOKENS[tower.config.model_type]

    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]:
        return tower.encoder.layers

    def parts(self, block: nn.Module) -> Parts:
        attention = block.self_attn
        key = (attention.k_proj, partial(_head_mean, attention.num_heads))
        return Parts(block.layer_norm1, attention, key, block.layer_norm2, block.mlp)

    def mask(self, kwargs: dict[str, Any], bias: Tensor) -> dict[str, Any]:
        if kwargs.get("attention_mask") is not None:
            raise Unsupported("A vision tower that is given an attention mask cannot merge tokens.")
        return {**kwargs, "attention_mask": bias[:, None, None]}


def _head_mean(heads: int, projection: nn.Module, inputs: tuple, keys: Tensor) -> Tensor:
    """[B, n, H * d] -> [B, n, d]."""
    return keys.unflatten(-1, (heads, -1)).mean(-2, dtype=torch.float32)
