"""LLaVA-OneVision: LLaVA-NeXT's anyres with a limit on its tokens, a SigLIP tower, and video of pooled frames."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok.adapter import stretch
from vtok.adapters.llava_next import LlavaNextAdapter
from vtok.errors import Unsupported
from vtok.tower import OF_CLS
from vtok.types import Layout, Plane

LIMIT = "anyres_max_"  # and a number of views, whose tokens the crops may have together


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """The only picture of a sample is a thumbnail and crops, as in LLaVA-NeXT; the crops' features are resampled where
    they are many. One of several pictures (`batch_num_images`) is a single view with one newline behind it. A clip is
    its frames, each pooled to half the side, with one newline behind the last."""

    family = "llava_onevision"
    model_types = ("llava_onevision",)
    provides = LlavaNextAdapter.provides - OF_CLS - {"token_per_patch"}  # frames are pooled, crops resampled
    encoders = {"image": "get_image_features", "video": "get_video_features"}

    def check(self, config: Any) -> None:
        super().check(config)
        tower, limit = config.vision_config.model_type, config.vision_aspect_ratio
        if tower != "siglip_vision_model":
            raise Unsupported(f"{self.family} with a {tower} tower is not supported: SigLIP towers are.")
        if not limit.removeprefix(LIMIT).isdecimal() or not limit.startswith(LIMIT):
            raise Unsupported(f"vision_aspect_ratio must be {LIMIT} and a number, as in {LIMIT}9, got {limit!r}.")

    def layouts(self, config: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        side = self.side(config)
        if modality == "video":
            clips, frames = arguments["pixel_values_videos"].shape[:2]
            pooled = math.ceil(side / 2)
            frame = Plane(pooled, pooled, kind="frame", resampled=(side, side))
            return [Layout((frame,) * frames, modality="video", tail=1)] * clips
        anyres = super().layouts(config, modality, arguments)
        together = arguments.get("batch_num_images")
        together = [1] * len(anyres) if together is None else torch.as_tensor(together).tolist()
        alone = [n == 1 for n in together for _ in range(n)]
        limit = int((arguments.get("vision_aspect_ratio") or config.vision_aspect_ratio).removeprefix(LIMIT))
        single = Layout((Plane(side, side),), tail=1)
        return [limited(layout, limit) if cut else single for layout, cut in zip(anyres, alone)]

    def encode_small(
        self, core: nn.Module, modality: str, encode: Callable[..., Any], arguments: dict[str, Any], scale: float
    ) -> tuple[Any, list[tuple[int, int]]]:
        if modality == "image":
            return super().encode_small(core, modality, encode, arguments, scale)
        # A smaller frame is pooled on its own grid, and only then stretched.
        side, patch = self.side(core.config), core.config.vision_config.patch_size
        small = max(1, int(side * scale + 1e-6))
        pooled = math.ceil(side / 2)
        cells = max(1, pooled * small // side)
        source = stretch(Plane(pooled, pooled), (cells, cells))

        def pool(features: Tensor) -> Tensor:
            grid = features.transpose(1, 2).unflatten(2, (small, small))  # [frames, D, small, small]
            grid = torch.nn.functional.interpolate(grid, size=(cells, cells), mode="bilinear")
            return grid.flatten(2).transpose(1, 2)[:, source.to(features.device)]

        pixels = arguments["pixel_values_videos"]
        shrunk = torch.nn.functional.interpolate(
            pixels.flatten(0, 1).float(), size=small * patch, mode="bicubic", antialias=True
        ).to(pixels.dtype)
        shrunk = {"pixel_values_videos": shrunk.unflatten(0, pixels.shape[:2]), "interpolate_pos_encoding": True}
        core.apply_pooling = pool
        try:
            output = encode(**{**arguments, **shrunk})
        finally:
            del core.apply_pooling
        return output, [(small, small)] * len(pixels)

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        from vtok.adapters._tiny import LLAVA_TOKENS, text_decoder, tokenizer

        pinpoints = [[56, 56], [56, 112], [112, 56], [112, 112]]
        tok = tokenizer(LLAVA_TOKENS, image="<image>\n")
        size = {"height": 56, "width": 56}
        processor = T.LlavaOnevisionProcessor(
            T.LlavaOnevisionImageProcessor(size=dict(size), image_grid_pinpoints=pinpoints),
            tok,
            T.LlavaOnevisionVideoProcessor(size=dict(size)),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=f"{LIMIT}2",
            chat_template=tok.chat_template,
        )
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        }
        config = T.LlavaOnevisionConfig(
            vision_config=vision,
            text_config={"model_type": "qwen2", **text_decoder(tok, **options)},
            image_token_index=tok.convert_tokens_to_ids("<image>"),
            video_token_index=tok.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=pinpoints,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=f"{LIMIT}2",
        )
        return T.LlavaOnevisionForConditionalGeneration(config), processor


def limited(layout: Layout, views: int) -> Layout:
    """A thumbnail and crops of which the crops are resampled to the tokens of `views` views, where they have over 1.21
    times as many (1.1 a side). transformers' rule, and its floating-point arithmetic."""
    thumbnail, crops = layout.planes
    ratio = math.sqrt(crops.size / (views * thumbnail.size))
    if ratio <= 1.1:
        return layout
    rows, cols = int(crops.rows // ratio), int(crops.cols // ratio)
    return replace(layout, planes=(thumbnail, replace(crops, rows=rows, cols=cols, resampled=crops.span)))
