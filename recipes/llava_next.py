"""vtok-tiny-llava-next: a thumbnail and crops of one size, CLIP tower with CLS, unpadding, newline tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from recipes import recipe
from recipes.batches import Batch
from recipes.family import SPECIAL, Family, Plane, decoder, grouped, prepare
from recipes.items import Lexicon
from recipes.words import chatml, tokenizer
from vtok.eval.tasks.task import Item

VIEW, PATCH = 64, 8  # side of a view (thumbnail or crop) and of a patch, in pixels
GRID = VIEW // PATCH
PINPOINTS = [[64, 128], [128, 64], [64, 192], [192, 64], [128, 128]]  # (height, width)
LAYER = -2  # of the tower, whose patches the projector reads


@dataclass(frozen=True)
class Recipe(recipe.Recipe):
    tasks: Mapping[str, tuple[float, int]] = field(default_factory=lambda: {"scenes": (1.0, 2)})
    tower_steps: int = 4000
    steps: int = 6500
    parts: int = 4


class LlavaNext(Family):
    merge = 1
    image, video = "<image>\n", None

    def processor(self, lexicon: Lexicon) -> LlavaNextProcessor:
        template = chatml(self.image, "")
        special = (*SPECIAL, "<image>")
        end = {"end": "<|im_end|>", "pad": "<|endoftext|>"}
        tok = tokenizer(lexicon.words, special, **end, template=template, image_token="<image>")
        square = {"height": VIEW, "width": VIEW}
        pixels = {"size": square, "crop_size": square, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        images = LlavaNextImageProcessor(**pixels, image_grid_pinpoints=PINPOINTS)
        how = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaNextProcessor(images, tok, patch_size=PATCH, **how, chat_template=template)

    def model(self, tok, seed: int = 0) -> LlavaNextForConditionalGeneration:
        vision = {
            "model_type": "clip_vision_model",
            "hidden_size": 160,
            "intermediate_size": 640,
            "num_hidden_layers": 5,
            "num_attention_heads": 5,
            "image_size": VIEW,
            "patch_size": PATCH,
            "projection_dim": 160,
            "hidden_act": "gelu",
        }
        config = LlavaNextConfig(
            vision_config=vision,
            text_config=decoder(tok, model_type="llama"),
            image_token_index=tok.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=PINPOINTS,
            image_seq_length=GRID**2,
            vision_feature_layer=LAYER,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
        torch.manual_seed(seed)
        return prepare(LlavaNextForConditionalGeneration(config), tok, max_new_tokens=8)

    def tower(self, net):
        both = torch.nn.ModuleList([net.model.vision_tower, net.model.multi_modal_projector])
        both.newline = net.model.image_newline
        return both

    def planes(self, item: Item) -> list[Plane]:
        """Of each picture the thumbnail, then the crops, one after the other."""
        planes = []
        for n, image in enumerate(item.images):
            (width, height), (rows, columns) = image.size, _crops(image.size)
            planes.append(Plane(range(n, n + 1), GRID, GRID, (GRID / width, GRID / height), np.arange(GRID**2), False))
            fit = min(columns * VIEW / width, rows * VIEW / height)
            free = columns * VIEW - math.ceil(width * fit), rows * VIEW - math.ceil(height * fit)
            left, top = (max(0, side) // 2 / PATCH for side in free)
            rows, columns = rows * GRID, columns * GRID
            order = grouped(rows, columns, GRID)
            planes.append(Plane(range(n, n + 1), rows, columns, (fit / PATCH,) * 2, order, start=(left, top)))
        return planes

    def tokens(self, item: Item) -> np.ndarray:
        """The thumbnail, then the crops row by row, without their padding; a newline closes each row."""
        found, start = [], 0
        for image in item.images:
            rows, columns = _crops(image.size)
            lying = grouped(rows * GRID, columns * GRID, GRID).argsort() + start + GRID**2
            raster = torch.from_numpy(lying).view(1, rows * GRID, columns * GRID)
            raster = unpad_image(raster, image.size[::-1])[0].numpy()
            found += [np.arange(start, start + GRID**2), np.pad(raster, ((0, 0), (0, 1)), constant_values=-1).ravel()]
            start += GRID**2 * (1 + rows * columns)
        return np.concatenate(found)

    def tower_states(self, net, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = batch.media["image_sizes"]
        out = net.model.get_image_features(batch.media["pixel_values"], sizes, vision_feature_layer=LAYER)
        states = out.hidden_states[LAYER]
        return states[:, 1:].flatten(0, 1), torch.cat(list(out.pooler_output)), states[:, 0]


def _crops(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of crops of a picture of `size` (width, height)."""
    height, width = select_best_resolution(size[::-1], PINPOINTS)
    return height // VIEW, width // VIEW


FAMILY = LlavaNext()
