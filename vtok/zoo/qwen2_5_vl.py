"""vtok-tiny-qwen2.5-vl: native resolution, windowed attention, M-RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vtok.eval.tasks.task import Item
from vtok.zoo import recipe
from vtok.zoo.architecture import prepare
from vtok.zoo.items import Lexicon
from vtok.zoo.loop import DTYPE
from vtok.zoo.packed import attend
from vtok.zoo.recipe import SPECIAL, Batch, Family, Plane, Recipe, grouped
from vtok.zoo.words import chatml, tokenizer

__all__ = ["FAMILY", "Recipe", "train"]

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
        ids = {"bos_token_id": None, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
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
        text = {
            "vocab_size": -(-len(tok) // 64) * 64,
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            # A small base: the sections for height and width must tell 16 rows and columns apart.
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [8, 12, 12]},
            **ids,
        }
        config = Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=True,
            **{f"{key}_token_id": tok.convert_tokens_to_ids(f"<|{name}|>") for key, name in named.items()},
        )
        torch.manual_seed(seed)
        return prepare(Qwen2_5_VLForConditionalGeneration(config), ids, max_new_tokens=12)

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
        """What the tower computes, without its loop over windows."""
        visual, (pixels, named) = net.model.visual, _media(batch)
        grids = [tuple(grid) for grid in batch.media[named].tolist()]
        cuts = [_windows(grid) for grid in grids]
        before = np.cumsum([0] + [len(order) for order, _ in cuts])
        order = torch.cat([torch.tensor(cut) + int(n) for (cut, _), n in zip(cuts, before)])  # of tokens
        windows = _chunks([n * MERGE**2 for _, lengths in cuts for n in lengths])
        frames = _chunks([h * w for t, h, w in grids for _ in range(t)])
        places = []
        for t, h, w in grids:
            raster = torch.from_numpy(grouped(h, w, MERGE)).repeat(t)
            places.append(torch.stack([raster // w, raster % w], dim=-1))
        places = torch.cat(places).unflatten(0, (-1, MERGE**2))[order].flatten(0, 1)  # [S, 2]
        cos, sin = (table.to(DTYPE)[:, None, None] for table in visual.rotary_pos_emb(pixels, places))
        x = F.linear(
            pixels.unflatten(0, (-1, MERGE**2))[order].flatten(0, 1), visual.patch_embed.proj.weight.flatten(1)
        )
        for n, block in enumerate(visual.blocks):
            chunks = frames if n in visual.fullatt_block_indexes else windows
            x = x + _chunk_attention(block.attn, block.norm1(x), (cos, sin), chunks)
            x = x + block.mlp(block.norm2(x))
        back = order.argsort()
        return x.unflatten(0, (-1, MERGE**2))[back].flatten(0, 1), visual.merger(x)[back], None

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


@cache
def _windows(grid: tuple[int, int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of a medium window by window, and how many each window has. At the edges they are smaller."""
    t, h, w = grid[0], grid[1] // MERGE, grid[2] // MERGE
    index, side = np.arange(t * h * w).reshape(t, h, w), WINDOW // PATCH // MERGE
    cut = [
        index[f, y : y + side, x : x + side].ravel()
        for f in range(t)
        for y in range(0, h, side)
        for x in range(0, w, side)
    ]
    return tuple(np.concatenate(cut).tolist()), tuple(map(len, cut))


def _chunks(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of chunks that lie one after the other: their places [C, L], and what masks the filling, or None."""
    sizes = torch.tensor(lengths)
    starts, places = sizes.cumsum(0) - sizes, torch.arange(max(lengths))
    filled = places < sizes[:, None]
    mask = torch.zeros(filled.shape, dtype=DTYPE).masked_fill(~filled, float("-inf"))[:, None, None]
    return (starts[:, None] + places).where(filled, starts[:, None]), None if filled.all() else mask


def _chunk_attention(attention, x, rotary, chunks):
    """Attention of a vision block within chunks, [S, D] -> [S, D]."""
    index, mask = chunks
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))  # [S, 3, H, d]
    cos, sin = rotary
    half = qkv.shape[-1] // 2
    turned = qkv[:, :2] * cos + torch.cat([-qkv[:, :2, :, half:], qkv[:, :2, :, :half]], dim=-1) * sin
    q, k, v = turned[:, 0] * attention.scaling, turned[:, 1], qkv[:, 2]  # [S, H, d]
    if mask is None:
        q, k, v = (part.unflatten(0, index.shape).transpose(1, 2) for part in (q, k, v))  # [C, H, L, d]
        return attention.proj(attend(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    q, k, v = (part.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2) for part in (q, k, v))
    out = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # [C, L, D]
    return attention.proj(out[(mask == 0)[:, 0, 0]])


FAMILY = Qwen()
train = partial(recipe.train, FAMILY)
