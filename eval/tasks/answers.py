"""Answers of a model to the questions of a task's item, by its plain processor and greedy `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vtok.errors import Unsupported
from vtok.eval.tasks.task import Item
from vtok.show import Clip

TOKENS = 16  # of an answer at most


def media(processor: Any) -> tuple[str, ...]:
    """What a processor takes: "image", and "video" if it reads clips, be it as pictures, as InternVL's does."""
    return ("image",) if getattr(processor, "video_processor", None) is None else ("image", "video")


def answer(model: Any, processor: Any, item: Item, instruction: str = "", tokens: int = TOKENS) -> list[str]:
    """One answer a question, each asked alone, all in one batch.

    instruction: put behind each question. tokens: of an answer at most. Raises `Unsupported` where the processor takes
    no clips and the item is one.
    """
    count = len(item.questions)
    if item.media == "video":
        if "video" not in media(processor):
            raise Unsupported(f"{type(processor).__name__} takes no clips.")
        content, clip = [{"type": "video"}], Clip(item.images, item.fps)
        shown = {"videos": [list(clip.frames)] * count, "video_metadata": [clip.metadata] * count}
        shown["do_sample_frames"] = False
    else:
        content = [{"type": "image"}] * len(item.images)
        shown = {"images": [list(item.images)] * count}
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": f"{q.text} {instruction}".strip()}]}],
            add_generation_prompt=True,
        )
        for q in item.questions
    ]
    inputs = encode(processor, prompts, **shown).to(model.device, model.dtype)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def encode(processor: Any, prompts: Sequence[str], **media: Any) -> Any:
    """What a model is given: a row a prompt, padded on the left.

    A template that writes the beginning-of-sequence token leaves the tokenizer none to add.
    """
    bos = processor.tokenizer.bos_token
    if bos is not None and prompts[0].startswith(bos):
        media["add_special_tokens"] = False
    return processor(text=list(prompts), padding=True, padding_side="left", return_tensors="pt", **media)
