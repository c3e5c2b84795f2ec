"""The kept tokens drawn over the picture, one panel a method. Needs matplotlib (the extra "viz")."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtok.engine.trace import Picture, Trace
from vtok.errors import InvalidValue, MissingExtra
from vtok.types import Layout, Plane

INK, FAINT, OTHER = "#1c1c1c", "#6b6b6b", "#b3261e"
TALL, WIDE, GAP = 2.9, 4.4, 0.34  # inches: at most, of a panel's picture; and between panels
HEAD, LINE = 0.44, 0.18  # inches: of name and caption, and of a line of the answer
INSET = 0.36  # size of the thumbnail beside the picture, as a part of it
DPI = 200
DROPPED = 0.12  # how much of a dropped token's colour is left
# Dropped tokens fade into the veil that differs most from the picture, and the outlines stand out from both.
ON_DARK, ON_BRIGHT = (0.93, "#ffd21f"), (0.22, "#ff7a1a")


@dataclass(frozen=True)
class Panel:
    """What one method did to one picture.

    name, caption, answer: the words of the panel: the method, what it kept, what the model then said, if that is
        to be told here.
    layout: where the N tokens lie.
    seen: [N] the part of the decoder's layers that work on each token, in [0, 1] (a keep mask is fine).
    merged_into: [N] long or None, see `Selection`. Merged tokens are shown in one colour, their mean.
    scale: in (0, 1], by how much the sides of the picture shrank before the encoder saw it.
    frame: which of a clip's planes is drawn.
    """

    name: str
    caption: str
    answer: str | None
    layout: Layout
    seen: Tensor
    merged_into: Tensor | None = None
    scale: float = 1.0
    frame: int = 0


def panel(method: str, answer: str, trace: Trace | None, reference: Trace) -> Panel:
    """What to draw of one method's answer about one picture. trace: None for the dense model. reference: any trace of
    the picture, for the dense model's layout."""
    picture, tokens = (trace or reference).pictures[0], sum(reference.n_visual)
    if trace is None:
        return Panel(method, f"{tokens} visual tokens", answer, picture.dense, torch.ones(picture.dense.n))
    layers = trace.shapes.layers
    caption = f"{round(trace.mean_keep * tokens)} of {tokens} visual tokens"
    seen = torch.stack([trace.held_at(layer)[0] for layer in range(layers)]).mean(0)  # [N]
    if trace.n_kept_at(layers - 1) != trace.n_kept:
        caption += ", mean over layers"
    if round(trace.mean_keep * tokens) != (held := round(float(seen.sum()))):
        caption += f", {held} cached"
    return placed(Panel(method, caption, answer, picture.dense, seen, trace.merged_into[0]), picture)


def placed(drawn: Panel, picture: Picture) -> Panel:
    """A panel over the tokens of `picture` in the prompt, moved to those of the smaller one that the encoder saw."""
    if picture.source is None:
        return drawn
    # they stand on `source` of the dense ones
    source, merged = picture.source.cpu(), drawn.merged_into
    if merged is not None:
        small = torch.full((picture.dense.n + 1,), -1)  # the last: for the -1 of dropped tokens
        small[source] = torch.arange(len(source))
        merged = small[merged[source]]
    scale = (picture.layout.n / picture.dense.n) ** 0.5
    return replace(drawn, layout=picture.layout, seen=drawn.seen[source], merged_into=merged, scale=scale)


def panels(
    picture: Image.Image, items: Sequence[Panel | None], question: str = "", columns: int | None = None
) -> Image.Image:
    """Draw one panel for each item: kept tokens clear in a thin outline, dropped ones faded away. None leaves a gap.

    The plane of full detail (the crops, or the only one) is drawn over the picture, and the thumbnail, where
    there is one, small beside it. Answers that are not the first panel's are red. Returns an RGB picture of 200
    pixels an inch.
    """
    figure_class, canvas_class = _matplotlib()
    given = [item for item in items if item is not None]
    if not given:
        raise InvalidValue("There is nothing to draw: give at least one panel.")
    inset = any(len(planes(item)) > 1 for item in given)
    aspect = picture.height / picture.width
    full = 1 + (INSET if inset else 0)
    width = min(WIDE / full, TALL / aspect)
    tall = width * aspect
    panel = max(width * full, 1.6)  # room for the words
    said = ["" if item is None or item.answer is None else f"“{item.answer}”" for item in items]
    answers = [textwrap.wrap(text, int(panel / 0.088), max_lines=3) for text in said]
    foot = 0.1 + LINE * max(map(len, answers))
    cell = (panel + GAP, HEAD + tall + foot + 0.12)
    columns = columns or columns_of(len(items), cell[0] / cell[1])
    rows = -(-len(items) // columns)
    title = textwrap.wrap(question, int((columns * cell[0] - GAP) / 0.14), max_lines=3)
    top = 0.25 + 0.25 * len(title)
    sheet = _Sheet(figure_class, (columns * cell[0] + GAP, rows * cell[1] + top))
    sheet.words(GAP, top - 0.07 - 0.25 * len(title), "\n".join(title), 13, INK, weight="bold")
    style = look(picture)
    for i, item in enumerate(items):
        if item is None:
            continue
        left, y = GAP + (i % columns) * cell[0], top + (i // columns) * cell[1]
        colour = INK if item.answer == given[0].answer else OTHER
        sheet.words(left, y, item.name, 11, INK, weight="bold")
        sheet.words(left, y + 0.2, item.caption, 8.5, FAINT)
        sheet.words(left, y + HEAD + tall + 0.08, "\n".join(answers[i]), 10, colour)
        places = [(left, y + HEAD, width, tall)]
        places.append((left + width * 1.03, y + HEAD, width * (INSET - 0.03), tall * (INSET - 0.03)))
        for place, index in zip(places, planes(item)):
            _plane(sheet.axes(*place), place, picture, item, index, *style)
    canvas = canvas_class(sheet.figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a letter the font lacks is drawn as a box
        canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3]  # [Y, X, 3]
    return Image.fromarray(np.ascontiguousarray(drawn))


def save(image: Image.Image, file: str | Path) -> Path:
    """Write a PNG, making its folder if need be. Raises `InvalidValue` where it cannot be written."""
    file = Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, format="PNG")
    except OSError as error:
        raise InvalidValue(f"The picture could not be written to {str(file)!r} ({error.strerror}).") from error
    return file


def check() -> None:
    """Raise `MissingExtra` where matplotlib is not installed."""
    _matplotlib()


def _matplotlib() -> tuple[Any, Any]:
    # Figure and canvas are used without pyplot, so that the caller's backend and open figures are left alone.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra('Drawing needs matplotlib: pip install "vtok[viz]".') from error
    return Figure, FigureCanvasAgg


class _Sheet:
    """A figure measured in inches from its upper left corner."""

    def __init__(self, figure_class: Any, size: tuple[float, float]) -> None:
        self.size = size
        self.figure = figure_class(figsize=size, dpi=DPI, facecolor="white")

    def words(self, x: float, y: float, text: str, points: float, colour: str, **font: Any) -> None:
        x, y = x / self.size[0], 1 - y / self.size[1]
        self.figure.text(x, y, text, fontsize=points, color=colour, va="top", parse_math=False, **font)

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        wide, tall = self.size
        return self.figure.add_axes((left / wide, 1 - (top + height) / tall, width / wide, height / tall))


def columns_of(n: int, ratio: float) -> int:
    """Columns for panels of width / height `ratio`: a sheet of about 3:2 with few empty places."""
    return min(range(1, n + 1), key=lambda c: abs(math.log(c / -(-n // c) * ratio / 1.5)) + 0.25 * (-n % c))


def planes(item: Panel) -> list[int]:
    """Indices of the planes to draw: the crops, the only one or one of a clip's, then the thumbnail."""
    parts = item.layout.planes
    drawn = (i for i, plane in enumerate(parts) if plane.size)  # a banner's crops may have been padding alone
    order = sorted(drawn, key=lambda i: parts[i].kind == "thumbnail")
    return [order[item.frame], *(i for i in order[1:] if parts[i].kind == "thumbnail")]


def look(picture: Image.Image) -> tuple[float, str]:
    """The grey into which dropped tokens fade, in [0, 1], and the colour of outlines."""
    brightness = float(np.asarray(picture.convert("L").resize((32, 32))).mean()) / 255
    return ON_BRIGHT if brightness > 0.5 else ON_DARK


def cells(item: Panel, index: int) -> tuple[Any, Any]:
    """seen, owner: [rows, cols] of one plane, as they are shown.

    A merged token is seen as long as the one that stands for it, which `owner` names; owner is None where nothing was
    merged, and -1 for dropped tokens."""
    plane, start = item.layout.planes[index], item.layout.starts[index]
    tokens, shape = slice(start, start + plane.size), (plane.rows, plane.cols)
    if item.merged_into is None:
        return item.seen[tokens].float().reshape(shape).numpy(), None
    owner = item.merged_into[tokens].reshape(shape).numpy()
    return np.where(owner >= 0, item.seen.float().numpy()[owner], 0.0), owner


def colours(picture: Image.Image, item: Panel, index: int, pixels: tuple[int, int]) -> Any:
    """[Y, X, 3] in [0, 1]: the picture as one plane of tokens sees it, none being dropped, in `pixels` = (X, Y)."""
    plane = item.layout.planes[index]
    box = [part * length for part, length in zip(plane.box, picture.size * 2)]
    image = picture.convert("RGB").resize(pixels, Image.Resampling.LANCZOS, box=box)
    if item.scale < 1:
        small = [max(1, round(side * item.scale)) for side in picture.size]
        image = image.resize(small, Image.Resampling.BOX).resize(pixels, Image.Resampling.BICUBIC)
    seen = np.asarray(image).astype(np.float32) / 255  # [Y, X, 3]
    owner = cells(item, index)[1]
    return seen if owner is None else _mean_colour(seen, owner[_cell_of(plane, pixels)])


def _cell_of(plane: Plane, pixels: tuple[int, int]) -> tuple[Any, Any]:
    """row [Y, 1] and column [X] of the cell in which each pixel lies."""
    row = np.arange(pixels[1]) * plane.rows // pixels[1]
    return row[:, None], np.arange(pixels[0]) * plane.cols // pixels[0]


def _plane(
    axes: Any, place: tuple[float, ...], picture: Image.Image, item: Panel, index: int, veil: float, edge: str
) -> None:
    """Draw the picture as one plane of tokens shows it; `place` is (left, top, width, height) in inches."""
    from matplotlib.collections import LineCollection

    plane, seen = item.layout.planes[index], cells(item, index)[0]
    pixels = (max(1, round(place[2] * DPI)), max(1, round(place[3] * DPI)))
    whole = colours(picture, item, index, pixels)  # [Y, X, 3]
    strength = (DROPPED + (1 - DROPPED) * seen)[_cell_of(plane, pixels)][..., None]  # [Y, X, 1]
    faded = 0.35 * (whole.mean(-1, keepdims=True) - 0.5) + veil
    shown = strength * whole + (1 - strength) * np.clip(faded, 0, 1)
    axes.imshow(shown, extent=(0, plane.cols, plane.rows, 0), aspect="auto", interpolation="nearest")
    axes.set_axis_off()
    thickness = float(np.clip(place[2] / plane.cols * 72 / 14, 0.25, 0.9))  # points, by the width of a cell
    axes.add_collection(LineCollection(outlines(item, index), colors=edge, linewidths=thickness))


def _mean_colour(colours: Any, owner: Any) -> Any:
    """Each pixel [Y, X, 3] gets the mean colour of the pixels with the same owner [Y, X]."""

    _, group = np.unique(owner, return_inverse=True)
    group = group.reshape(owner.shape)
    count = np.bincount(group.ravel())
    sums = [np.bincount(group.ravel(), weights=colours[..., c].ravel()) / count for c in range(3)]
    return np.stack(sums, -1)[group]


def outlines(item: Panel, index: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The edges, in cells, around the tokens of a plane that are seen longest, and between those of different owners.
    None where the plane is untouched."""
    seen, owner = cells(item, index)
    if owner is None and seen.min() == 1 and item.scale == 1:
        return []
    rows, cols = seen.shape
    kept = (seen > 0) & (seen == seen.max())
    who = np.arange(rows * cols).reshape(rows, cols) if owner is None else owner
    name = np.full((rows + 2, cols + 2), -1)  # -1: not outlined
    name[1:-1, 1:-1] = np.where(kept, who, -1)
    across = np.argwhere(name[:-1, 1:-1] != name[1:, 1:-1])  # [E, 2] (row, col) of horizontal edges
    down = np.argwhere(name[1:-1, :-1] != name[1:-1, 1:])  # [E, 2] of vertical edges
    return [((c, r), (c + 1, r)) for r, c in across.tolist()] + [((c, r), (c, r + 1)) for r, c in down.tolist()]
