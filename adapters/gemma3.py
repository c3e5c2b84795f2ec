"""Gemma 3: a SigLIP tower whose patches are pooled to a square of tokens, which see each other, and a decoder most of
whose layers see a window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok.adapter import Adapter
from vtok.adapters.clip_tower import ClipTower
from vtok.engine.accounting import VisionShape
from vtok.errors import Unsupported
from vtok.tower import OF_PATCHES, Tower
from vtok.types import Layout, Plane


class Gemma3Adapter(Adapter):
    """Crops of a picture (pan and scan) are pictures of their own, as the prompt writes text between them.

    Tokens are dropped before the language model. A window of its layers then counts the tokens that were kept, and
    reaches further back in the prompt than without compression."""

    family = "gemma3"
    model_types = ("gemma3",)
    provides = frozenset({"token_blocks"}) | OF_PATCHES
    lacks = frozenset({"attention", "ffn"})
    windows = True

    def check(self, config: Any) -> None:
        vision = config.vision_config
        if vision.model_type != "siglip_vision_model":
            raise Unsupported(f"{self.family} with a {vision.model_type} tower is not supported: SigLIP towers are.")
        if self.side(config) ** 2 != config.mm_tokens_per_image or vision.image_size % (self.unit(config)):
            raise Unsupported(f"mm_tokens_per_image must be a square that fits, got {config.mm_tokens_per_image}.")
        if config.get_text_config().use_bidirectional_attention:
            raise Unsupported(f"{self.family} whose text sees later text is not supported.")

    def side(self, config: Any) -> int:
        """Tokens along one side of a picture."""
        return round(config.mm_tokens_per_image**0.5)

    def unit(self, config: Any) -> int:
        """Side of a token in pixels."""
        return self.merge(config) * config.vision_config.patch_size

    def merge(self, config: Any) -> int:
        return config.vision_config.image_size // config.vision_config.patch_size // self.side(config)

    def layouts(self, config: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        side = self.side(config)
        return [Layout((Plane(side, side),))] * len(arguments["pixel_values"])

    def tower(self, config: Any) -> Tower:
        return PooledTower(merge=self.merge(config), width=config.vision_config.hidden_size, config=config)

    def blocks(self, kwargs: dict[str, Any]) -> Tensor | None:
        kinds = kwargs.get("token_type_ids")
        if kinds is None:
            return None
        visual = kinds == 1
        starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        return torch.where(visual, starts.cumsum(1) - 1, -1)

    def masks(self, config: Any, embeds: Tensor, valid: Tensor | None, cache: Any, blocks: Tensor) -> Any:
        """Additive masks, one for each kind of layer: a token sees the earlier ones and its own block, both within the
        window of its layer."""
        length, kinds = embeds.shape[1], config.layer_types
        past = 0 if cache is None else cache.columns(0)
        blocks = torch.nn.functional.pad(blocks, (past, 0), value=-1)
        column = torch.arange(past + length, device=embeds.device)
        row = column[past:, None]
        seen = (column <= row) | ((blocks[:, past:, None] == blocks[:, None]) & (blocks[:, past:, None] >= 0))
        if valid is not None:
            seen &= valid[:, None].bool()
        made = {}
        for kind in set(kinds):
            near, held = seen, past + length
            if kind == "sliding_attention":
                near = seen & (column > row - config.sliding_window)
            if cache is not None:
                held, _ = cache.get_mask_sizes(length, kinds.index(kind))
            near = near[:, None, :, past + length - held :]
            made[kind] = torch.zeros(near.shape, dtype=embeds.dtype, device=embeds.device).masked_fill_(
                ~near, torch.finfo(embeds.dtype).min
            )
        return made

    def encode_small(
        self, core: nn.Module, modality: str, encode: Callable[..., Any], arguments: dict[str, Any], scale: float
    ) -> tuple[Any, list[tuple[int, int]]]:
        config, pixels = core.config, arguments["pixel_values"]
        side, merge = self.side(config), self.merge(config)
        small = max(1, int(side * scale + 1e-6))
        token = torch.arange(side * merge) // merge * small // side  # of the small picture, for each row of patches
        patch = token * merge + torch.arange(side * merge) % merge
        source = (patch[:, None] * small * merge + patch).flatten()

        def stretch_patches(module: nn.Module, args: tuple, output: Any) -> Any:
            states = output.last_hidden_state
            output.last_hidden_state = states[:, source.to(states.device)]
            return output

        less = torch.nn.functional.interpolate(
            pixels.float(), size=small * self.unit(config), mode="bicubic", antialias=True
        )
        hook = core.vision_tower.register_forward_hook(stretch_patches)
        try:
            output = encode(**{**arguments, "pixel_values": less.to(pixels.dtype), "interpolate_pos_encoding": True})
        finally:
            hook.remove()
        return output, [(small, small)] * len(pixels)

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        from vtok.adapters._tiny import GEMMA_TOKENS, text_decoder, tokenizer

        names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        tok = tokenizer(GEMMA_TOKENS, image="<start_of_image>", **names)
        size = {"height": 56, "width": 56}
        processor = T.Gemma3Processor(
            T.Gemma3ImageProcessor(size=size), tok, chat_template=tok.chat_template, image_seq_length=16
        )
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 7,
            "vision_use_head": False,
        }
        text = text_decoder(tok, **options)
        text |= {
            "head_dim": text["hidden_size"] // text["num_attention_heads"],
            "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(text["num_hidden_layers"])],
            "sliding_window": 12,
            "query_pre_attn_scalar": text["hidden_size"] // text["num_attention_heads"],
        }
        config = T.Gemma3Config(
            vision_config=vision,
            text_config=text,
            mm_tokens_per_image=16,
            image_token_id=tok.convert_tokens_to_ids("<image_soft_token>"),
            boi_token_id=tok.convert_tokens_to_ids("<start_of_image>"),
            eoi_token_id=tok.convert_tokens_to_ids("<end_of_image>"),
            tie_word_embeddings=False,
        )
        model = T.Gemma3ForConditionalGeneration(config)
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)  # else it is zero
        return model, processor


class PooledTower(ClipTower):
    """CLIP's layers; squares of patches become tokens as their mean."""

    kind = "Gemma 3's tower"

    @classmethod
    def alone(cls, module: nn.Module) -> Tower | None:
        return None

    def shape(self) -> VisionShape:
        widths = (self.config.vision_config.hidden_size, self.config.get_text_config().hidden_size)
        return replace(VisionShape.plain(self.config, self.skip, self.merge), projector=widths)
