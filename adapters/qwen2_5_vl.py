"""Qwen2.5-VL: native resolution, windowed vision attention, 2x2 merger, M-RoPE; images and video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtok.adapter import Adapter, stretch
from vtok.selection import Layout, Plane
from vtok.tower import OF_PATCHES, PackedTower, Tower


class Qwen25VLAdapter(Adapter):
    family = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    provides = frozenset({"attention"}) | OF_PATCHES
    encoders = {"image": "get_image_features", "video": "get_video_features"}
    default = {"method": "aim_merge", "keep": 0.25}

    def layouts(self, core: nn.Module, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        merge = core.config.vision_config.spatial_merge_size
        grids = arguments["image_grid_thw" if modality == "image" else "video_grid_thw"].tolist()
        kind = "image" if modality == "image" else "frame"
        return [Layout((Plane(h // merge, w // merge, kind),) * t, modality=modality) for t, h, w in grids]

    def tower(self, core: nn.Module) -> Tower:
        config = core.config.vision_config
        window = getattr(config, "window_size", 0)  # Qwen2-VL and Qwen3-VL have none
        merge = config.spatial_merge_size
        return PackedTower(merge=merge, attention="attn", window=window // merge // config.patch_size)

    def encoder_layers(self, core: nn.Module) -> nn.ModuleList:
        return core.visual.blocks

    def encode_small(
        self, core: nn.Module, modality: str, encode: Callable[..., Any], arguments: dict[str, Any], scale: float
    ) -> tuple[Any, list[tuple[int, int]]]:
        pixels_key = "pixel_values" if modality == "image" else "pixel_values_videos"
        grid_key = "image_grid_thw" if modality == "image" else "video_grid_thw"
        config = core.config.vision_config
        pixels, grid, merge = arguments[pixels_key], arguments[grid_key], config.spatial_merge_size
        pieces, grids, views = [], [], []
        for piece, (t, h, w) in zip(pixels.split(grid.prod(-1).tolist()), grid.tolist()):
            view = tuple(max(1, int(side // merge * scale + 1e-6)) for side in (h, w))
            pieces.append(_resize(piece, (t, h, w), (view[0] * merge, view[1] * merge), config))
            grids.append((t, view[0] * merge, view[1] * merge))
            views.append(view)
        small = {pixels_key: torch.cat(pieces), grid_key: grid.new_tensor(grids)}
        output = encode(**{**arguments, **small})
        stretched = []
        for features, layout, view in zip(output.pooler_output, self.layouts(core, modality, arguments), views):
            source = stretch(layout.planes[0], view).to(features.device)
            frames = features.view(len(layout.planes), view[0] * view[1], -1)  # [T, small, D]
            stretched.append(frames[:, source].flatten(0, 1))
        output.pooler_output = tuple(stretched)
        return output, views

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        from vtok.adapters._tiny import QWEN_TOKENS, text_decoder, tokenizer

        tok = tokenizer(
            QWEN_TOKENS,
            image="<|vision_start|><|image_pad|><|vision_end|>",
            video="<|vision_start|><|video_pad|><|vision_end|>",
        )
        size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
        processor = T.Qwen2_5_VLProcessor(
            T.Qwen2VLImageProcessor(size=dict(size)),
            tok,
            T.Qwen2VLVideoProcessor(size=dict(size)),
            chat_template=tok.chat_template,
        )
        text = text_decoder(tok, **options)
        half = text["hidden_size"] // text["num_attention_heads"] // 2
        mrope = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope}
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        }
        names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
        ids = {f"{key}_token_id": tok.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
        config = T.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        return T.Qwen2_5_VLForConditionalGeneration(config), processor


def _resize(patches: Tensor, grid: tuple[int, int, int], size: tuple[int, int], config: Any) -> Tensor:
    """Resample flattened patches [t*h*w, C*temporal*patch*patch] of `grid` (t, h, w) to `size` (h', w') patches.

    The processor orders patches by merge block: (t, h/m, w/m, m, m)."""
    (t, h, w), m, p = grid, config.spatial_merge_size, config.patch_size
    channels, frames = config.in_channels, config.temporal_patch_size
    x = patches.view(t, h // m, w // m, m, m, channels, frames, p, p)
    x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * frames, channels, h * p, w * p)
    x = torch.nn.functional.interpolate(
        x.float(), size=(size[0] * p, size[1] * p), mode="bicubic", antialias=True
    ).to(patches.dtype)
    h, w = size
    x = x.view(t, frames, channels, h // m, m, p, w // m, m, p).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, -1)
