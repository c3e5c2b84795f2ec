"""Qwen2-VL and Qwen2.5-VL, pictures and clips. M-RoPE: three positions a token."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import PlaceholderRange

from vtok.serving.positions import Run, base_of, dense_prompt
from vtok.serving.processing import ReplacingProcessor, SaltedInfo
from vtok.serving.served import Served, keep_rows
from vtok.serving.settings import Settings
from vtok.types import Layout


class InfoOfQwen(SaltedInfo):
    """How many placeholders a picture has, wherever vLLM reckons with them."""

    dense = False  # within `_get_max_video_frames`

    def _get_vision_info(self, **kwargs: Any) -> tuple[Any, int]:
        size, n = super()._get_vision_info(**kwargs)
        config = self.get_hf_config()
        settings = Settings.of(config)
        if settings is None or self.dense:
            return size, n
        vision, modality = config.vision_config, kwargs.get("modality") or "image"
        frames = n * (vision.patch_size * vision.spatial_merge_size) ** 2 // (size.height * size.width)
        return size, settings.rows(layout_of(settings, config, modality, frames, size))

    def _get_max_video_frames(self, *args: Any, **kwargs: Any) -> int:
        """It adds frames until a clip has too many tokens: never, where a count is kept."""
        self.dense = True
        try:
            return super()._get_max_video_frames(*args, **kwargs)
        finally:
            self.dense = False

    def layouts(self, settings: Settings) -> list[Layout]:
        """Of the largest picture."""
        return [layout_of(settings, self.get_hf_config(), "image", 1, self.get_image_size_with_most_features())]


def layout_of(settings: Settings, config: Any, modality: str, frames: int, size: Any) -> Layout:
    """Of a picture or clip of a size in pixels that vLLM has fitted to the patches."""
    patch = config.vision_config.patch_size
    grid = torch.tensor([[frames, size.height // patch, size.width // patch]])
    return settings.layouts(config, modality, {f"{modality}_grid_thw": grid})[0]


class ProcessorOfQwen(ReplacingProcessor):
    """As many placeholders as tokens stay."""

    def replacement(self, settings: Settings, update: Any, i: int, item: Any) -> list[int]:
        config, modality = self.info.get_hf_config(), update.modality
        count = settings.kept_rows(config, modality, item) + self.between(modality, item)
        return [getattr(config, f"{modality}_token_id")] * count

    def between(self, modality: str, item: Any) -> int:
        """How many tokens of text stand between the placeholders of a picture or clip."""
        return 0


class ServedQwen(Served):
    def get_encoder_cudagraph_config(self) -> Any:
        return dataclasses.replace(super().get_encoder_cudagraph_config(), modalities=[])  # they bypass what follows

    def _process_image_input(self, image_input: Any) -> tuple[Tensor, ...]:
        return self.compressed("image", super()._process_image_input(image_input), image_input)

    def _process_video_input(self, video_input: Any) -> tuple[Tensor, ...]:
        return self.compressed("video", super()._process_video_input(video_input), video_input)

    def _postprocess_image_embeds_evs(self, rows: tuple[Tensor, ...], image_input: Any) -> tuple[Tensor, ...]:
        return rows  # vLLM's own way of dropping tokens, which our gate would open

    def _postprocess_video_embeds_evs(self, rows: tuple[Tensor, ...], video_input: Any) -> tuple[Tensor, ...]:
        return rows

    def compressed(self, modality: str, rows: tuple[Tensor, ...], given: Any) -> tuple[Tensor, ...]:
        """Of each picture or clip the rows that stay. given: vLLM's inputs of the encoder, with their grids."""
        grids = given[f"{modality}_grid_thw"]
        if given["type"].endswith("embeds"):  # made elsewhere, and so as many as there are placeholders
            kept = [(x, torch.arange(len(x))) for x in rows]
        else:
            layouts = self.vtok.layouts(self.config, modality, {f"{modality}_grid_thw": grids})
            kept = keep_rows(self.vtok, rows, layouts, features=self.features)
        stand = self.clip if modality == "video" else self.picture
        return tuple(self.finished(*stand(given, i, x, at.cpu())) for i, (x, at) in enumerate(kept))

    def picture(self, given: Any, i: int, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n, D] and their places [3, n] in their picture, given those of picture i that stay and which these
        are."""
        return rows, self.dense_places(given["image_grid_thw"][i].tolist(), 1.0)[:, at]

    def clip(self, given: Any, i: int, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """The same of clip i. Its frames are as far apart as they are in time."""
        seconds = given.get("second_per_grid_ts")
        rate = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        step = rate * (1.0 if seconds is None else float(seconds[i]))
        return rows, self.dense_places(given["video_grid_thw"][i].tolist(), step)[:, at]

    def dense_places(self, grid: list[int], step: float) -> Tensor:
        """[3, n] where the tokens of a picture or clip stand in it, by vLLM's rule: frames are `step` apart, rounded
        down."""
        (frames, high, wide), merge = grid, self.config.vision_config.spatial_merge_size
        axes = torch.arange(frames).double() * step, torch.arange(high // merge), torch.arange(wide // merge)
        return torch.stack(torch.meshgrid(*(axis.long() for axis in axes), indexing="ij")).flatten(1)

    # ---- positions -------------------------------------------------------------------------------------------------
    def media_ids(self) -> list[int]:
        return [self.config.image_token_id, self.config.video_token_id]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """vLLM's own for the dense prompt, of which those of the tokens that stay are taken."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        runs = [self.dense_run(x) for x in features]
        tokens, dense_runs, place = dense_prompt(input_tokens, runs)
        dense = [
            dataclasses.replace(feature, mm_position=PlaceholderRange(offset=run.start, length=run.dense))
            for feature, run in zip(features, dense_runs)
        ]
        positions, delta = super().get_mrope_input_positions(tokens, dense)
        return positions[:, place].contiguous(), delta + len(tokens) - len(input_tokens)

    def dense_run(self, feature: Any) -> Run:
        """Where the placeholders of a picture or clip of a request stand."""
        dense = self.vtok.dense_rows(self.config, feature.modality, feature.data)
        return Run(feature.mm_position.offset, feature.mm_position.length, dense)

    def place_media(self, positions: Tensor, at: Tensor, local: Tensor, media: Tensor) -> None:
        positions[:, at] = base_of(positions, media, at) + local

    def dense_length(self, positions: Tensor) -> int:
        return int(positions[:, -1].max()) + 1


class Info2(InfoOfQwen, qwen2_vl.Qwen2VLProcessingInfo):
    pass


class Info25(InfoOfQwen, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    pass


class Processor2(ProcessorOfQwen, qwen2_vl.Qwen2VLMultiModalProcessor):
    pass


class Processor25(ProcessorOfQwen, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor2, info=Info2, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder)
class Qwen2VL(ServedQwen, qwen2_vl.Qwen2VLForConditionalGeneration):
    stock = qwen2_vl.Qwen2VLForConditionalGeneration


@MULTIMODAL_REGISTRY.register_processor(Processor25, info=Info25, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder)
class Qwen25VL(ServedQwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    stock = qwen2_5_vl.Qwen2_5_VLForConditionalGeneration
