"""vtok-tiny-internvl: tiles of one size and a thumbnail, InternViT with CLS, 2 x 2 pixel shuffle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from recipes import recipe
from recipes.batches import Batch
from recipes.family import SPECIAL, Family, Plane, decoder, grouped, prepare
from recipes.items import Lexicon
from recipes.words import chatml, tokenizer
from vtok.eval.tasks.task import Item

TILE, PATCH, MERGE = 128, 8, 2  # pixels a tile, pixels a patch, patches a token's side
GRID = TILE // PATCH
TILES = 4  # of a picture, at most, without its thumbnail
FRAMES = 32  # of a clip, whose numbers are words
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


@dataclass(frozen=True)
class Recipe(recipe.Recipe):
    tasks: Mapping[str, tuple[float, int]] = field(
        default_factory=lambda: recipe.Recipe().tasks | {"video": (2.0, 2)}  # its clips are long
    )
    tower_tasks: Mapping[str, tuple[float, int]] = field(default_factory=lambda: {"text": (4.0, 8)})
    tower_steps: int = 600
    steps: int = 800
    start: str = "vtok-tiny-qwen2.5-vl"


class InternVL(Family):
    merge = MERGE**2
    tiles = TILES
    image, video = "<IMG_CONTEXT>\n", "<video>\n"

    def processor(self, lexicon: Lexicon) -> InternVLProcessor:
        template = chatml(self.image, self.video)
        words = (*lexicon.words, *(f"Frame{n + 1}" for n in range(FRAMES)), ":")
        special = (*SPECIAL, *TOKENS.values())
        tok = tokenizer(words, special, end="<|im_end|>", pad="<|endoftext|>", template=template, **TOKENS)
        pixels = {"size": {"height": TILE, "width": TILE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        images = GotOcr2ImageProcessor(**pixels, crop_to_patches=True, max_patches=self.tiles)
        videos = InternVLVideoProcessor(**pixels)
        return InternVLProcessor(images, tok, videos, image_seq_length=(GRID // MERGE) ** 2, chat_template=template)

    def model(self, tok, seed: int = 0) -> InternVLForConditionalGeneration:
        vision = {
            "num_hidden_layers": 6,
            "hidden_size": 160,
            "intermediate_size": 480,
            "num_attention_heads": 5,
            "attention_bias": True,
            "image_size": TILE,
            "patch_size": PATCH,
            "layer_scale_init_value": 1.0,  # the usual 0.1 is for towers of many layers
        }
        # the epsilon is that of the Qwen2.5-VL whose decoder it borrows
        text = decoder(tok, model_type="qwen2", rms_norm_eps=1e-5)
        config = InternVLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=tok.convert_tokens_to_ids(TOKENS["context_image_token"]),
            image_seq_length=(GRID // MERGE) ** 2,
            downsample_ratio=1 / MERGE,
            tie_word_embeddings=True,
        )
        torch.manual_seed(seed)
        net = InternVLForConditionalGeneration(config)
        # transformers starts them at 0, where all patches of a colour are one
        torch.nn.init.normal_(net.model.vision_tower.embeddings.position_embeddings, std=0.02)
        return prepare(net, tok, max_new_tokens=12)

    def tower(self, net):
        return torch.nn.ModuleList([net.model.vision_tower, net.model.multi_modal_projector])

    def planes(self, item: Item) -> list[Plane]:
        """Of a picture its tiles and, if they are several, its thumbnail; of a clip one a frame."""
        planes = []
        for n, image in enumerate(item.images):
            columns, rows = (1, 1)
            if item.media == "image":
                columns, rows = get_optimal_tiled_canvas(image.size[::-1], (TILE, TILE), 1, self.tiles)
            planes.append(_plane(n, image.size, rows, columns))
            if rows * columns > 1:
                planes.append(_plane(n, image.size, 1, 1, sharp=False))
        return planes

    def tower_states(self, net, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = net.model.get_image_features(batch.media["pixel_values"])
        cls, states = out.last_hidden_state[:, 0], out.last_hidden_state[:, 1:]
        order = torch.from_numpy(grouped(GRID, GRID, MERGE))
        return states[:, order].flatten(0, 1), out.pooler_output.flatten(0, 1), cls


def _plane(n: int, size: tuple[int, int], rows: int, columns: int, sharp: bool = True) -> Plane:
    """The patches of rows x columns tiles that picture or frame n, of `size` (width, height), is stretched over."""
    scale = columns * GRID / size[0], rows * GRID / size[1]
    tiles = grouped(rows * GRID, columns * GRID, GRID).reshape(-1, GRID**2)  # tile by tile, each in raster order
    order = tiles[:, grouped(GRID, GRID, MERGE)].ravel()
    return Plane(range(n, n + 1), rows * GRID, columns * GRID, scale, order, sharp)


FAMILY = InternVL()
