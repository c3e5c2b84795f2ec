"""Qwen2.5-VL: native resolution, windowed vision attention, 2x2 merger, M-RoPE; images and video."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vtok.adapter import Adapter, stretch
from vtok.tower import OF_PATCHES, PackedTower, Tower
from vtok.types import Layout, Plane


class Qwen25VLAdapter(Adapter):
    family = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    provides = frozenset({"attention"}) | OF_PATCHES
    encoders = {"image": "get_image_features", "video": "get_video_features"}
    projector = "visual.merger"

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
        output.pooler_output = stretch_frames(output.pooler_output, self.layouts(core, modality, arguments), views)
        return output, views

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        from vtok.adapters._tiny import qwen

        tok, size, text, ids = qwen(28, **options)
        processor = T.Qwen2_5_VLProcessor(
            T.Qwen2VLImageProcessor(size=dict(size)),
            tok,
            T.Qwen2VLVideoProcessor(size=dict(size)),
            chat_template=tok.chat_template,
        )
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
        config = T.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        return T.Qwen2_5_VLForConditionalGeneration(config), processor


def stretch_frames(
    features: Iterable[Tensor], layouts: list[Layout], views: list[tuple[int, int]]
) -> tuple[Tensor, ...]:
    """Features of small pictures or clips, each [frames * rows' * cols', D], repeated over the cells of their layouts:
    each [frames * rows * cols, D]. views: the (rows', cols') of each."""
    stretched = []
    for small, layout, view in zip(features, layouts, views):
        source = stretch(layout.planes[0], view).to(small.device)
        frames = small.view(len(layout.planes), view[0] * view[1], -1)  # [frames, small, D]
        stretched.append(frames[:, source].flatten(0, 1))
    return tuple(stretched)


def _resize(patches: Tensor, grid: tuple[int, int, int], size: tuple[int, int], config: Any) -> Tensor:
    """Resample flattened patches [t*h*w, C*temporal*patch*patch] of `grid` (t, h, w) to `size` (h', w') patches.

    The processor orders patches by merge block: (t, h/m, w/m, m, m)."""
    (t, h, w), m, p = grid, config.spatial_merge_size, config.patch_size
    channels, frames = config.in_channels, config.temporal_patch_size
    x = patches.view(t, h // m, w // m, m, m, channels, frames, p, p)
    x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * frames, channels, h * p, w * p)
    x = torch.nn.functional.interpolate(x.float(), size=(size[0] * p, size[1] * p), mode="bicubic", antialias=True).to(
        patches.dtype
    )
    h, w = size
    x = x.view(t, frames, channels, h // m, m, p, w // m, m, p).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, -1)
