"""Qwen3-VL: as Qwen2.5-VL, with DeepStack (features of several encoder layers, each added to the visual tokens behind
one of the first decoder layers), and clips as one run of placeholders a frame, each behind its timestamp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vtok.adapters.qwen2_5_vl import Qwen25VLAdapter, stretch_frames
from vtok.errors import Unsupported


class Qwen3VLAdapter(Qwen25VLAdapter):
    family = "qwen3_vl"
    model_types = ("qwen3_vl",)
    late = True

    def check(self, config: Any) -> None:
        levels = len(config.vision_config.deepstack_visual_indexes)
        layers = config.get_text_config().num_hidden_layers
        if levels >= layers:
            raise Unsupported(
                f"DeepStack adds {levels} features in a decoder of {layers} layers: one would be added behind the last "
                f"layer, where tokens are no longer compressed. A decoder of at least {levels + 1} layers is supported."
            )

    def late_features(self, kwargs: dict[str, Any]) -> dict[int, Tensor]:
        kwargs.pop("visual_pos_masks", None)  # the places are the placeholders, which the engine knows
        return dict(enumerate(kwargs.pop("deepstack_visual_embeds", None) or ()))

    def encode_small(
        self, core: nn.Module, modality: str, encode: Callable[..., Any], arguments: dict[str, Any], scale: float
    ) -> tuple[Any, list[tuple[int, int]]]:
        output, views = super().encode_small(core, modality, encode, arguments, scale)
        layouts = self.layouts(core.config, modality, arguments)
        output.deepstack_features = [stretch_frames(level, layouts, views) for level in output.deepstack_features]
        return output, views

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        processor, parts = self._tiny_parts(**options)
        return T.Qwen3VLForConditionalGeneration(T.Qwen3VLConfig(**parts)), processor

    def _tiny_parts(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """The processor, and the options of the config."""
        from vtok.adapters._tiny import qwen3

        processor, text, vision, ids = qwen3(3, **options)
        vision["deepstack_visual_indexes"] = list(range(min(3, text["num_hidden_layers"] - 1)))
        return processor, {"text_config": text, "vision_config": vision, **ids}
