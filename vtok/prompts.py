"""The prompt builder: what a model is shown and asked, as its inputs, through its processor's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vtok.errors import Unsupported
from vtok.media import Clip


@dataclass(frozen=True)
class Conversation:
    """What the model is told. In `turns` a part {"type": "image"} or {"type": "video"} stands for the next of its
    `pictures` or `clips`."""

    turns: list[dict[str, Any]]
    pictures: tuple[Image.Image, ...] = ()
    clips: tuple[Clip, ...] = ()


def ask(question: str, *seen: Image.Image | Clip) -> Conversation:
    """One turn of the user: the pictures and clips, then the question."""
    parts: list[dict[str, Any]] = [{"type": "video" if isinstance(one, Clip) else "image"} for one in seen]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    pictures = tuple(one for one in seen if not isinstance(one, Clip))
    return Conversation([turn], pictures, tuple(one for one in seen if isinstance(one, Clip)))


def media(asked: Sequence[Conversation]) -> dict[str, Any]:
    """What a processor is given beside the text: all pictures and clips of these conversations, a row each. The frames
    of a clip are chosen already."""
    given: dict[str, Any] = {}
    pictures = [list(conversation.pictures) for conversation in asked]
    if any(pictures):
        given["images"] = pictures
    if clips := [clip for conversation in asked for clip in conversation.clips]:
        given["videos"] = [list(clip.frames) for clip in clips]
        given["video_metadata"] = [clip.metadata for clip in clips]
        given["do_sample_frames"] = False
    return given


def encode(processor: Any, asked: Sequence[Conversation], **template: Any) -> Any:
    """The model's inputs from its processor or tokenizer, a row a conversation, padded on the left, up to where its
    answer begins.

    template: what the processor's chat template takes beside the messages.

    Raises `Unsupported` without a chat template."""
    if getattr(processor, "chat_template", None) is None:
        raise Unsupported("This checkpoint's processor has no chat template, so the question cannot be put.")
    how = {**template, "tokenize": False, "add_generation_prompt": True}
    tokenizer = getattr(processor, "tokenizer", processor)
    turns = [c.turns if tokenizer is not processor else list(map(_plain, c.turns)) for c in asked]
    prompts = [processor.apply_chat_template(turn, **how) for turn in turns]
    given = media(asked)
    bos = tokenizer.bos_token
    if bos is not None and prompts[0].startswith(bos):  # the template writes it, and leaves the tokenizer none to add
        given["add_special_tokens"] = False
    return processor(text=prompts, padding=True, padding_side="left", return_tensors="pt", **given)


def _plain(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn as templates of language models want it: its text alone."""
    return {**turn, "content": "".join(part["text"] for part in turn["content"])}
