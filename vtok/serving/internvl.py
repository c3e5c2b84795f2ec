"""InternVL: tiles and a thumbnail, between marks of text; of a clip each frame is a picture of one tile.

vLLM's processor sees pictures one by one, so ours notes how the tiles of each lie; the model is told.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from vllm.model_executor.models import interns1 as vllm
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdateDetails
from vllm.tokenizers import cached_tokenizer_from_config

from vtok.adapters.internvl import tile_grid
from vtok.serving.processing import ReplacingProcessor, SaltedInfo
from vtok.serving.served import OneAxis, keep_rows, of_pictures, reading
from vtok.serving.settings import Settings
from vtok.types import Layout

GRIDS = "tile_grids"  # of pictures, (rows, cols) of their tiles


class Info(SaltedInfo, vllm.InternS1ProcessingInfo):
    dense = False  # within `get_image_size_with_most_features`

    def get_num_image_tokens(self, *, image_width: int, image_height: int, processor: Any, mm_kwargs: Any) -> int:
        config = self.get_hf_config()
        settings = Settings.of(config)
        if settings is None or self.dense:
            return super().get_num_image_tokens(
                image_width=image_width, image_height=image_height, processor=processor, mm_kwargs=mm_kwargs
            )
        pictures = processor.image_processor
        grid = (1, 1)
        if pictures.crop_to_patches:
            tile = pictures.size["height"], pictures.size["width"]
            most = pictures.min_patches, pictures.max_patches
            grid = get_optimal_tiled_canvas((image_height, image_width), tile, *most)[::-1]
        return settings.rows(settings.layouts(config, "image", {GRIDS: torch.tensor([grid])})[0])

    def get_image_size_with_most_features(self) -> Any:
        """Of the encoder: where a count is kept, all sizes have equally many placeholders."""
        self.dense = True
        try:
            return super().get_image_size_with_most_features()
        finally:
            self.dense = False

    def layouts(self, settings: Settings) -> list[Layout]:
        """Of pictures, the largest among them."""
        grids = [grid[::-1] for grid in self.resolve_target_ratios()]
        return settings.layouts(self.get_hf_config(), "image", {GRIDS: torch.tensor(grids)})


class Processor(ReplacingProcessor, vllm.InternS1MultiModalProcessor):
    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        made = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        config = self.info.get_hf_config()
        if (settings := Settings.of(config)) is not None and "image_num_patches" in made:
            tiles = made["pixel_values"].split(made["image_num_patches"].tolist())
            small = [settings.adapter.previews({"pixel_values": each}) for each in tiles]
            made[GRIDS] = torch.tensor([tile_grid(torch.stack(each)) for each in small])
        return made

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, GRIDS: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def replacement(self, settings: Settings, update: Any, i: int, item: Any) -> PromptUpdateDetails:
        """vLLM's own, with as many placeholders as tokens stay."""
        (placeholder,) = update.target
        runs = 1 if update.modality == "image" else int(item["video_num_patches"].data)
        kept = settings.kept_rows(self.info.get_hf_config(), update.modality, item) // runs
        made = list(cut_runs(update.replacement(i).full, placeholder, kept))
        return PromptUpdateDetails.select_token_id(made, placeholder)


def cut_runs(tokens: Iterable[int], which: int, kept: int) -> Iterable[int]:
    """The tokens, of which each run of `which` has only its first `kept`."""
    for token, run in groupby(tokens):
        yield from islice(run, kept if token == which else None)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=vllm.InternS1DummyInputsBuilder)
class InternVL(OneAxis, vllm.InternS1ForConditionalGeneration):
    stock = vllm.InternS1ForConditionalGeneration

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.tower = self.vtok.adapter.tower(self.config)
        vocabulary = cached_tokenizer_from_config(vllm_config.model_config).get_vocab()
        self.ids = [self.config.image_token_id, vocabulary["<video>"]]

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        grids, frames = kwargs.pop(GRIDS, None), kwargs.get("video_num_patches")
        if "pixel_values" not in kwargs and "pixel_values_videos" not in kwargs:  # made elsewhere
            return [self.finished(x, torch.arange(len(x))[None]) for x in super().embed_multimodal(**kwargs)]
        with reading(self.vtok.compressor, self.tower, self.tower.blocks(self.vision_tower)) as seen:
            rows = super().embed_multimodal(**kwargs)
        if grids is None:  # a clip: each frame is a picture
            rows = [frame for clip, n in zip(rows, frames.tolist()) for frame in clip.chunk(n)]
            grids = torch.ones(len(rows), 2).long()
        layouts = self.vtok.layouts(self.config, "image", {GRIDS: grids})
        kept = keep_rows(self.vtok, rows, layouts, of_pictures(seen, self.tower, layouts))
        made = [self.finished(x, at[None]) for x, at in kept]
        if frames is None:
            return made
        of_clips = iter(made)
        return [torch.cat(list(islice(of_clips, n))) for n in frames.tolist()]

    # ---- positions -------------------------------------------------------------------------------------------------
    def media_ids(self) -> list[int]:
        return self.ids

    def dense_rows(self, feature: Any) -> list[int]:
        data = feature.data or {}
        if f"{feature.modality}_embeds" in data:
            return [end - start + 1 for start, end in feature.mm_position.extract_embeds_range()]
        return [layout.n_rows for layout in self.vtok.layouts_of(self.config, feature.modality, data)]
