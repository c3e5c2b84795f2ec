"""vtok-tiny-qwen2.5-vl: native resolution, windowed attention, M-RoPE."""

from __future__ import annotations

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from recipes.batches import Batch
from recipes.family import SPECIAL, Family, Plane, decoder, grouped, prepare
from recipes.items import Lexicon
from recipes.recipe import Recipe
from recipes.words import chatml, tokenizer
from vtok.eval.tasks.task import Item

__all__ = ["FAMILY", "Recipe"]

PATCH, MERGE, FRAMES = 8, 2, 2  # pixels a patch, patches a token's side, frames a patch
WINDOW = 64  # pixels
# Temporal positions a second. With more, those of a clip at 4 frames a second lie beyond the end of a short question,
# and `generate` counts on from them, unlike a forward over question and answer.
PER_SECOND = 8
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


class Qwen(Family):
    merge = MERGE**2
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))

    def processor(self, lexicon: Lexicon) -> Qwen2_5_VLProcessor:
        template = chatml(self.image, self.video)
        tok = tokenizer(lexicon.words, (*SPECIAL, *VISION), end="<|im_end|>", pad="<|endoftext|>", template=template)
        pixels = {
            "size": {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 512**2},
            "patch_size": PATCH,
            "merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        images = Qwen2VLImageProcessor(**pixels)
        videos = Qwen2VLVideoProcessor(**pixels, cap_pixels_per_frame=True)
        return Qwen2_5_VLProcessor(images, tok, videos, chat_template=template)

    def model(self, tok, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
        named = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
        vision = {
            "depth": 6,
            "hidden_size": 160,
            "intermediate_size": 320,
            "num_heads": 5,
            "out_hidden_size": 192,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "tokens_per_second": PER_SECOND,
            "window_size": WINDOW,
            "fullatt_block_indexes": [2, 5],
        }
        # A small base: the sections for height and width must tell 16 rows and columns apart.
        rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [8, 12, 12]}
        config = Qwen2_5_VLConfig(
            text_config=decoder(tok, rope_parameters=rope),
            vision_config=vision,
            tie_word_embeddings=True,
            **{f"{key}_token_id": tok.convert_tokens_to_ids(f"<|{name}|>") for key, name in named.items()},
        )
        torch.manual_seed(seed)
        return prepare(Qwen2_5_VLForConditionalGeneration(config), tok, max_new_tokens=12)

    def tower(self, net):
        return net.model.visual

    def planes(self, item: Item) -> list[Plane]:
        """One a picture, or one for every FRAMES frames."""
        step = 1 if item.media == "image" else FRAMES
        planes = []
        for first in range(0, len(item.images), step):
            columns, rows = (side // PATCH for side in item.images[first].size)
            order = grouped(rows, columns, MERGE)
            planes.append(Plane(range(first, first + step), rows, columns, (1 / PATCH, 1 / PATCH), order))
        return planes

    def tower_states(self, net, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, None]:
        pixels, named = _media(batch)
        out = net.model.visual(pixels, grid_thw=batch.media[named])
        states = out.last_hidden_state.unflatten(0, (-1, MERGE**2))  # window by window
        return states[_windows(batch.media[named]).argsort()].flatten(0, 1), out.pooler_output, None

    def places(self, net, batch: Batch) -> torch.Tensor:
        _, named = _media(batch)
        seconds = batch.media.get("second_per_grid_ts")
        return net.model.get_rope_index(
            batch.prefix,
            batch.kinds,
            **{named: batch.media[named]},
            second_per_grid_ts=seconds,
            attention_mask=batch.there,
        )[0]


def _media(batch: Batch) -> tuple[torch.Tensor, str]:
    """Pixels of a batch, [S, pixels of a patch], and what the processor calls its grids."""
    if "pixel_values" in batch.media:
        return batch.media["pixel_values"], "image_grid_thw"
    return batch.media["pixel_values_videos"], "video_grid_thw"


def _windows(grids: torch.Tensor) -> torch.Tensor:
    """The tokens of all media in the order of the tower: window by window. At the edges these are smaller."""
    found, side, start = [], WINDOW // PATCH // MERGE, 0
    for t, height, width in grids.tolist():
        h, w = height // MERGE, width // MERGE
        index = torch.arange(start, start + t * h * w).view(t, h, w)
        start += t * h * w
        found += [part.ravel() for frame in index for rows in frame.split(side) for part in rows.split(side, dim=1)]
    return torch.cat(found)


FAMILY = Qwen()
