"""Qwen3-VL: as Qwen2.5-VL, with DeepStack, and clips as frames between timestamps.

DeepStack's features stand beside a token's own in its row, and stay with it. Of a clip it is known beforehand how many
tokens stay, and not how many of each frame. So vLLM is told of one stretch of placeholders, timestamps and all, and is
given the embeddings of the text among the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_vl as vllm
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtok.serving.positions import Run
from vtok.serving.qwen import InfoOfQwen, ProcessorOfQwen, ServedQwen
from vtok.serving.settings import Settings


def dense_clip(config: Any, tokenizer: Any, grid: Sequence[int], times: Any) -> list[int]:
    """The tokens of a clip of `grid` (frames, rows, columns of patches) in the dense prompt."""
    frames, high, wide = (int(n) for n in grid)
    made = vllm.Qwen3VLMultiModalProcessor.get_video_repl(
        tokens_per_frame=[high * wide // config.vision_config.spatial_merge_size**2] * frames,
        timestamps=times,
        tokenizer=tokenizer,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        video_token_id=config.video_token_id,
    )
    return made.full


class Info(InfoOfQwen, vllm.Qwen3VLProcessingInfo):
    def get_max_video_tokens(self, seq_len: int, mm_counts: Any) -> int:
        """With the text between the frames of the longest clip."""
        most, config = super().get_max_video_tokens(seq_len, mm_counts), self.get_hf_config()
        if Settings.of(config) is None:
            return most
        video = self.get_video_processor()
        frames = max(1, video.max_frames // video.temporal_patch_size)
        return most + len(dense_clip(config, self.get_tokenizer(), (frames, 0, 0), [9999.5] * frames))


class Processor(ProcessorOfQwen, vllm.Qwen3VLMultiModalProcessor):
    def between(self, modality: str, item: Any) -> int:
        if modality == "image":
            return 0
        frames = int(item["video_grid_thw"].data[0])
        return len(dense_clip(self.info.get_hf_config(), self.info.get_tokenizer(), (frames, 0, 0), _times(item)))


class ServedQwen3(ServedQwen):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.width = self.visual_dim + self.multiscale_dim

    def clip(self, given: Any, i: int, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        grid = given["video_grid_thw"][i].cpu()
        tokens = torch.tensor(dense_clip(self.config, self._tokenizer, grid.tolist(), given["timestamps"][i]))
        visual = tokens == self.config.video_token_id
        stays = ~visual
        stays[visual.nonzero().squeeze(1)[at]] = True
        text = self.get_language_model().embed_input_ids(tokens[~visual].to(rows.device))
        woven = rows.new_zeros(len(tokens), rows.shape[1])
        woven[~visual, : self.features] = text.to(rows.dtype)
        woven[stays & visual] = rows
        return woven[stays], self.places(tokens.tolist(), grid)[:, stays]

    def places(self, tokens: list[int], grid: Tensor) -> Tensor:
        """[3, n] where the tokens of a dense clip stand in it, by vLLM's rule."""
        clip = SimpleNamespace(
            modality="video",
            mm_position=SimpleNamespace(offset=0),
            data={"video_grid_thw": SimpleNamespace(data=grid)},
        )
        return super(ServedQwen, self).get_mrope_input_positions(tokens, [clip])[0]

    def dense_run(self, feature: Any) -> Run:
        if feature.modality == "image":
            return super().dense_run(feature)
        grid = feature.data["video_grid_thw"].data.tolist()
        tokens = tuple(dense_clip(self.config, self._tokenizer, grid, _times(feature.data)))
        return Run(feature.mm_position.offset, feature.mm_position.length, len(tokens), tokens)


def _times(item: Any) -> list[float]:
    """The seconds at which the frames of a clip were taken, two of the film a frame."""
    times = item["timestamps"].data
    return times.tolist() if isinstance(times, Tensor) else list(times)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=vllm.Qwen3VLDummyInputsBuilder)
class Qwen3VL(ServedQwen3, vllm.Qwen3VLForConditionalGeneration):
    stock = vllm.Qwen3VLForConditionalGeneration
