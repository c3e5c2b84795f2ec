"""Answers of a model to the questions of a task's item, by its plain processor and greedy `generate`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vtok.errors import Unsupported
from vtok.eval.task import Item

TOKENS = 16  # of an answer at most


def answer(model: Any, processor: Any, item: Item, instruction: str = "") -> list[str]:
    """One answer a question, each asked alone, all in one batch.

    instruction: put behind each question. Raises `Unsupported` where the processor takes no clips and the item is one.
    """
    count = len(item.questions)
    if item.media == "video":
        if getattr(processor, "video_processor", None) is None:
            raise Unsupported(f"{type(processor).__name__} takes no clips.")
        content = [{"type": "video"}]
        frames = np.stack([np.asarray(image) for image in item.images])  # [T, H, W, 3]
        about = {"fps": item.fps, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
        media = {"videos": [frames] * count, "video_metadata": [about] * count, "do_sample_frames": False}
    else:
        content = [{"type": "image"}] * len(item.images)
        media = {"images": [list(item.images)] * count}
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": f"{q.text} {instruction}".strip()}]}],
            add_generation_prompt=True,
        )
        for q in item.questions
    ]
    inputs = processor(text=prompts, padding=True, padding_side="left", return_tensors="pt", **media).to(model.device)
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
