"""Answers of a model to the questions of a task's item, by its plain processor and greedy `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vtok.errors import Unsupported
from vtok.eval.tasks.task import Item
from vtok.media import Clip
from vtok.prompts import ask, encode

TOKENS = 16  # of an answer at most


def media(processor: Any) -> tuple[str, ...]:
    """What a processor takes: "image", and "video" if it reads clips, be it as pictures, as InternVL's does; of a
    tokenizer "text" alone, and of a processor that says it (`vtok.words`) that."""
    if hasattr(processor, "media"):
        return processor.media
    if not hasattr(processor, "tokenizer"):
        return ("text",)
    return ("image",) if getattr(processor, "video_processor", None) is None else ("image", "video")


def answer(model: Any, processor: Any, item: Item, instruction: str = "", tokens: int = TOKENS) -> list[str]:
    """One answer a question, each asked alone, all in one batch.

    instruction: put behind each question. tokens: of an answer at most. Raises `Unsupported` where the processor takes
    no clips and the item is one.
    """
    seen: Sequence[Any] = item.images
    if item.media == "video":
        if "video" not in media(processor):
            raise Unsupported(f"{type(processor).__name__} takes no clips.")
        seen = [Clip(item.images, item.fps)]
    asked = [ask(f"{q.text} {instruction}".strip(), *seen) for q in item.questions]
    inputs = encode(processor, asked).to(model.device)
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
