"""LLaVA-NeXT: as LLaVA, with a thumbnail, crops, and newlines, which stay."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models import llava_next as vllm
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from vtok.serving.llava import InfoOfLlava, ServedLlava
from vtok.serving.processing import CountingProcessor
from vtok.serving.settings import Settings


class Info(InfoOfLlava, vllm.LlavaNextProcessingInfo):
    def get_image_size_with_most_features(self) -> ImageSize:
        """Of the encoder: where a count is kept, all sizes have equally many placeholders."""
        config = self.get_hf_config()
        settings = Settings.of(config)
        if settings is None:
            return super().get_image_size_with_most_features()
        height, width = max(config.image_grid_pinpoints, key=lambda size: settings.layout_of_size(config, size).n_rows)
        return ImageSize(width=width, height=height)


class Processor(CountingProcessor, vllm.LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class LlavaNext(ServedLlava, vllm.LlavaNextForConditionalGeneration):
    stock = vllm.LlavaNextForConditionalGeneration

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """The processor gives all pictures of a prompt as many crops as the largest has; what was added is left out."""
        if kwargs.get("pixel_values") is not None:
            layouts = self.vtok.layouts(self.config, "image", kwargs)
            views = [sum(plane.views for plane in layout.planes) for layout in layouts]
            kwargs["pixel_values"] = [pixels[:n] for pixels, n in zip(kwargs["pixel_values"], views)]
        return super().embed_multimodal(**kwargs)
