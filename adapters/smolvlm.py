"""SmolVLM and Idefics3: tiles of one picture, each behind a token that names its place, and the whole picture behind
them; a SigLIP tower, pixel shuffle, a Llama decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vtok.adapter import Encoded, Placed, stretch
from vtok.adapters.clip_tower import ClipTower
from vtok.adapters.internvl import InternVLAdapter
from vtok.engine.accounting import VisionShape
from vtok.errors import Unsupported
from vtok.tower import OF_CLS, Tower
from vtok.types import Layout, Plane


class SmolVLMAdapter(InternVLAdapter):
    """The model is given tiles alone, and the prompt says which are a picture: `<fake><row_1_col_1>` and the first
    tile's placeholders, so tile by tile, a newline behind each row of tiles, then `<fake><global-img>`, the whole
    picture's and `<fake>`. A picture that was not cut is its last part alone; so is a frame of a clip, as the prompt
    writes text between them: a count as `keep` is a count a frame."""

    family = "smolvlm"
    model_types = ("smolvlm", "idefics3")
    provides = InternVLAdapter.provides - OF_CLS
    encoder = "vision_model"
    projector = "connector"

    def language_model(self, core: nn.Module) -> nn.Module:
        return core.text_model

    def check(self, config: Any) -> None:
        patches, merge = config.vision_config.image_size // config.vision_config.patch_size, config.scale_factor
        if patches % merge:
            raise Unsupported(f"{self.family} with tiles of {patches} patches a side, which {merge} does not divide.")

    def available(self, config: Any) -> frozenset[str]:
        return self.provides

    def unit(self, config: Any) -> int:
        return config.vision_config.patch_size * config.scale_factor

    def side(self, config: Any, pixels: Tensor) -> int:
        """Tokens along one side of the tiles `pixels` [..., side, side], whose last pixels may fill no patch."""
        return pixels.shape[-1] // config.vision_config.patch_size // config.scale_factor

    def layouts(self, config: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """One a tile, until `join`. Waits for the device: samples with fewer tiles than others are filled up."""
        side = self.side(config, arguments["pixel_values"])
        return [Layout((Plane(side, side),))] * len(self.previews(arguments))

    def previews(self, arguments: dict[str, Any]) -> tuple[None, ...]:
        """One a tile; tiles of zeros are none."""
        filled = (arguments["pixel_values"] != 0).flatten(2).any(-1)  # [B, tiles]
        return (None,) * max(1, int(filled.sum()))  # SmolVLM encodes one where there is none

    def by_view(self, config: Any, output: Any) -> None:
        if isinstance(output.pooler_output, list):  # of samples
            patches = output.last_hidden_state.shape[1]
            output.pooler_output = torch.cat(output.pooler_output).unflatten(0, (-1, patches // config.scale_factor**2))

    def pictures(self, encoded: Encoded, placed: Placed) -> Iterator[tuple[list[int], tuple[int, int]]]:
        before, behind = placed.before(), placed.behind()
        ends = [
            0,
            *((before == before[-1]).nonzero().flatten() + 1).tolist(),
        ]  # the last view of all is a whole picture
        in_row = (behind == behind[-1]).tolist()  # what closes it also stands between the tiles of a row
        for first, end in pairwise(ends):
            views = list(range(first, end))
            crops = len(views) - 1
            cols = next((i for i, view in enumerate(views[:-1], 1) if not in_row[view]), crops)
            if any(in_row[view] != (i % cols > 0) for i, view in enumerate(views[:-1], 1)):
                raise Unsupported(
                    f"The prompt does not say how the {crops} tiles of a picture lie: each row of them must end with a "
                    f"newline, as {self.family}'s processor writes it."
                )
            yield views, (crops // cols, cols) if crops else (1, 1)

    def tower(self, config: Any) -> Tower:
        return SmolVLMTower(merge=config.scale_factor, width=config.vision_config.hidden_size, config=config)

    def encode_small(
        self, core: nn.Module, modality: str, encode: Callable[..., Any], arguments: dict[str, Any], scale: float
    ) -> tuple[Any, list[tuple[int, int]]]:
        pixels, unit = arguments["pixel_values"], self.unit(core.config)
        side = self.side(core.config, pixels)
        small = max(1, int(side * scale + 1e-6))
        resize = torch.nn.functional.interpolate
        less = resize(pixels.flatten(0, 1).float(), size=small * unit, mode="bicubic", antialias=True).to(pixels.dtype)
        changed = {"pixel_values": less.unflatten(0, pixels.shape[:2])}
        mask: Tensor | None = arguments.get("pixel_attention_mask")
        if mask is not None:
            changed["pixel_attention_mask"] = resize(mask.float(), size=(small * unit, small * unit)).to(mask.dtype)
        output = encode(**{**arguments, **changed})
        self.by_view(core.config, output)
        source = stretch(Plane(side, side), (small, small)).to(output.pooler_output.device)
        output.pooler_output = output.pooler_output[:, source]
        return output, [(small, small)] * len(output.pooler_output)

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        from vtok.adapters._tiny import SMOLVLM_TOKENS, text_decoder, tokenizer

        tok = tokenizer(SMOLVLM_TOKENS, image="<image>")
        pictures = T.SmolVLMImageProcessor(size={"longest_edge": 84}, max_image_size={"longest_edge": 42})
        processor = T.Idefics3Processor(pictures, tok, image_seq_len=9, chat_template=tok.chat_template)
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 42,
            "patch_size": 7,
        }
        text = text_decoder(tok, **options)
        config = T.SmolVLMConfig(
            vision_config=vision,
            text_config={"model_type": "llama", **text},
            image_token_id=tok.convert_tokens_to_ids("<image>"),
            pad_token_id=text["pad_token_id"],
            scale_factor=2,
            tie_word_embeddings=False,
        )
        return T.SmolVLMForConditionalGeneration(config), processor


class SmolVLMTower(ClipTower):
    """CLIP's layers; they are found in no other model."""

    kind = "SmolVLM's tower"

    @classmethod
    def alone(cls, module: nn.Module) -> Tower | None:
        return None

    def shape(self) -> VisionShape:
        vision = self.config.vision_config
        wide = vision.hidden_size * self.merge**2
        plain = VisionShape.plain(self.config, self.skip, self.merge)
        return replace(plain, projector=(wide, self.config.get_text_config().hidden_size))
