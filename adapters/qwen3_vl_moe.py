"""Qwen3-VL-MoE: as Qwen3-VL, with a router and experts in place of the decoder's FFNs."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtok.adapters.qwen3_vl import Qwen3VLAdapter


class Qwen3VLMoeAdapter(Qwen3VLAdapter):
    family = "qwen3_vl_moe"
    model_types = ("qwen3_vl_moe",)
    lacks = frozenset({"ffn"})  # a token's neurons are those of its experts

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        import transformers as T

        processor, parts = self._tiny_parts(**options)
        hidden = parts["text_config"]["hidden_size"]
        parts["text_config"] |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden // 2}
        return T.Qwen3VLMoeForConditionalGeneration(T.Qwen3VLMoeConfig(**parts)), processor
