"""timm's vision transformers, alone or inside another model (open_clip's TimmModel, transformers' TimmWrapper)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok.errors import Unsupported
from vtok.tower import Parts, Tower

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


class TimmTower(Tower):
    kind: ClassVar[str] = "timm vision transformers"

    @classmethod
    def alone(cls, module: nn.Module) -> Tower | None:
        return cls(skip=module.num_prefix_tokens) if _is(module, 0) else None

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        return module.blocks

    def check(self, module: nn.Module, masks: bool) -> None:
        name = type(module).__name__
        for block in module.blocks:
            if not _is(block, 1):
                raise Unsupported(
                    f"The blocks of this {name} ({type(block).__name__}) are not an attention and then an MLP, each "
                    f"behind its own norm, so there is no place between the two at which to merge tokens."
                )
            if not hasattr(block.attn, "k_norm"):
                raise Unsupported(f"{type(block.attn).__name__} does not show its keys.")
            if masks and "attn_mask" not in inspect.signature(block.attn.forward).parameters:
                raise Unsupported('This timm has no attention masks: pip install "timm>=1.0.16".')
        if getattr(module, "rope", None) is not None:
            raise Unsupported(
                f"This {name} rotates its keys by their positions, and a merged token stands for several positions."
            )

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
