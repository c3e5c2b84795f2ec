"""LLaVA-1.5: one square view, a CLIP or SigLIP tower, a two-layer projector, a 1-D RoPE decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtok.adapter import Adapter, stretch
from vtok.errors import Unsupported
from vtok.selection import Layout, Plane


class LlavaAdapter(Adapter):
    family = "llava"
    model_types = ("llava",)
    provides = frozenset({"attention", "cls_attention"})
    default = {"method": "aim_merge", "keep": 0.25}

    def check(self, model: nn.Module) -> None:
        config = model.config
        tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if tower not in ("clip_vision_model", "siglip_vision_model"):
            raise Unsupported(f"{self.family} with a {tower} tower is not supported: CLIP and SigLIP towers are.")
        if (tower == "clip_vision_model") != (strategy == "default"):
            raise Unsupported(
                f"{self.family} with a {tower} tower and vision_feature_select_strategy={strategy!r}: the features "
                f"must be the patches alone, so CLIP needs 'default' (drop CLS) and SigLIP, which has no CLS, 'full'."
            )

    def available(self, model: nn.Module) -> frozenset[str]:
        has_cls = model.config.vision_config.model_type == "clip_vision_model"
        return self.provides if has_cls else self.provides - {"cls_attention"}

    def side(self, core: nn.Module) -> int:
        """Patches along one side of a view."""
        return core.config.vision_config.image_size // core.config.vision_config.patch_size

    def layouts(self, core: nn.Module, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        side = self.side(core)
        return [Layout((Plane(side, side),))] * len(arguments["pixel_values"])

    def cls_probe(self, core: nn.Module) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
        # the last layer's input is what vision_feature_layer=-2 selects: scores and features are of the same tokens
        return _encoder(core.vision_tower).layers[-1].self_attn, cls_logits

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


def _encoder(tower: nn.Module) -> nn.Module:
    return getattr(tower, "vision_model", tower).encoder


def cls_logits(attention: nn.Module, hidden_states: Tensor) -> Tensor:
    """Head-mean of the CLS token's pre-softmax logits over the patches, [views, P] in fp32.

    The mean over heads of q.k is one dot product over the whole width, so no head is split and no softmax taken.
    hidden_states: [views, 1 + P, C], the input of the layer's attention."""
    with torch.no_grad():
        query = attention.q_proj(hidden_states[:, :1]).float()  # [views, 1, C]
        key = attention.k_proj(hidden_states[:, 1:]).float()  # [views, P, C]
        return (query @ key.transpose(1, 2)).squeeze(1) * (attention.head_dim**-0.5 / attention.num_heads)
