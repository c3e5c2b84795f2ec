"""Parts for the tiny random models that each adapter can make, with no network."""

from __future__ import annotations

from typing import Any

LLAVA_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
INTERNVL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
SMOLVLM_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>", "<global-img>"),
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
)
GLM_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image|>", "<|video|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
GEMMA_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
)
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# tests `type` rather than the presence of a key: datasets fill absent keys of content parts with None
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'video' %}VIDEO{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(special: tuple[str, ...], image: str, video: str = "<video>\n", **named: str) -> Any:
    """A byte-level BPE tokenizer of a few hundred tokens, left-padding, with a ChatML template. `named` special tokens
    are attributes of it, where a processor looks for them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        ["What colour is it? Describe the clip. user assistant yes no red green blue 0 1 2 3 4 5 6 7 8 9"] * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[AddedToken(s, special=True, normalized=False) for s in special],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        padding_side="left",
        extra_special_tokens=named,
        chat_template=_TEMPLATE.replace("IMAGE", image).replace("VIDEO", video),
    )


def text_decoder(tok: Any, layers: int = 4, hidden: int = 64, heads: int = 4, kv_heads: int = 2) -> dict[str, Any]:
    """Options of a small decoder whose vocabulary fits `tok`."""
    end, pad = tok.convert_tokens_to_ids("<|im_end|>"), tok.convert_tokens_to_ids("<|endoftext|>")
    return {
        "vocab_size": (len(tok) + 63) // 64 * 64,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "bos_token_id": pad,
        "eos_token_id": end,
        "pad_token_id": pad,
    }


def qwen(unit: int, **options: Any) -> tuple[Any, dict[str, int], dict[str, Any], dict[str, int]]:
    """What the tiny Qwen-VL models share: the tokenizer, the processors' pixel limits for visual tokens of
    `unit` x `unit` pixels, the options of a decoder with M-RoPE, and the ids of the special tokens."""
    tok = tokenizer(
        QWEN_TOKENS,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
    )
    text = text_decoder(tok, **options)
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    mrope = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope}
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{key}_token_id": tok.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    return tok, {"shortest_edge": unit**2, "longest_edge": 64 * unit**2}, text, ids


def qwen3(depth: int, **options: Any) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, int]]:
    """What those from Qwen3-VL on share: the processor, the options of a decoder and of an encoder, the ids."""
    import transformers as T

    tok, size, text, ids = qwen(32, **options)
    processor = T.Qwen3VLProcessor(
        T.Qwen2VLImageProcessor(size=dict(size), patch_size=16),
        tok,
        T.Qwen3VLVideoProcessor(size=dict(size)),
        chat_template=tok.chat_template,
    )
    text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    text["rope_parameters"]["mrope_interleaved"] = True
    vision = {
        "depth": depth,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 16,
        "num_position_embeddings": 64,
    }
    return processor, text, vision, ids


def clip_tower() -> dict[str, Any]:
    """Options of a CLIP tower of 4 x 4 patches."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 32,
    }
