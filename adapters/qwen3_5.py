"""Qwen3.5: Qwen3-VL's encoder and clips without DeepStack, in front of a decoder most of whose layers have linear
attention: a state of fixed size in place of a cache."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtok.adapters.qwen2_5_vl import Qwen25VLAdapter


class Qwen35Adapter(Qwen25VLAdapter):
    """Tokens are dropped before the language model. A layer with linear attention has no scores to drop by behind it,
    and what went into its state cannot be taken out again."""

    family = "qwen3_5"
    model_types = ("qwen3_5", "qwen3_5_moe")
    lacks = frozenset({"attention", "ffn"})

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        from vtok.adapters._tiny import qwen3

        processor, text, vision, ids = qwen3(2, **options)
        text |= {
            "layer_types": [("linear_attention", "full_attention")[i % 2] for i in range(text["num_hidden_layers"])],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        }
        text["rope_parameters"]["partial_rotary_factor"] = 1.0
        config = T.Qwen3_5Config(text_config=text, vision_config=vision, **ids)
        return T.Qwen3_5ForConditionalGeneration(config), processor
