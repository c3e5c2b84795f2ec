"""What `vtok bench` runs: models with the proportions that speed depends on, and pictures of known token counts.

A workload is a name and a function that builds a model and, for each number of visual tokens, its inputs. The vision
tower in front of a random or text-only model is a thin one: it is not what is measured there.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtok import models
from vtok.errors import UnknownName, meant

TEXT = 40  # text tokens, half before the picture and half after it
IMAGE, VIDEO = 5, 1  # the placeholders' ids

Built = tuple[nn.Module, dict[str, Tensor]]  # a model and its inputs

# Decoders of Vicuna's and Qwen2.5's proportions: ffn 2.7 d and 5.4 d, and their vocabularies, but for the toys.
LLAMA = {
    "toy": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "heads": 2, "vocab": 1000},
    "small": {"hidden_size": 768, "intermediate_size": 2064, "num_hidden_layers": 8, "heads": 12, "vocab": 32000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32, "vocab": 32000},
}
THIN = {"depth": 3, "hidden_size": 128, "intermediate_size": 512, "num_heads": 2, "fullatt_block_indexes": [2]}
# Qwen's tower but for its depth of 32, with attention over all of a picture in each layer, as Qwen2-VL's has.
WIDE = {
    "depth": 4,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [0, 1, 2, 3],
}
QWEN = {
    "toy": {
        "hidden_size": 64,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    },
    "small": {
        "hidden_size": 768,
        "intermediate_size": 2064,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 32000,
    },
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}


@dataclass(frozen=True)
class Workload:
    """title: what it is, for people. builds: visual tokens of a picture -> a function of (batch, device, dtype)."""

    title: str
    builds: dict[int, Callable[[int, str, torch.dtype], Built]]


def find(name: str) -> Workload:
    """A workload by name. Raises `UnknownName` with those that there are."""
    from vtok import zoo

    if name in WORKLOADS:
        return WORKLOADS[name]
    if name in zoo.names():
        return Workload(f"{name}, bundled and trained", {0: partial(_bundled, name)})
    known = [*WORKLOADS, *zoo.names()]
    raise UnknownName(f"No workload {name!r}; there are: {', '.join(known)}.{meant(name, known)}")


def llava(decoder: dict[str, int], side: int, views: bool, batch: int, device: str, dtype: torch.dtype) -> Built:
    """A random LLaVA of one view of side x side patches, or LLaVA-NeXT of a thumbnail and 2 x 2 such crops."""
    import transformers as T

    sizes = dict(decoder)
    heads, vocab = sizes.pop("heads"), sizes.pop("vocab")
    text = T.LlamaConfig(
        vocab_size=vocab, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, **sizes
    )
    return _behind_clip(text, side, views, batch, device, dtype)


def thin_front(text: Any, side: int, views: bool, image: int) -> Any:
    """The config of a LLaVA, or with `views` a LLaVA-NeXT, whose tower is small. text: the decoder's config. image: the
    placeholder's id."""
    import transformers as T

    common = {
        "vision_config": T.CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=14 * side,
            patch_size=14,
        ),
        "text_config": text,
        "image_token_index": image,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    return T.LlavaNextConfig(image_grid_pinpoints=[[28 * side] * 2], **common) if views else T.LlavaConfig(**common)


def _behind_clip(text: Any, side: int, views: bool, batch: int, device: str, dtype: torch.dtype) -> Built:
    import transformers as T

    config = thin_front(text, side, views, IMAGE)
    torch.manual_seed(0)
    view = (3, 14 * side, 14 * side)
    if views:
        double = 28 * side
        count = side**2 + 2 * side * (2 * side + 1)  # thumbnail, crops, a newline after each of their rows
        sizes = torch.tensor([[double, double]] * batch)
        pictures = {"pixel_values": torch.rand(batch, 5, *view).to(dtype), "image_sizes": sizes}
        model = _random(T.LlavaNextForConditionalGeneration, config, device, dtype)
    else:
        count, pictures = side**2, {"pixel_values": torch.rand(batch, *view).to(dtype)}
        model = _random(T.LlavaForConditionalGeneration, config, device, dtype)
    return model, _prompt(count, text.vocab_size, batch, pictures, device)


def _qwen(
    decoder: dict[str, int],
    grid: tuple[int, int],
    batch: int,
    device: str,
    dtype: torch.dtype,
    tower: dict[str, Any] = THIN,
    frames: int = 0,
    page: bool = False,
) -> Built:
    """A random Qwen2.5-VL and a picture of `grid` visual tokens, of noise or a page of text, or a clip of so many
    frames of noise."""
    import transformers as T

    width = decoder["hidden_size"] // decoder["num_attention_heads"]
    quarter = width // 8  # the three axes share half of a head's width, 1 : 1.5 : 1.5
    config = T.Qwen2_5_VLConfig(
        vision_config={**tower, "out_hidden_size": decoder["hidden_size"]},
        text_config={
            **decoder,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [quarter, (width // 2 - quarter) // 2, (width // 2 - quarter) // 2],
            },
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=2,
        vision_end_token_id=3,
    )
    torch.manual_seed(0)
    rows, cols = (2 * n for n in grid)  # patches: two by two are a token
    count = max(frames, 1) * rows * cols
    pixels = _page(rows, cols).repeat(batch, 1) if page else torch.rand(batch * count, 3 * 2 * 14 * 14)
    names = ("pixel_values_videos", "video_grid_thw") if frames else ("pixel_values", "image_grid_thw")
    seen = dict(zip(names, (pixels.to(dtype), torch.tensor([[max(frames, 1), rows, cols]] * batch))))
    model = _random(T.Qwen2_5_VLForConditionalGeneration, config, device, dtype)
    inputs = _prompt(count // 4, decoder["vocab_size"], batch, seen, device, VIDEO if frames else IMAGE)
    kinds = (inputs["input_ids"] == IMAGE).long() + 2 * (inputs["input_ids"] == VIDEO).long()
    return model, inputs | {"mm_token_type_ids": kinds}


def _page(rows: int, cols: int) -> Tensor:
    """[rows * cols, values] a page of text, black on white with margins, as Qwen's processor gives it."""
    import transformers as T
    from PIL import Image, ImageDraw, ImageFont

    from vtok.eval.bench.texts import prose

    page = Image.new("RGB", (14 * cols, 14 * rows), "white")
    margin, size = page.width // 10, 20
    words = " ".join(prose()[: page.width * page.height // size**2 * 2].split())
    lines = textwrap.wrap(words, (page.width - 2 * margin) * 2 // size)[: (page.height - 2 * margin) // (size + 6)]
    font = ImageFont.load_default(size)
    ImageDraw.Draw(page).multiline_text((margin, margin), "\n".join(lines), "black", font, spacing=6)
    return T.Qwen2VLImageProcessor()(images=page, return_tensors="pt")["pixel_values"]


def _random(model_class: Any, config: Any, device: str, dtype: torch.dtype) -> nn.Module:
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return model_class(config).eval()
        finally:
            torch.set_default_dtype(before)


def _prompt(
    count: int, vocab: int, batch: int, pictures: dict[str, Tensor], device: str, placeholder: int = IMAGE
) -> dict[str, Tensor]:
    words = torch.randint(IMAGE + 1, vocab, (1, TEXT)).expand(batch, -1)
    ids = [words[:, : TEXT // 2], torch.full((batch, count), placeholder), words[:, TEXT // 2 :]]
    inputs = {"input_ids": torch.cat(ids, 1), **pictures}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return {name: value.to(device) for name, value in inputs.items()}


def _smollm2(side: int, views: bool, batch: int, device: str, dtype: torch.dtype) -> Built:
    """SmolLM2 behind an untrained front: its speed is real, its answers about the picture are not."""
    language, _ = models.smollm2()
    text = language.config
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    model, inputs = _behind_clip(text, side, views, batch, device, dtype)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    return model, inputs


def _bundled(name: str, batch: int, device: str, dtype: torch.dtype) -> Built:
    """A bundled model, asked about the demo's picture."""
    from vtok import media, zoo
    from vtok.prompts import ask, encode

    model, processor = models.load(name, device, str(dtype).removeprefix("torch."))
    asked = ask(zoo.DEMO_QUESTION, media.open_picture(zoo.DEMO_IMAGE))
    return model, dict(encode(processor, [asked] * batch).to(model.device, dtype))


def _llavas(decoder: dict[str, int], side: int = 24) -> dict[int, Callable[..., Built]]:
    return {side**2: partial(llava, decoder, side, False), 5 * side**2: partial(llava, decoder, side, True)}


WORKLOADS = {
    "small": Workload("a random decoder of Vicuna's proportions behind a thin front of LLaVA", _llavas(LLAMA["small"])),
    "smollm2": Workload(
        "SmolLM2-135M-Instruct with its real weights behind a thin, untrained front of LLaVA",
        {576: partial(_smollm2, 24, False), 2880: partial(_smollm2, 24, True)},
    ),
    "llava-next-7b": Workload("a random LLaVA-NeXT-7B with a thin front", _llavas(LLAMA["7b"])),
    "qwen2.5-vl-3b": Workload(
        "a random Qwen2.5-VL-3B with a thin front",
        {576: partial(_qwen, QWEN["3b"], (24, 24)), 2880: partial(_qwen, QWEN["3b"], (48, 60))},
    ),
    "clip": Workload(
        "64 frames of 196 tokens before a random decoder of Vicuna's proportions, behind a thin front of Qwen2.5-VL",
        {12544: partial(_qwen, QWEN["small"], (14, 14), frames=64)},
    ),
    "page": Workload(
        "a page of text through four layers of Qwen's tower, before a random decoder of Vicuna's proportions",
        {1008: partial(_qwen, QWEN["small"], (36, 28), tower=WIDE, page=True)},
    ),
    "toy": Workload("a toy, to test the benchmark itself", _llavas(LLAMA["toy"], side=6)),
    "toy-qwen": Workload(
        "another toy", {36: partial(_qwen, QWEN["toy"], (6, 6)), 180: partial(_qwen, QWEN["toy"], (12, 15))}
    ),
}
