"""transformers' CLIP and SigLIP towers, alone or inside a larger model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtok.engine.accounting import VisionShape
from vtok.errors import Unsupported
from vtok.tower import Parts, Tower

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # by model_type


class ClipTower(Tower):
    kind: ClassVar[str] = "clip and siglip towers"

    @classmethod
    def alone(cls, module: nn.Module) -> Tower | None:
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        whole = model_type in CLASS_TOKENS and {"embeddings", "encoder"} <= module._modules.keys()
        return cls(skip=CLASS_TOKENS[model_type], width=module.config.hidden_size) if whole else None

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        return getattr(module, "vision_model", module).encoder.layers

    def check(self, module: nn.Module, masks: bool) -> None:
        implementation = module.config._attn_implementation
        if masks and implementation not in ("sdpa", "eager"):
            raise Unsupported(
                f"{implementation} takes no additive mask. Load the vision tower with attn_implementation='sdpa' "
                f"(a dictionary sets it for each part of a model), or turn proportional attention off."
            )

    def parts(self, block: nn.Module) -> Parts:
        attention = block.self_attn
        key = (attention.k_proj, partial(_head_mean, attention.num_heads))
        return Parts(block.layer_norm1, attention, key, block.layer_norm2, block.mlp)

    def shape(self) -> VisionShape:
        return VisionShape.plain(self.config, self.skip, levels=len(self.features))


def _head_mean(heads: int, projection: nn.Module, inputs: tuple, keys: Tensor) -> Tensor:
    """[B, n, H * d] -> [B, n, d]."""
    return keys.unflatten(-1, (heads, -1)).mean(-2, dtype=torch.float32)
