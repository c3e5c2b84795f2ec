"""GLM-4.1V, GLM-4.5V and GLM-4.6V: as Qwen2.5-VL without windows, patches merged by a convolution, and clips as frames
of image placeholders, each before its timestamp."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from vtok.adapters.qwen2_5_vl import Qwen25VLAdapter, QwenTower
from vtok.engine.accounting import VisionShape


class GLM4VAdapter(Qwen25VLAdapter):
    """One call shows pictures or clips: transformers' model refuses both together, as they have one placeholder."""

    family = "glm4v"
    model_types = ("glm4v", "glm4v_moe", "glm46v")
    lacks = frozenset({"ffn"})  # gate and up are one matrix, or a token's neurons are those of its experts

    def token_id(self, config: Any, modality: str) -> int:
        return config.image_token_id

    def tower(self, config: Any) -> QwenTower:
        vision = config.vision_config
        return GLMTower(merge=vision.spatial_merge_size, width=vision.hidden_size, config=config)

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        from vtok.adapters._tiny import GLM_TOKENS, text_decoder, tokenizer

        tok = tokenizer(
            GLM_TOKENS,
            image="<|begin_of_image|><|image|><|end_of_image|>",
            video="<|begin_of_video|><|video|><|end_of_video|>",
        )
        size = {"shortest_edge": 28**2, "longest_edge": 64 * 28**2}
        clips = {"shortest_edge": 2 * 28**2, "longest_edge": 128 * 28**2}
        processor = T.Glm4vProcessor(
            T.Glm4vImageProcessor(size=size), tok, T.Glm4vVideoProcessor(size=clips), chat_template=tok.chat_template
        )
        text = text_decoder(tok, **options)
        quarter = text["hidden_size"] // text["num_attention_heads"] // 4  # of a head's width rotates half, in pairs
        mrope = [quarter - 2 * (quarter * 3 // 8), quarter * 3 // 8, quarter * 3 // 8]
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": mrope}
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
            "image_size": 112,
            "patch_size": 14,
        }
        names = ("image", "video")
        ids = {f"{name}_token_id": tok.convert_tokens_to_ids(f"<|{name}|>") for name in names}
        ids |= {f"{n}_start_token_id": tok.convert_tokens_to_ids(f"<|begin_of_{n}|>") for n in names}
        ids |= {f"{n}_end_token_id": tok.convert_tokens_to_ids(f"<|end_of_{n}|>") for n in names}
        config = T.Glm4vConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **ids)
        return T.Glm4vForConditionalGeneration(config), processor


@dataclass(frozen=True)
class GLMTower(QwenTower):
    kind: ClassVar[str] = "GLM-V's tower"

    def shape(self) -> VisionShape:
        """A convolution over the patches of a token and a projection, then a gated MLP, whose third matrix is counted
        as one layer more."""
        vision = self.config.vision_config
        wide, out, inner = vision.hidden_size * self.merge**2, vision.out_hidden_size, vision.intermediate_size
        plain = replace(super().shape(), ffn=out, ffn_matrices=3)
        return replace(plain, projector=(wide, out, out, inner, out, inner))
