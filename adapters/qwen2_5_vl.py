"""Qwen2.5-VL: native resolution, windowed vision attention, 2x2 merger, M-RoPE; images and video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok.adapter import Adapter, modelling_file, stretch
from vtok.engine.accounting import VisionShape
from vtok.tower import OF_PATCHES, Tower, received
from vtok.types import Layout, Plane

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Qwen25VLAdapter(Adapter):
    family = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    provides = frozenset({"attention", "patch_list"}) | OF_PATCHES
    encoders = {"image": "get_image_features", "video": "get_video_features"}
    projector = "visual.merger"
    encoder = "visual"

    def layouts(self, config: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        merge = config.vision_config.spatial_merge_size
        grids = arguments["image_grid_thw" if modality == "image" else "video_grid_thw"].tolist()
        kind = "image" if modality == "image" else "frame"
        return [Layout((Plane(h // merge, w // merge, kind),) * t, modality=modality) for t, h, w in grids]

    def pixels(self, modality: str, arguments: dict[str, Any]) -> Tensor:
        return arguments[PIXELS[modality]]

    def tower(self, config: Any) -> QwenTower:
        vision = config.vision_config
        return QwenTower(
            merge=vision.spatial_merge_size,
            width=getattr(vision, "embed_dim", vision.hidden_size),  # Qwen2-VL's hidden_size is the decoder's
            config=config,
            window=getattr(vision, "window_size", 0) // vision.patch_size,  # Qwen2-VL and Qwen3-VL have none
        )

    def encode_small(
        self, core: nn.Module, modality: str, encode: Callable[..., Any], arguments: dict[str, Any], scale: float
    ) -> tuple[Any, list[tuple[int, int]]]:
        pixels_key = PIXELS[modality]
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
        layouts = self.layouts(core.config, modality, arguments)
        output.pooler_output = stretch_frames(output.pooler_output, layouts, views)
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


@dataclass(frozen=True)
class QwenTower(Tower):
    """An encoder that sees the frames of all pictures in one sequence, hidden states [S, C], the patches of a token
    next to each other, with a fused projection and rotary embedding.

    window: side in patches of the windows by which the tokens are ordered; 0 where they are in raster order.
    """

    window: int = 0

    kind: ClassVar[str] = "Qwen-VL's towers"
    attention: ClassVar[str] = "attn"

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        return module.blocks

    def shape(self) -> VisionShape:
        vision, wide = self.config.vision_config, self.width * self.merge**2
        full = getattr(vision, "fullatt_block_indexes", range(vision.depth))
        return VisionShape(
            layers=vision.depth,
            hidden=self.width,
            ffn=vision.intermediate_size if hasattr(vision, "intermediate_size") else self.width * vision.mlp_ratio,
            heads=vision.num_heads,
            ffn_matrices=3 if self.window else 2,  # Qwen2.5-VL's MLP is gated
            patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            cls_tokens=self.skip,
            merge=self.merge,
            projector=(wide, wide, self.config.get_text_config().hidden_size),
            full_layers=len(set(full)),
            window=self.window,
            projectors=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
        )

    def query(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        return attention.qkv(hidden).chunk(3, -1)[0]

    def key(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        return attention.qkv(hidden).chunk(3, -1)[1]

    def encoder_attention(self, attention: nn.Module, hidden: Tensor, **kwargs: Any) -> Tensor:
        """[S] fp32; in a layer with windows tokens get nothing from outside of theirs. Waits for the device once."""
        split = lambda x: x.unflatten(-1, (attention.num_heads, -1))  # [S, H, d]
        rotate = modelling_file(attention).apply_rotary_pos_emb_vision
        query, key = (split(project(attention, hidden)) for project in (self.query, self.key))
        query, key = (x.float().transpose(0, 1) for x in rotate(query, key, *kwargs["position_embeddings"]))
        lengths = kwargs["cu_seqlens"].diff().tolist()
        parts = zip(query.split(lengths, 1), key.split(lengths, 1))
        return torch.cat([received(q, k, attention.head_dim**-0.5) for q, k in parts])

    def on_some(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], kept: Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments with which the tower runs on the cells that are kept, each where it is."""
        from transformers import vision_utils

        given = dict(zip(("hidden_states", "grid_thw"), args)) | kwargs
        grid, area = given["grid_thw"], self.merge**2
        patches = kept.repeat_interleave(area).nonzero().squeeze(1)

        def cut(ends: Tensor, order: Tensor) -> Tensor:
            """Where sequences of patches end, of the cells in this order, among those that are left."""
            left = torch.nn.functional.pad((order * area).cumsum(0), (1, 0))
            return left[ends.long() // area].unique_consecutive().to(ends.dtype)

        told = {
            "hidden_states": given["hidden_states"][patches],
            "position_ids": vision_utils.get_vision_position_ids(grid, self.merge)[patches],
            "cu_seqlens": cut(vision_utils.get_vision_cu_seqlens(grid), kept),
        }
        if hasattr(module, "num_grid_per_side"):  # a table of positions, resampled to the grid
            how = module.interpolation_mode, module.interpolation_align_corners, self.merge
            found = vision_utils.get_vision_interpolation_indices_and_weights(grid, module.num_grid_per_side, *how)
            told |= zip(("interp_indices", "interp_weights"), (x[patches] for x in found))
        if self.window:
            how = self.merge, module.window_size, module.patch_size
            order, ends = vision_utils.get_vision_window_index(grid, *how)
            inside = kept[order.to(kept.device)]
            told["window_index"] = (kept.cumsum(0) - 1)[order.to(kept.device)[inside]]
            told["cu_window_seqlens"] = cut(ends, inside)
        return (), given | told

    def arrange(self, x: Tensor, layouts: Sequence[Layout]) -> tuple[Tensor, ...]:
        tokens = x.unflatten(0, (-1, self.merge**2))  # [tokens, m * m, ...]
        if self.window:
            tokens = tokens[window_order(layouts, self.window // self.merge, x.device).argsort()]
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
