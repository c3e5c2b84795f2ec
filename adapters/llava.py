"""LLaVA-1.5: one square view, a CLIP or SigLIP tower, a two-layer projector, a 1-D RoPE decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vtok.adapter import Adapter, projected, stretch
from vtok.adapters.clip_tower import CLASS_TOKENS, ClipTower
from vtok.errors import Unsupported
from vtok.tower import OF_CLS, OF_PATCHES, Tower
from vtok.types import Layout, Plane


class LlavaAdapter(Adapter):
    family = "llava"
    model_types = ("llava",)
    provides = frozenset({"attention", "token_blocks", "token_per_patch"}) | OF_PATCHES | OF_CLS

    def check(self, config: Any) -> None:
        vision, strategy = config.vision_config, config.vision_feature_select_strategy
        kind, sizes = vision.model_type, [getattr(vision, name, None) for name in ("image_size", "patch_size")]
        if kind == "pixtral" or not all(isinstance(size, int) for size in sizes):
            raise Unsupported(
                f"{self.family} with a {kind} tower is not supported: a tower that sees square views of one size is. A "
                f"method that acts in a tower's blocks can be given the tower alone: "
                f"vtok.patch(model.model.vision_tower, ...)."
            )
        if kind in CLASS_TOKENS and bool(CLASS_TOKENS[kind]) != (strategy == "default"):
            raise Unsupported(
                f"{self.family} with a {kind} tower and vision_feature_select_strategy={strategy!r}: the features "
                f"must be the patches alone, so CLIP needs 'default' (drop CLS) and SigLIP, which has no CLS, 'full'."
            )

    def available(self, config: Any) -> frozenset[str]:
        kind = config.vision_config.model_type
        if kind not in CLASS_TOKENS:  # its tokens can be counted, and what it computes is not known
            return self.provides - OF_PATCHES - OF_CLS - {"token_blocks", "token_per_patch"}
        return self.provides if CLASS_TOKENS[kind] else self.provides - OF_CLS

    def side(self, config: Any) -> int:
        """Patches along one side of a view."""
        return config.vision_config.image_size // config.vision_config.patch_size

    def layouts(self, config: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        side = self.side(config)
        return [Layout((Plane(side, side),))] * len(arguments["pixel_values"])

    def tower(self, config: Any) -> Tower:
        vision = config.vision_config
        kind = ClipTower if vision.model_type in CLASS_TOKENS else getattr(vision, "tower", Tower)
        return kind(
            skip=CLASS_TOKENS.get(vision.model_type, 0),
            features=projected(config),
            width=vision.hidden_size,
            config=config,
        )

    def encode_small(
        self, core: nn.Module, modality: str, encode: Callable[..., Any], arguments: dict[str, Any], scale: float
    ) -> tuple[Any, list[tuple[int, int]]]:
        side, patch = self.side(core.config), core.config.vision_config.patch_size
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
