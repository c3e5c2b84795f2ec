"""InternVL: tiles of one picture and a thumbnail behind them, InternViT with a CLS token, 2x2 pixel shuffle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok.adapter import Adapter, Encoded, Placed, projected, shrink, stretch
from vtok.engine.accounting import VisionShape
from vtok.errors import Unsupported
from vtok.tower import OF_CLS, OF_PATCHES, Tower
from vtok.types import Layout, Plane

KIND = "internvl_vision"  # model_type of its tower
PREVIEW = 16  # side of the small pictures by which tiles are compared with their thumbnail


class InternVLAdapter(Adapter):
    """The model is given tiles alone. Those whose placeholders follow each other without a gap are one picture: its
    tiles in raster order and, where there are several, the thumbnail. In how many rows and columns they lie is not told
    either, but seen: the one arrangement that looks like the thumbnail.

    A clip's frames are pictures of one tile, as the prompt writes text between them: a count as `keep` is a count a
    frame."""

    family = "internvl"
    model_types = ("internvl",)
    provides = frozenset({"attention", "crops"}) | OF_PATCHES | OF_CLS

    def check(self, config: Any) -> None:
        if config.vision_feature_select_strategy != "default":
            raise Unsupported(
                f"{self.family} with vision_feature_select_strategy={config.vision_feature_select_strategy!r}: the "
                f"features must be the patches alone, so it needs 'default' (drop CLS)."
            )
        for size in (config.vision_config.image_size, config.vision_config.patch_size):
            if not isinstance(size, int) and len({*size}) > 1:
                raise Unsupported(f"{self.family} with tiles or patches that are not square is not supported.")
        if (1 / config.downsample_ratio) % 1:
            raise Unsupported(
                f"downsample_ratio must be 1 over a whole number, as in 0.5, got {config.downsample_ratio}."
            )

    def available(self, config: Any) -> frozenset[str]:
        known = config.vision_config.model_type == KIND
        return self.provides if known else self.provides - OF_PATCHES - OF_CLS

    def layouts(self, config: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """One a tile, until `join`; or, where `tile_grids` [n, 2] tells the (rows, cols) of n pictures' tiles, as an
        engine knows them that sees the pictures, one a picture of the config's size of tiles."""
        if (grids := arguments.get("tile_grids")) is not None:
            size = config.vision_config.image_size
            side = (size if isinstance(size, int) else size[0]) // self.unit(config)
            return [tiled(side, tuple(grid)) for grid in grids.tolist()]
        tiles, *_, width = arguments["pixel_values"].shape
        return [tiled(width // self.unit(config), (1, 1))] * tiles

    def unit(self, config: Any) -> int:
        """Side of a visual token in pixels."""
        patch = config.vision_config.patch_size
        return (patch if isinstance(patch, int) else patch[0]) * merge(config)

    def previews(self, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        pixels = arguments["pixel_values"].float()
        return tuple(torch.nn.functional.adaptive_avg_pool2d(pixels, PREVIEW))

    def pictures(self, encoded: Encoded, placed: Placed) -> Iterator[tuple[list[int], tuple[int, int]]]:
        """Of each picture its views and, where there are several, the (rows, cols) of all but the last."""
        tiles = torch.stack(encoded.previews).cpu()  # [V, 3, PREVIEW, PREVIEW]
        for views in placed.unbroken():
            yield views, tile_grid(tiles[views])

    def join(self, encoded: Encoded, placed: Placed) -> Encoded:
        layouts, small, sources, probed = [], [], [], []
        for views, grid in self.pictures(encoded, placed):
            layout = tiled(encoded.layouts[views[0]].planes[0].rows, grid)
            layouts.append(layout)
            if encoded.small is not None:
                less, source = shrink(layout, encoded.small[views[0]].planes[0].view_shape)
                small.append(less)
                sources.append(source)
            if encoded.probed is not None:
                keys = encoded.probed[views[0]]
                probed.append({key: torch.cat([encoded.probed[view][key] for view in views]) for key in keys})
        optional = (tuple(items) if items else None for items in (small, sources, probed))
        return Encoded(encoded.modality, tuple(layouts), *optional)

    def tower(self, config: Any) -> Tower:
        vision = config.vision_config
        kind = InternViT if vision.model_type == KIND else Tower
        return kind(1, merge(config), projected(config), vision.hidden_size, config)

    def encode_small(
        self, core: nn.Module, modality: str, encode: Callable[..., Any], arguments: dict[str, Any], scale: float
    ) -> tuple[Any, list[tuple[int, int]]]:
        pixels, unit = arguments["pixel_values"], self.unit(core.config)
        side = pixels.shape[-1] // unit
        small = max(1, int(side * scale + 1e-6))
        pixels = torch.nn.functional.interpolate(pixels.float(), size=small * unit, mode="bicubic", antialias=True).to(
            pixels.dtype
        )
        output = encode(**{**arguments, "pixel_values": pixels})
        source = stretch(Plane(side, side), (small, small)).to(output.pooler_output.device)
        output.pooler_output = output.pooler_output[:, source]
        return output, [(small, small)] * len(pixels)

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        from vtok.adapters._tiny import INTERNVL_TOKENS, text_decoder, tokenizer

        tok = tokenizer(
            INTERNVL_TOKENS,
            image="<IMG_CONTEXT>\n",
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        )
        size = {"height": 56, "width": 56}
        processor = T.InternVLProcessor(
            T.GotOcr2ImageProcessor(size=dict(size), max_patches=4),
            tok,
            T.InternVLVideoProcessor(size=dict(size)),
            image_seq_length=16,
            chat_template=tok.chat_template,
        )
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [56, 56],
            "patch_size": [7, 7],
        }
        config = T.InternVLConfig(
            vision_config=vision,
            text_config={"model_type": "qwen2", **text_decoder(tok, **options)},
            image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=16,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )
        return T.InternVLForConditionalGeneration(config), processor


class InternViT(Tower):
    """With norms over the whole width of queries and keys, in the large one; in the small one transformers has an
    identity there, and vLLM nothing."""

    kind: ClassVar[str] = "InternViT"
    attention: ClassVar[str] = "attention"

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        return module.encoder.layer

    def query(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        return getattr(attention, "q_norm", nn.Identity())(attention.q_proj(hidden))

    def key(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        return getattr(attention, "k_norm", nn.Identity())(attention.k_proj(hidden))

    def shape(self) -> VisionShape:
        return VisionShape.plain(self.config, self.skip, self.merge)


def merge(config: Any) -> int:
    """Side, in patches, of the square that becomes one visual token."""
    return round(1 / config.downsample_ratio)


def tiled(side: int, grid: tuple[int, int]) -> Layout:
    """The layout of a picture cut into `grid` (rows, cols) tiles of side x side tokens, and a thumbnail behind them; of
    one tile there is no thumbnail."""
    rows, cols = grid
    if rows * cols == 1:
        return Layout((Plane(side, side),))
    crops = Plane(rows * side, cols * side, kind="crops", crop_grid=grid, crop_shape=(side, side), tiled=True)
    return Layout((crops, Plane(side, side, kind="thumbnail")))


def tile_grid(previews: Tensor) -> tuple[int, int]:
    """The (rows, cols) in which the tiles of one picture lie, given its `previews` [V, 3, s, s], the thumbnail last."""
    *crops, thumbnail = previews
    return arrangement(torch.stack(crops), thumbnail) if crops else (1, 1)


def arrangement(tiles: Tensor, thumbnail: Tensor) -> tuple[int, int]:
    """The (rows, cols) in which `tiles` [T, C, s, s], row by row, look most like `thumbnail` [C, s, s].

    By mean squared difference, the mosaic averaged down to s x s. Where it does not matter, a picture of one colour,
    the squarest."""
    n, channels, side, _ = tiles.shape
    grids = sorted(
        ((rows, n // rows) for rows in range(1, n + 1) if n % rows == 0), key=lambda grid: abs(grid[0] - grid[1])
    )

    def difference(grid: tuple[int, int]) -> float:
        mosaic = tiles.unflatten(0, grid).permute(2, 0, 3, 1, 4).reshape(channels, grid[0] * side, grid[1] * side)
        return (torch.nn.functional.adaptive_avg_pool2d(mosaic, side) - thumbnail).square().mean().item()

    return min(grids, key=difference)
