"""Answers of a model to the questions of a task's item, by its plain processor and greedy `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Said:
    """An answer, and the sum of the log-probabilities of its tokens, the one that ends it among them."""

    text: str
    logprob: float


def answer(model: Any, processor: Any, item: Item, instruction: str = "", tokens: int = TOKENS) -> list[str]:
    """One answer a question, each asked alone, all in one batch.

    instruction: put behind each question. tokens: of an answer at most. Raises `Unsupported` where the processor takes
    no clips and the item is one.
    """
    return [said.text for said in say(model, processor, item, instruction, tokens)]


def say(model: Any, processor: Any, item: Item, instruction: str = "", tokens: int = TOKENS) -> list[Said]:
    """The same with how sure the model was."""
    inputs = read(processor, item, instruction).to(model.device)
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    told = {"return_dict_in_generate": True, "output_logits": True}
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **told)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(new, skip_special_tokens=True)
    logits = torch.stack(out.logits, 1).float()  # [B, tokens, V]
    each = logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]
    ends = torch.isin(new, torch.tensor(_ends(model), device=new.device)).long()
    behind = ends.cumsum(1) - ends > 0  # pads, which a row that has ended is given while others go on
    return [Said(text.strip(), x) for text, x in zip(texts, each.masked_fill(behind, 0).sum(1).tolist())]


def read(processor: Any, item: Item, instruction: str = "") -> Any:
    """What the processor makes of an item's questions, on the CPU. Raises as `answer`."""
    seen: Sequence[Any] = item.images
    if item.media == "video":
        if "video" not in media(processor):
            raise Unsupported(f"{type(processor).__name__} takes no clips.")
        seen = [Clip(item.images, item.fps)]
    return encode(processor, [ask(q.asked(instruction), *seen) for q in item.questions])


def _ends(model: Any) -> list[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
