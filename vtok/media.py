"""Pictures and clips: opening them, and choosing frames. Video files are read with PyAV (the extra "viz")."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vtok.errors import InvalidValue, MissingExtra

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SEEK = 10.0  # seconds: nearer frames are reached by decoding on, farther ones by a jump to the key frame before them


# ---- pictures --------------------------------------------------------------------------------------------------------
def open_picture(source: str | Path | Image.Image) -> Image.Image:
    """A picture of a file, or one at hand, as models take it: see `rgb`. Raises `InvalidValue` where it is missing or
    cannot be read."""
    if isinstance(source, Image.Image):
        return rgb(source)
    if not isinstance(source, str | Path):
        raise InvalidValue(f"A picture is an image or the path of one, not {type(source)}.")
    try:
        with Image.open(source) as opened:
            return rgb(opened)
    except FileNotFoundError as error:
        raise InvalidValue(f"There is no picture {str(source)!r}.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidValue(f"{str(source)!r} is not a picture that can be read ({error}).") from error


def rgb(image: Image.Image) -> Image.Image:
    """The picture upright, as its EXIF data say, with 8 bits a colour. What is transparent becomes white, and grey of
    16 bits keeps its range, which Pillow's own conversion cuts at 255.

    Raises `InvalidValue` for numbers of which nobody says what is white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        low, high = image.getextrema()
        if image.mode == "F" or low < 0 or high > 0xFFFF:
            raise InvalidValue(
                f"A picture with values from {low:g} to {high:g} does not say what is white: save it with 8 or 16 bits "
                f"a channel."
            )
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- clips -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Clip:
    """Frames of one size, in order, and how many of them make a second."""

    frames: tuple[Image.Image, ...]
    fps: float = 2.0

    @property
    def metadata(self) -> dict[str, Any]:
        """What a processor has to be told of frames that are chosen already (`do_sample_frames=False`)."""
        n = len(self.frames)
        return {"fps": self.fps, "total_num_frames": n, "frames_indices": list(range(n))}


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


def spread(n: int, most: int) -> list[int]:
    """Indices of at most `most` of `n` things, evenly spread, each in the middle of its share."""
    k = min(n, most)
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def open_clip(
    source: Any,
    how: Sampling = Sampling(),
    start: float | None = None,
    end: float | None = None,
    fps: float | None = None,
) -> Clip:
    """The frames of a clip that `how` asks for, between `start` and `end` seconds.

    source: a video file; a folder of pictures of one size, in the order of their names (10 comes behind 9); pictures
        in order; or an array [frames, rows, cols, 3].
    fps: of pictures, how many are a second; 2 if left out.
    Raises `InvalidValue` where it cannot be read and, for a file without PyAV, `MissingExtra`.
    """
    if isinstance(source, str | Path):
        if not Path(source).exists():
            raise InvalidValue(f"There is no clip {str(source)!r}.")
        if not Path(source).is_dir():
            return _decode(Path(source), how, start, end)
        frames: Sequence[Any] = _files(Path(source))
    else:
        frames = _pictures(source)
    rate = fps or Clip.fps
    if start is not None or end is not None:
        first, last = (start or 0.0) * rate, len(frames) if end is None else end * rate
        frames = frames[math.floor(first) : max(math.floor(first) + 1, math.ceil(last))]
    total = len(frames)
    if not total:
        raise InvalidValue("A clip without frames.")
    chosen = spread(total, how.count(total / rate, total))
    pictures = tuple(open_picture(frames[i]) for i in chosen)
    if len(sizes := {picture.size for picture in pictures}) > 1:
        raise InvalidValue(f"The pictures of this clip are not of one size, but: {sorted(sizes)}.")
    return Clip(pictures, rate * len(chosen) / total)


def _files(folder: Path) -> list[Path]:
    key = lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name.lower())]
    files = sorted((file for file in folder.iterdir() if file.suffix.lower() in PICTURES), key=key)
    if not files:
        raise InvalidValue(f"The folder {str(folder)!r} holds no pictures.")
    return files


def _pictures(source: Any) -> Sequence[Image.Image]:
    if isinstance(source, Sequence) and all(isinstance(frame, Image.Image) for frame in source):
        return source
    with suppress(TypeError, ValueError, AttributeError):
        return tuple(Image.fromarray(frame) for frame in source)
    raise InvalidValue(f"A clip is a file, a list of pictures or an array [frames, rows, cols, 3], not {type(source)}.")


def _decode(file: Path, how: Sampling, start: float | None, end: float | None) -> Clip:
    try:
        import av
    except ImportError as error:
        raise MissingExtra('Reading a video file needs PyAV: pip install "vtok[viz]".') from error
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
