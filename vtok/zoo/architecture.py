"""The untrained LLaVA-NeXT of the zoo: tokenizer, processor, configuration. Built from nothing, offline."""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from vtok.zoo import scenes

VIEW, PATCH = 64, 8  # side of a view (thumbnail or crop) and of a patch, in pixels: 64 patches a view
PINPOINTS = [[64, 128], [128, 64], [64, 192], [192, 64], [128, 128]]  # (height, width)
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:")
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ASSISTANT: ' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' }}{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def corpus() -> list[str]:
    """Everything the questions and answers can say, but for the label texts, which stay spelled by letter."""
    nouns = [f" {colour} {shape}" for colour in scenes.COLOURS for shape in (*scenes.SHAPES, "object", "shape")]
    nouns += [f" {shape}{end}" for shape in (*scenes.SHAPES, "shape") for end in ("s", "es")] + [" label digit plot"]
    phrases = [phrase.replace("{}", "") for phrases in scenes.PHRASES.values() for phrase in phrases]
    answers = [" " + answer for known in scenes.ANSWERS.values() for answer in known or ()]
    return (nouns + phrases + answers) * 2


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: every word of the corpus is one token, and any other text falls back to bytes."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = [AddedToken(s, special=True, normalized=False, lstrip=s == "ASSISTANT:") for s in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        min_frequency=2,
        initial_alphabet=alphabet,
        special_tokens=special,
        show_progress=False,
    )
    tok.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": "<image>"},
    )


def processor() -> LlavaNextProcessor:
    square = {"height": VIEW, "width": VIEW}
    images = LlavaNextImageProcessor(
        size=square,
        crop_size=square,
        image_grid_pinpoints=PINPOINTS,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def model(tok: PreTrainedTokenizerFast, seed: int = 0) -> LlavaNextForConditionalGeneration:
    """A freshly initialised model, float32, for the tokens of `tok`."""
    ids = {f"{name}_token_id": getattr(tok, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "image_size": VIEW,
        "patch_size": PATCH,
        "projection_dim": 160,
        "hidden_act": "gelu",
    }
    text = {
        "model_type": "llama",
        "vocab_size": -(-len(tok) // 64) * 64,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        **ids,
    }
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(VIEW // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    net = LlavaNextForConditionalGeneration(config)
    return prepare(net, ids, max_new_tokens=8)


def prepare(net, ids: dict[str, int | None], max_new_tokens: int):
    """A fresh model, its decoder's attention started by matching, and how it generates: greedily, with these ids."""
    for layer in net.model.language_model.layers:
        start_by_matching(layer.self_attn)
    for name, value in ids.items():
        setattr(net.generation_config, name, value)
    net.generation_config.max_new_tokens = max_new_tokens
    net.generation_config.do_sample = False
    return net


@torch.no_grad()
def start_by_matching(attention: torch.nn.Module) -> None:
    """Initialise a decoder's attention so that a token looks at those like it and copies them, softly.

    Queries equal keys, and the output undoes the values: after Trockman and Kolter, "Mimetic initialization of
    self-attention layers" (2023). The words of a question so find the patches that show them from the start.
    """
    width = attention.q_proj.weight.shape[1]
    look, copy = (torch.linalg.qr(torch.randn(width, width))[0] for _ in range(2))
    attention.q_proj.weight.copy_(0.75 * look)
    attention.k_proj.weight.copy_(0.75 * look)
    attention.v_proj.weight.copy_(0.22 * copy)
    attention.o_proj.weight.copy_(0.22 * copy.T)
