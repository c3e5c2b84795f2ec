"""LLaVA-1.5: one square view, a CLIP or SigLIP tower, a two-layer projector, a 1-D RoPE decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vtok.adapter import Adapter, stretch
from vtok.errors import Unsupported
from vtok.tower import OF_CLS, OF_PATCHES, Tower
from vtok.types import Layout, Plane


class LlavaAdapter(Adapter):
    family = "llava"
    model_types = ("llava",)
    provides = frozenset({"attention", "token_blocks", "token_per_patch"}) | OF_PATCHES | OF_CLS

    def check(self, model: nn.Module) -> None:
        config = model.config
        tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if tower not in ("clip_vision_model", "siglip_vision_model"):
            raise Unsupported(
                f"{self.family} with a {tower} tower is not supported: CLIP and SigLIP towers are. A method that acts "
                f"in a tower's blocks can be given the tower alone: vtok.patch(model.model.vision_tower, ...)."
            )
        if (tower == "clip_vision_model") != (strategy == "default"):
            raise Unsupported(
                f"{self.family} with a {tower} tower and vision_feature_select_strategy={strategy!r}: the features "
                f"must be the patches alone, so CLIP needs 'default' (drop CLS) and SigLIP, which has no CLS, 'full'."
            )

    def available(self, config: Any) -> frozenset[str]:
        has_cls = config.vision_config.model_type == "clip_vision_model"
        return self.provides if has_cls else self.provides - OF_CLS

    def side(self, core: nn.Module) -> int:
        """Patches along one side of a view."""
        return core.config.vision_config.image_size // core.config.vision_config.patch_size

    def layouts(self, core: nn.Module, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        side = self.side(core)
        return [Layout((Plane(side, side),))] * len(arguments["pixel_values"])

    def tower(self, core: nn.Module) -> Tower:
        return Tower(
            skip=int(core.config.vision_config.model_type == "clip_vision_model"),
            features=core.config.vision_feature_layer,
        )

    def encoder_layers(self, core: nn.Module) -> nn.ModuleList:
        return getattr(core.vision_tower, "vision_model", core.vision_tower).encoder.layers

    def encode_small(
        self, core: nn.Module, modality: str, encode: Callable[..., Any], arguments: dict[str, Any], scale: float
    ) -> tuple[Any, list[tuple[int, int]]]:
        side, patch = self.side(core), core.config.vision_config.patch_size
        small = max(1, int(side * scale + 1e-6))
        source = stretch(Plane(side, side), (small, small))

        def shrink_pixels(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
            pixels, *rest = args if args else (kwargs.pop("pixel_values"),)
            pixels = torch.nn.functional.interpolate(
                pixels.float(), size=small * patch, mode="bicubic", antialias=True
            ).to(pixels.dtype)
            return (pixels, *rest), {**kwargs, "interpolate_pos_encoding": True}

        def stretch_features(module: nn.Module, args: tuple, output: Any):
            skip = output.last_hidden_state.shape[1] - small * small  # the CLS token, where there is one
            index = torch.cat([torch.arange(skip), skip + source]).to(output.last_hidden_state.device)
            output.hidden_states = tuple(h if h is None else h[:, index] for h in output.hidden_states)
            return output

        hooks = [
            core.vision_tower.register_forward_pre_hook(shrink_pixels, with_kwargs=True),
            core.vision_tower.register_forward_hook(stretch_features),
        ]
        try:
            output = encode(**arguments)
        finally:
            for hook in hooks:
                hook.remove()
        return output, [(small, small)] * len(output.pooler_output)

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        from vtok.adapters._tiny import LLAVA_TOKENS, clip_tower, text_decoder, tokenizer

        tok = tokenizer(LLAVA_TOKENS, image="<image>\n")
        processor = T.LlavaProcessor(
            T.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
            tok,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tok.chat_template,
        )
        config = T.LlavaConfig(
            vision_config=clip_tower(),
            text_config={"model_type": "llama", **text_decoder(tok, **options)},
            image_token_index=tok.convert_tokens_to_ids("<image>"),
            image_seq_length=16,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        return T.LlavaForConditionalGeneration(config), processor
