"""Causal language models of transformers without pictures, for the stages that need none."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtok.adapter import Adapter
from vtok.errors import Unsupported
from vtok.types import Layout


class CausalLM(Adapter):
    """Any of them whose decoder has a list of `layers`: Llama, Mistral, Qwen2, Qwen3, SmolLM and the like.

    It is no family of the tables, and has no default method: `patch` falls back on it."""

    family = "causal_lm"
    model_types = ()
    provides = frozenset({"attention"})
    lacks = frozenset({"question", "question_embeds"})
    encoders = {}
    default = {}

    @staticmethod
    def describes(model: nn.Module) -> bool:
        """Whether a module is such a model: a head on a decoder, and nothing that sees or hears."""
        config = getattr(model, "config", None)
        if "lm_head" not in model._modules or not hasattr(model, "get_decoder"):
            return False
        others = ("vision_config", "audio_config", "encoder")
        return not getattr(config, "is_encoder_decoder", False) and not any(hasattr(config, name) for name in others)

    def core(self, model: nn.Module) -> nn.Module:
        return model

    def language_model(self, core: nn.Module) -> nn.Module:
        return core.get_decoder()

    def layers(self, core: nn.Module) -> nn.ModuleList:
        decoder = self.language_model(core)
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise Unsupported(f"{type(decoder).__name__} has no list of layers that vtok can look into.")
        return layers

    def layouts(self, config: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        raise Unsupported("A language model has no pictures.")

    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        """A random Llama, and its tokenizer."""
        from transformers import LlamaConfig, LlamaForCausalLM

        from vtok.adapters._tiny import LLAVA_TOKENS, text_decoder, tokenizer

        tok = tokenizer(LLAVA_TOKENS, image="")
        return LlamaForCausalLM(LlamaConfig(**text_decoder(tok, **options))), tok
