"""Frames of a clip for a model: which ones, and reading them with PyAV without decoding hours of what is not asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vtok.demo import rgb
from vtok.errors import InvalidValue, MissingExtra
from vtok.show import Clip, spread

SEEK = 10.0  # seconds: nearer frames are reached by decoding on, farther ones by a jump to the key frame before them


@dataclass(frozen=True)
class Sampling:
    """How many frames a clip gives, evenly spread, each from the middle of its share.

    nframes: exactly so many, or all of a shorter clip. fps: else so many a second. max_frames: at most so many; where
        neither is given, so many.
    """

    nframes: int | None = None
    fps: float | None = None
    max_frames: int = 32

    def __post_init__(self) -> None:
        for name in ("nframes", "fps", "max_frames"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidValue(f"{name} must be above 0, got {value!r}.")
        if self.nframes is not None and self.fps is not None:
            raise InvalidValue("Give nframes or fps, not both.")

    def count(self, seconds: float, total: int) -> int:
        """Frames of a clip of so many seconds and `total` frames."""
        wanted = self.nframes or self.max_frames
        if self.fps is not None:
            wanted = min(self.max_frames, math.ceil(seconds * self.fps - 1e-9))
        return max(1, min(wanted, total))


def open_clip(
    source: Any, how: Sampling, start: float | None = None, end: float | None = None, fps: float | None = None
) -> Clip:
    """The frames of a clip that `how` asks for, between `start` and `end` seconds.

    source: a video file, or pictures in order, `fps` of them a second (2 if left out). Raises `InvalidValue` where it
    cannot be read.
    """
    if isinstance(source, str | Path):
        return _decode(Path(source), how, start, end)
    clip = Clip(_pictures(source), fps or Clip.fps)
    if start is not None or end is not None:
        first, last = (start or 0.0) * clip.fps, len(clip.frames) if end is None else end * clip.fps
        clip = Clip(clip.frames[math.floor(first) : max(math.floor(first) + 1, math.ceil(last))], clip.fps)
    total = len(clip.frames)
    if not total:
        raise InvalidValue("A clip without frames.")
    chosen = spread(total, how.count(total / clip.fps, total))
    return Clip(tuple(clip.frames[i] for i in chosen), clip.fps * len(chosen) / total)


def _pictures(source: Any) -> tuple[Image.Image, ...]:
    if isinstance(source, Sequence) and all(isinstance(frame, Image.Image) for frame in source):
        return tuple(map(rgb, source))
    with suppress(TypeError, ValueError, AttributeError):
        return tuple(Image.fromarray(frame) for frame in source)
    raise InvalidValue(f"A clip is a file, a list of pictures or an array [frames, rows, cols, 3], not {type(source)}.")


def _decode(file: Path, how: Sampling, start: float | None, end: float | None) -> Clip:
    try:
        import av
    except ImportError as error:
        raise MissingExtra('Reading a video file needs PyAV: pip install "vtok[eval]".') from error
    if not file.is_file():
        raise InvalidValue(f"There is no clip {str(file)!r}.")
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate, length = float(stream.average_rate or 25), _length(container, stream)
            first, last = start or 0.0, min(end or math.inf, length)
            if not first < last:
                raise InvalidValue(f"{str(file)!r} is {length:.1f} s long, and seconds {first} to {end} are asked for.")
            n = how.count(last - first, max(1, round((last - first) * rate)))
            times = [first + (last - first) * (i + 0.5) / n for i in range(n)]
            frames = _at(container, stream, times, 0.5 / rate)
    except (av.error.FFmpegError, IndexError, OSError) as error:  # IndexError: it has sound alone
        raise InvalidValue(f"{str(file)!r} is not a clip that can be read ({error}).") from error
    return Clip(frames, n / (last - first))


def _length(container: Any, stream: Any) -> float:
    """Seconds of a video stream. Few files do not say; those are decoded once for it."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return container.duration / 1e6
    total = sum(1 for _ in container.decode(video=0))
    container.seek(0)
    return total / float(stream.average_rate or 25)


def _at(container: Any, stream: Any, times: list[float], slack: float) -> tuple[Image.Image, ...]:
    """The frames that are on the screen at these seconds, ascending, counted from the stream's first."""
    zero = float((stream.start_time or 0) * stream.time_base)
    frames, shown = [], None  # `shown`: the last decoded frame
    decoder = container.decode(stream)
    for time in times:
        now = zero + time - 2 * slack  # a frame stays for that long
        if now - (zero if shown is None else shown.time) > SEEK:
            container.seek(int((zero + time) / stream.time_base), stream=stream)
            decoder, shown = container.decode(stream), None
        while shown is None or shown.time <= now:
            following = next(decoder, None)
            if following is None:
                break
            shown = following
        if shown is None:
            raise InvalidValue("It has no frames.")
        frames.append(shown.to_image())
    return tuple(frames)
