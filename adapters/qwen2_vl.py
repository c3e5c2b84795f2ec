"""Qwen2-VL: as Qwen2.5-VL, but every layer of its encoder attends over the whole picture or frame."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtok.adapters.qwen2_5_vl import Qwen25VLAdapter


class Qwen2VLAdapter(Qwen25VLAdapter):
    family = "qwen2_vl"
    model_types = ("qwen2_vl",)

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        from vtok.adapters._tiny import qwen

        tok, size, text, ids = qwen(28, **options)
        processor = T.Qwen2VLProcessor(
            T.Qwen2VLImageProcessor(size=dict(size)),
            tok,
            T.Qwen2VLVideoProcessor(size=dict(size)),
            chat_template=tok.chat_template,
        )
        vision = {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": text["hidden_size"],
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 14,
        }
        config = T.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        return T.Qwen2VLForConditionalGeneration(config), processor
