"""A checkpoint for `vtok bench serve`, which a server can load: SmolLM2 behind a thin, untrained front, or a toy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtok import models
from vtok.errors import InvalidValue
from vtok.eval.bench.workloads import TEXT, thin_front

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{{ '<image>\n' if c['type'].startswith('image') else c['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDES = {576: (24, False), 2880: (24, True), 36: (6, False), 180: (6, True)}  # tokens -> patches of a view, crops?
TOYS = (36, 180)
PATCH = 14


def make(visual: int, folder: Path) -> Path:
    """A checkpoint whose pictures have so many visual tokens: of `TOYS`, or 576 and 2,880. Raises `InvalidValue`."""
    import transformers as T

    if visual not in SIDES:
        raise InvalidValue(f"Pictures are of {', '.join(map(str, sorted(SIDES)))} visual tokens, not {visual}.")
    side, crops = SIDES[visual]
    view = side * PATCH
    language, tokenizer = models.smollm2()
    if visual in TOYS:  # its tokenizer alone
        small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
        language = T.LlamaForCausalLM(T.LlamaConfig(**language.config.to_dict() | small | {"num_key_value_heads": 2}))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = thin_front(language.config, side, crops, tokenizer.convert_tokens_to_ids("<image>"))
    name, pinpoints = ("LlavaNext", {"image_grid_pinpoints": config.image_grid_pinpoints}) if crops else ("Llava", {})
    torch.manual_seed(0)
    model = getattr(T, f"{name}ForConditionalGeneration")(config).eval()
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.tie_weights()
    pictures = T.LlavaNextImageProcessor if crops else T.CLIPImageProcessor
    square = {"size": {"shortest_edge": view}, "crop_size": {"height": view, "width": view}}
    processor = getattr(T, f"{name}Processor")(
        pictures(**square, **pinpoints),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return _save(model, processor, folder)


def _save(model: Any, processor: Any, folder: Path) -> Path:
    """With the tower's weights named as older transformers did, which vLLM without vtok looks for."""
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    inner = "vision_tower.vision_model."
    weights = {
        name if inner in name else name.replace("vision_tower.", inner, 1): weight.contiguous()
        for name, weight in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def question() -> str:
    """So long that a prompt has about as many tokens of text as `vtok bench` takes."""
    return " ".join(["What is it?"] * (TEXT // 4 - 4))
