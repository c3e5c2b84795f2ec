"""LLaVA-1.5."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models import llava as vllm
from vllm.model_executor.models.utils import maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtok.adapter import projected
from vtok.adapters.clip_tower import CLASS_TOKENS
from vtok.serving.processing import CountingProcessor, SaltedInfo
from vtok.serving.served import OneAxis, VllmTower, keep_rows, of_pictures, reading
from vtok.serving.settings import Settings
from vtok.types import Layout


class InfoOfLlava(SaltedInfo):
    """How many placeholders a picture has."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        settings = Settings.of(self.get_hf_config())
        if settings is None:
            return super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return settings.rows(settings.layout_of_size(self.get_hf_config(), (image_height, image_width)))

    def layouts(self, settings: Settings) -> list[Layout]:
        """Of pictures, the largest among them."""
        config = self.get_hf_config()
        sizes = getattr(config, "image_grid_pinpoints", None) or [None]
        return [settings.layout_of_size(config, size) for size in sizes]


class Info(InfoOfLlava, vllm.LlavaProcessingInfo):
    pass


class ServedLlava(OneAxis):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        skip = CLASS_TOKENS.get(self.config.vision_config.model_type, 0)
        self.tower = VllmTower(skip=skip, features=projected(self.config))
        self.whole = bool(self.vtok.compressor.encoder_layers)
        if self.whole:
            self.vision_tower = self.whole_tower(vllm_config, prefix)

    def whole_tower(self, vllm_config: Any, prefix: str) -> nn.Module:
        """vLLM builds a tower up to the layer that the projector reads; methods may read others, and count from the
        last."""
        with self._mark_tower_model(vllm_config, "image"):
            return type(self.vision_tower)(
                self.config.vision_config,
                quant_config=vllm_config.quant_config,
                require_post_norm=False,
                prefix=maybe_prefix(prefix, "vision_tower"),
            )

    def _image_pixels_to_features(self, vision_tower: nn.Module, pixel_values: Tensor) -> Tensor:
        if not self.whole:
            return super()._image_pixels_to_features(vision_tower, pixel_values)
        return vision_tower(
            pixel_values,
            select_layers=list(projected(self.config)),
            feature_select_strategy=self.config.vision_feature_select_strategy,
        )

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        if kwargs.get("image_embeds") is not None:  # made elsewhere, and so as many as there are placeholders
            return [self.finished(x, torch.arange(len(x))[None]) for x in super().embed_multimodal(**kwargs)]
        if kwargs.get("pixel_values") is None:
            return []
        layouts = self.vtok.layouts(self.config, "image", kwargs)
        with reading(self.vtok.compressor, self.tower, self.vision_tower.vision_model.encoder.layers) as seen:
            rows = super().embed_multimodal(**kwargs)
        kept = keep_rows(self.vtok, rows, layouts, of_pictures(seen, self.tower, layouts))
        return [self.finished(x, at[None]) for x, at in kept]

    # ---- positions -------------------------------------------------------------------------------------------------
    def media_ids(self) -> list[int]:
        return [self.config.image_token_index]

    def dense_rows(self, feature: Any) -> list[int]:
        data = feature.data or {}
        made_elsewhere = "image_embeds" in data
        return [feature.mm_position.length if made_elsewhere else self.vtok.dense_rows(self.config, "image", data)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Also those that transformers 5 saved, without the "vision_model." that vLLM looks for."""
        tower, inner = "vision_tower.", "vision_tower.vision_model."
        old = lambda name: name if inner in name else name.replace(tower, inner, 1)
        return super().load_weights((old(name), weight) for name, weight in weights)


class Processor(CountingProcessor, vllm.LlavaMultiModalProcessor):
    pass


def info(ctx: Any) -> Any:
    stock = vllm._build_llava_or_pixtral_hf_info(ctx)  # towers of Pixtral are refused where there are settings
    return Info(ctx) if isinstance(stock, vllm.LlavaProcessingInfo) else stock


def processor(info: Any, dummy_inputs: Any) -> Any:
    build = Processor if isinstance(info, Info) else vllm._build_llava_or_pixtral_hf_processor
    return build(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(processor, info=info, dummy_inputs=vllm.LlavaDummyInputsBuilder)
class Llava(ServedLlava, vllm.LlavaForConditionalGeneration):
    stock = vllm.LlavaForConditionalGeneration
