"""LLaVA-NeXT: a thumbnail and crops of one picture (anyres), padding cut away, a newline token after each row."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtok.adapters.llava import LlavaAdapter
from vtok.types import Layout, Plane


class LlavaNextAdapter(LlavaAdapter):
    family = "llava_next"
    model_types = ("llava_next",)
    provides = LlavaAdapter.provides | {"crops"}

    def layouts(self, config: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        from transformers.image_processing_utils import select_best_resolution

        side, view = self.side(config), config.vision_config.image_size
        result = []
        for size in arguments["image_sizes"].tolist():
            height, width = select_best_resolution(size, config.image_grid_pinpoints)
            result.append(anyres_layout(side, (height // view, width // view), tuple(size)))
        return result

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        from vtok.adapters._tiny import LLAVA_TOKENS, clip_tower, text_decoder, tokenizer

        pinpoints = [[56, 112], [112, 56], [112, 112]]
        tok = tokenizer(LLAVA_TOKENS, image="<image>\n")
        processor = T.LlavaNextProcessor(
            T.LlavaNextImageProcessor(
                size={"shortest_edge": 56},
                crop_size={"height": 56, "width": 56},
                image_grid_pinpoints=pinpoints,
            ),
            tok,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tok.chat_template,
        )
        config = T.LlavaNextConfig(
            vision_config=clip_tower(),
            text_config={"model_type": "llama", **text_decoder(tok, **options)},
            image_token_index=tok.convert_tokens_to_ids("<image>"),
            image_seq_length=16,
            image_grid_pinpoints=pinpoints,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        return T.LlavaNextForConditionalGeneration(config), processor


def anyres_layout(side: int, grid: tuple[int, int], size: tuple[int, int]) -> Layout:
    """The layout of a picture of `size` (height, width) cut into `grid` (rows, cols) crops of side x side patches.

    The rule by which transformers cuts padding away: the picture is centred on the mosaic with its aspect kept, and
    the same number of padding rows (or columns) goes on both sides."""
    rows, cols = grid[0] * side, grid[1] * side
    height, width = size
    top = left = 0
    if width / height > cols / rows:
        top = (rows - int(round(height * (cols / width), 7))) // 2
    else:
        left = (cols - int(round(width * (rows / height), 7))) // 2
    crops = Plane(
        rows - 2 * top,
        cols - 2 * left,
        kind="crops",
        crop_grid=grid,
        crop_shape=(side, side),
        offset=(top, left),
    )
    return Layout((Plane(side, side, kind="thumbnail"), crops), separators=(0, 1))
