"""Drawing that the offline tasks share: photos behind, anti-aliased shapes, text on paper; and sheets to look at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vtok.eval.tasks import scenes, sources

if TYPE_CHECKING:
    from vtok.eval.tasks.task import Item

INK = {  # no two of them are taken for one another in a few pixels
    "red": (215, 35, 35),
    "green": (35, 160, 60),
    "blue": (40, 80, 225),
    "yellow": (250, 225, 40),
    "orange": (250, 135, 20),
    "purple": (150, 55, 185),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
DARK = ("red", "green", "blue", "purple", "black")  # on which white text reads; black reads on the others
CODES = "ACEFHJKLMNPRTUXY34679"  # no two of them look alike in 10 pixels


def photo(rng: np.random.Generator, split: str, width: int, height: int) -> tuple[Image.Image, str]:
    """A crop of one of the split's photos, and the photo's name."""
    chosen = int(rng.integers(len(sources.PHOTOS[split])))
    return scenes.background(rng, sources.photos(split)[chosen], width, height), sources.PHOTOS[split][chosen]


def edge_of(colour: str) -> tuple[int, int, int]:
    return (245, 245, 245) if colour in DARK else (25, 25, 25)


def shape(image: Image.Image, kind: str, fill, edge, left: float, top: float, size: int, zoom: int = 4) -> None:
    """Draw one of `scenes.SHAPES` into the square of `size` pixels; `left` and `top` may be fractions of a pixel or
    lie outside."""
    x, y = math.floor(left), math.floor(top)
    area = (x, y, x + size + 1, y + size + 1)
    tile = image.crop(area).resize(((size + 1) * zoom,) * 2, Image.Resampling.NEAREST)
    scenes.draw_shape(tile, kind, fill, edge, size, zoom, shift=((left - x) * zoom, (top - y) * zoom))
    image.paste(tile.resize((size + 1,) * 2, Image.Resampling.BOX), (x, y))


def disc(image: Image.Image, fill, centre: tuple[float, float], diameter: float) -> None:
    """An anti-aliased spot."""
    zoom, reach = 8, math.ceil(diameter / 2) + 1
    x, y = round(centre[0]) - reach, round(centre[1]) - reach
    side = 2 * reach * zoom
    mask = Image.new("L", (side, side))
    cx, cy = (centre[0] - x) * zoom, (centre[1] - y) * zoom
    r = diameter / 2 * zoom
    ImageDraw.Draw(mask).ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
    image.paste(fill, (x, y), mask.resize((2 * reach, 2 * reach), Image.Resampling.BOX))


def text_size(text: str, face) -> tuple[int, int]:
    """Width and height of the ink of `text`, in pixels."""
    left, top, right, bottom = face.getbbox(text)
    return math.ceil(right - min(left, 0)), bottom - top


def tag(image: Image.Image, text: str, face, paper, ink, left: int, top: int, pad: int = 3) -> tuple:
    """Text on a rectangle of paper; returns the rectangle."""
    w, h = text_size(text, face)
    box = (left, top, left + w + 2 * pad, top + h + 2 * pad)
    pen = ImageDraw.Draw(image)
    pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=paper)
    pen.text((left + pad, top + pad - face.getbbox(text)[1]), text, font=face, fill=ink)
    return box


def strip(item: Item) -> Image.Image:
    """The pictures of an item side by side."""
    width = sum(image.width + 2 for image in item.images) - 2
    drawn = Image.new("RGB", (width, max(image.height for image in item.images)), "white")
    x = 0
    for image in item.images:
        drawn.paste(image, (x, 0))
        x += image.width + 2
    return drawn


def sheet(items: list[Item], zoom: int = 2) -> Image.Image:
    """Items in columns, enlarged, each with its questions and answers under it."""
    font, line, cells = ImageFont.load_default(), 13, []
    for item in items:
        picture = strip(item)
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
        texts = [f"{q.category}: {q.text} {q.answer}" for q in item.questions]
        width = max(picture.width, *(int(font.getlength(text)) + 4 for text in texts))
        cell = Image.new("RGB", (width, picture.height + line * len(texts) + 4), "white")
        cell.paste(picture, (0, 0))
        pen = ImageDraw.Draw(cell)
        for i, text in enumerate(texts):
            pen.text((2, picture.height + line * i), text, font=font, fill="black")
        cells.append(cell)
    width = max(cell.width for cell in cells) + 6
    columns = max(1, 1600 // width)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) + 6 for row in rows]
    drawn = Image.new("RGB", (width * min(columns, len(cells)), sum(heights)), (200, 200, 200))
    y = 0
    for row, height in zip(rows, heights):
        for i, cell in enumerate(row):
            drawn.paste(cell, (i * width, y))
        y += height
    return drawn
