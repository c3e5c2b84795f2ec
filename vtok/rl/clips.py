"""Pictures and clips in the rows of a data set, for TRL's trainers, which know pictures alone.

seen = conversation(row, Sampling(nframes=8))      # row: {"prompt": [...], "video": "clip.mp4"}
inputs = processor(text=texts, **media([seen]))    # pixel_values_videos, video_grid_thw, ...

A column "image" or "video" holds one, "images" or "videos" a list. A clip is the path of a video file, decoded with
PyAV, or its frames in order, of which `fps` are a second if the row has that column.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vtok.errors import InvalidValue, Unsupported, VtokError
from vtok.media import Clip, Sampling, open_clip, open_picture
from vtok.prompts import Conversation, media

__all__ = ["COLUMNS", "as_parts", "check_clips", "conversation", "has_media", "media", "with_parts"]

COLUMNS = ("image", "images", "video", "videos")
MEDIA = ("image", "video")
SPREAD = Sampling()


def has_media(row: Mapping[str, Any]) -> bool:
    """Whether the rows of a data set bring pictures or clips, told by the columns of one."""
    return any(name in row for name in COLUMNS)


def conversation(row: Mapping[str, Any], how: Sampling = SPREAD, key: str = "prompt") -> Conversation:
    """The messages of the column `key`, a part for each picture and clip of the row, and these, opened.

    how: which frames of a clip are taken. Raises `InvalidValue`, which says what of the row is wrong.
    """
    pictures = tuple(open_picture(picture) for picture in _listed(row, "image"))
    clips = tuple(_opened(clip, how, row.get("fps")) for clip in _listed(row, "video"))
    return Conversation(with_parts(row[key], len(pictures), len(clips)), pictures, clips)


def with_parts(messages: Any, pictures: int = 0, clips: int = 0) -> list[dict[str, Any]]:
    """Messages `as_parts`, with a part {"type": "image"} or {"type": "video"} for each picture and clip.

    Where no message has such a part, they are put before the first text of the user, clips first. Raises
    `InvalidValue` where there are more or fewer such parts than pictures or clips."""
    told = as_parts(messages)
    parts = [part["type"] for message in told for part in message["content"]]
    wanted = {"video": clips, "image": pictures}
    if not any(kind in parts for kind in MEDIA) and (clips or pictures):
        first = next((message for message in told if message["role"] == "user"), None)
        if first is None:
            raise InvalidValue("There is no message of the user that could bring the picture or clip.")
        first["content"] = [{"type": kind} for kind, n in wanted.items() for _ in range(n)] + first["content"]
    elif any(parts.count(kind) != n for kind, n in wanted.items()):
        found = ", ".join(f"{parts.count(kind)} {kind}" for kind in MEDIA)
        raise InvalidValue(
            f"The messages have parts for {found}, and the row brings {pictures} pictures and {clips} clips. Leave all "
            f"such parts out, or give each picture and clip one."
        )
    return told


def as_parts(messages: Any) -> list[dict[str, Any]]:
    """Messages of which each content is a list of parts.

    Parts hold nothing but their type and text: templates that test `'video' in part` would else take the empty keys
    that a data set fills in for more clips. Raises `InvalidValue` for what are no messages."""
    if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
        raise InvalidValue(f"Prompts with pictures or clips are lists of messages, not {messages!r}.")
    return [{**message, "content": _parts(message.get("content"))} for message in messages]


def check_clips(dataset: Any, processor: Any) -> None:
    """Refuse, before a training starts, rows whose clips cannot be read: of each video file one frame is decoded.

    Frames that stand in the data set itself, and streamed data sets, are looked at only when their row's turn comes.
    Raises `Unsupported` where the processor takes no clips, and `InvalidValue`, which names file and row."""
    columns = [name for name in ("video", "videos") if name in (dataset.column_names or next(iter(dataset)))]
    if columns and getattr(processor, "video_processor", None) is None:
        raise Unsupported(f"{type(processor).__name__} takes no clips, and the data set has the column {columns[0]!r}.")
    if not hasattr(dataset, "select_columns") or not hasattr(dataset, "__len__"):
        return
    good = set()
    for name in columns:
        if not _of_text(dataset.features[name]):
            continue
        for number, row in enumerate(dataset.select_columns(name)):
            for file in _listed(row, "video"):
                if file in good:
                    continue
                try:
                    open_clip(file, Sampling(nframes=1), end=None if Path(file).is_dir() else 0.01)
                except VtokError as error:
                    raise type(error)(f"Row {number} of the data set: {error}") from error
                good.add(file)


def _of_text(feature: Any) -> bool:
    feature = getattr(feature, "feature", feature)  # of a list, what it is a list of
    return getattr(feature, "dtype", None) == "string"


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str) or content is None:
        return [{"type": "text", "text": content or ""}]
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in (*MEDIA, "text"):
            raise InvalidValue(f"A part of a message is of type text, image or video, not {part!r}.")
    return [{"type": p["type"]} if p["type"] in MEDIA else {"type": "text", "text": p["text"]} for p in content]


def _listed(row: Mapping[str, Any], kind: str) -> list[Any]:
    """The pictures or clips of a row: none where the column is missing or empty."""
    one, several = row.get(kind), row.get(f"{kind}s")
    if one is not None and several is not None:
        raise InvalidValue(f"A row has the column {kind!r} or {kind + 's'!r}, not both.")
    return [one] if one is not None else list(several if several is not None else ())


def _opened(clip: Any, how: Sampling, fps: float | None) -> Clip:
    if isinstance(clip, Clip):
        return clip
    if isinstance(clip, list) and clip and isinstance(clip[0], list):  # an array, as a data set gives it back
        clip = np.asarray(clip, dtype=np.uint8)
    return open_clip(clip, how, fps=fps)
