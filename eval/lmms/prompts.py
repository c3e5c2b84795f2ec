"""What a task of lmms-eval shows and asks, as the model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vtok.errors import Unsupported
from vtok.media import Clip, Sampling, open_clip, open_picture
from vtok.prompts import Conversation

IMAGE_MARK = "<image>"  # stands for a picture in the prompts of some tasks


@dataclass(frozen=True)
class Prompts:
    """For one model. family: its name, for messages. reads_clips: else it is shown their frames as pictures."""

    processor: Any
    family: str
    reads_clips: bool
    sampling: Sampling
    warn: Callable[[str], None]

    def conversation(self, messages: Iterable[dict[str, Any]]) -> Conversation:
        """Raises `Unsupported` where a message holds what is neither text, picture nor clip."""
        turns, pictures, clips = [], [], []
        marks = {getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video")} - {None}
        for message in messages:
            parts = message["content"]
            content: list[dict[str, Any]] = []
            for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
                kind = part["type"]
                if kind == "text":
                    text = part["text"]
                    for mark in marks:  # a word of the task's, and no picture
                        text = text.replace(mark, "")
                    content.append({"type": "text", "text": text})
                elif kind == "image":
                    pictures.append(open_picture(part.get("url", part.get("image"))))
                    content.append({"type": "image"})
                elif kind == "video":
                    clip = self._clip(part)
                    if self.reads_clips:
                        clips.append(clip)
                        content.append({"type": "video"})
                    else:
                        self.warn(f"{self.family} reads no clips: their frames are shown to it as pictures.")
                        pictures += clip.frames
                        content += [{"type": "image"}] * len(clip.frames)
                else:
                    raise Unsupported(f"A prompt holds {kind}, which {self.family} cannot read.")
            turns.append({"role": message["role"], "content": content})
        return Conversation(turns, tuple(pictures), tuple(clips))

    def _clip(self, part: dict[str, Any]) -> Clip:
        source, start, end = part.get("url", part.get("video")), part.get("start_time"), part.get("end_time")
        fps = part.get("fps")
        if isinstance(source, dict):  # what a task's doc_to_visual gives: a piece of a file, or frames and their rate
            start, end = source.get("video_start", start), source.get("video_end", end)
            fps = source.get("fps", fps)
            source = source.get("url") or source.get("path") or source.get("video")
        return open_clip(source, self.sampling, start, end, fps)


def question(visuals: Any, text: str) -> list[dict[str, Any]]:
    """One turn of the user: the pictures and clips, then the text; or each where the text has a mark for it."""
    parts = [_part(visual) for visual in (visuals or ())]
    pieces = text.split(IMAGE_MARK)
    if parts and len(pieces) == len(parts) + 1:
        content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for part, piece in zip(parts, pieces[1:]):
            content += [part, {"type": "text", "text": piece}] if piece else [part]
    else:
        content = [*parts, {"type": "text", "text": "".join(pieces)}]
    return [{"role": "user", "content": content}]


def _part(visual: Any) -> dict[str, Any]:
    if isinstance(visual, Image.Image):
        return {"type": "image", "url": visual}
    if isinstance(visual, str) and Path(visual).suffix.lower() in Image.registered_extensions():
        return {"type": "image", "url": visual}
    if isinstance(visual, dict) and "array" in visual:
        return {"type": "audio", "url": visual}
    return {"type": "video", "url": visual}
