"""Photos with coloured shapes, a small label, a handwritten digit and a plot: the questions of vtok-tiny-llava-next.

Crops of the photos that scikit-image and scikit-learn ship, darkened or brightened, with two to six shapes, a label of
two or three letters, a digit of scikit-learn's digits and a plot of a UCR series out of aeon. Pictures of 64 x 128 to
192 x 64 pixels; a label's letters are 9 to 11 pixels high.

Splits share no photo, digit, series or label.

Licences: code and wheels BSD-3-Clause; of the photos scikit-image's come with its wheel, most of them in the public
domain or CC0, and scikit-learn's are CC BY 2.0 (danielbuechele, vultilion); the UCR archive asks to be cited.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from vtok.eval.tasks import sources
from vtok.eval.tasks.task import Item, Question, Task

VERSION = 1  # of the test set: a change to anything that moves a pixel or a question raises it

# (width, height): the processor cuts them into 2, 2, 3, 3, 4, 4 and 4 crops of 64 x 64, the last two padded.
LAYOUTS = ((128, 64), (64, 128), (192, 64), (64, 192), (128, 128), (128, 96), (96, 128))
TILE = 64

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 85, 225),
    "yellow": (245, 225, 50),
    "orange": (250, 140, 25),
    "purple": (150, 60, 185),
    "white": (248, 248, 248),
    "black": (16, 16, 16),
}
ALPHABET = "ACEHKLPRTUXZ"
CATEGORIES = ("colour", "shape", "count", "position", "existence", "reading", "digit", "trend")

PHRASES = {
    "colour": ("What colour is the {}?", "What color is the {}?", "Which colour does the {} have?"),
    "shape": ("Which shape is {}?", "What shape is the {} object?"),
    "count": ("How many {} are there?", "How many {} do you see?"),
    "position": ("Where is the {}?", "In which corner is the {}?"),
    "existence": ("Is there a {}?", "Do you see a {}?"),
    "reading": ("What does the label say?", "What text is on the label?"),
    "digit": ("Which digit is written?", "What is the handwritten digit?"),
    "trend": ("How does the curve move?", "What is the trend of the plot?"),
}
ANSWERS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "count": ("1", "2", "3", "4", "5"),
    "position": ("top left", "top right", "bottom left", "bottom right"),
    "existence": ("yes", "no"),
    "reading": None,  # two or three letters of ALPHABET
    "digit": tuple("0123456789"),
    "trend": sources.TRENDS,
}


@dataclass(frozen=True)
class Thing:
    """What was drawn."""

    kind: str  # "shape", "label", "digit" or "plot"
    name: str  # the shape, the text, the digit or the trend
    colour: str | None  # of shapes
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels


def text_split(text: str) -> str:
    """Split that a label text belongs to, by its letters alone."""
    code = 0
    for letter in text:
        code = code * len(ALPHABET) + ALPHABET.index(letter) + 1
    return sources.split_of(code * 7919 % 1009)


def generate(split: str, seed: int, index: int) -> tuple[Item, list[Thing]]:
    """The `index`-th scene of a split ("train", "val" or "test") under a seed, and what was drawn in it.

    Its layout is `index % 7`. Its questions are shuffled: several a category, and one at least of every category that
    applies. What is small (text, digit) is readable in the crops of an anyres model and not in its thumbnail.
    """
    rng = np.random.default_rng((sources.SPLITS.index(split), seed, index))
    width, height = LAYOUTS[index % len(LAYOUTS)]
    photo = int(rng.integers(len(sources.PHOTOS[split])))
    image = background(rng, sources.photos(split)[photo], width, height)
    spots = Spots(rng, width, height)
    things: list[Thing] = []
    if rng.random() < 0.65:
        _plot(rng, split, image, spots, things)
    if rng.random() < 0.8:
        _label(rng, split, image, spots, things)
    if rng.random() < 0.8:
        _digit(rng, split, image, spots, things)
    _shapes(rng, image, spots, things)
    questions = _questions(rng, things, width, height)
    return Item(index, "image", (image,), tuple(questions), sources=(sources.PHOTOS[split][photo],)), things


class Spots:
    """Free places on the canvas, found by trial."""

    def __init__(self, rng, width, height):
        self.rng, self.width, self.height, self.taken = rng, width, height, []

    def find(self, w, h, in_tile=False):
        """Left and top of a free w x h place, or None. `in_tile`: wholly inside one crop of the processor."""
        left_edge, top_edge = (-(-side // TILE) * TILE - side for side in (self.width, self.height))
        for _ in range(40):
            x = int(self.rng.integers(1, self.width - w)) if self.width > w + 1 else None
            y = int(self.rng.integers(1, self.height - h)) if self.height > h + 1 else None
            if x is None or y is None:
                return None
            if in_tile:  # the picture sits in the middle of the padded canvas
                gx, gy = x + left_edge // 2, y + top_edge // 2
                if gx // TILE != (gx + w - 1) // TILE or gy // TILE != (gy + h - 1) // TILE:
                    continue
            if all(
                x >= right + 2 or x + w + 2 <= left or y >= bottom + 2 or y + h + 2 <= top
                for left, top, right, bottom in self.taken
            ):
                self.taken.append((x, y, x + w, y + h))
                return x, y
        return None


def background(rng, photo, width, height):
    scale = rng.uniform(1, min(4, photo.width / width, photo.height / height))
    w, h = width * scale, height * scale
    x, y = rng.uniform(0, photo.width - w), rng.uniform(0, photo.height - h)
    image = photo.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.5, 0.9))
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.1))


def outline(shape, turn):
    """Corners of a shape in the unit square, float [N, 2]; `turn` in radians."""
    if shape == "square":
        angles, radii = np.arange(4) * math.pi / 2 + math.pi / 4, 0.62
    elif shape == "diamond":
        return np.array([(0.5, 0), (0.82, 0.5), (0.5, 1), (0.18, 0.5)])
    elif shape == "triangle":
        return np.array([(0.5, 0.04), (0.98, 0.92), (0.02, 0.92)])
    elif shape == "star":
        angles, radii = np.arange(10) * math.pi / 5 - math.pi / 2, np.tile([0.54, 0.23], 5)
    else:  # cross
        a, b = 0.33, 0.67
        return np.array(
            [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
        )
    angles = angles + turn
    return 0.5 + np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def draw_shape(tile, kind, fill, edge, size, zoom, turn=0.0, shift=(0, 0)):
    """Draw a shape of `size` pixels, `zoom` times enlarged, `shift` enlarged pixels right and down of the corner."""
    pen, how = ImageDraw.Draw(tile), {"fill": fill, "outline": edge, "width": zoom}
    if kind == "circle":
        ends = np.array([[1], [size * zoom - 2]]) + shift
        pen.ellipse(ends.flatten().tolist(), **how)
    else:
        points = outline(kind, turn) * (size * zoom - 3) + 1 + shift
        pen.polygon([tuple(p) for p in points.tolist()], **how)


def _shapes(rng, image, spots, things):
    kinds, colours = rng.permutation(SHAPES).tolist(), rng.permutation(list(COLOURS)).tolist()
    repeat = rng.random() * 0.8  # how alike the shapes of this scene are
    drawn: list[str] = []
    for i in range(int(rng.integers(2, 7))):
        kind = str(rng.choice(drawn)) if drawn and rng.random() < repeat else kinds[len(set(drawn)) % len(kinds)]
        colour = colours[i] if rng.random() < 0.8 else str(rng.choice(colours))
        size = int(rng.choice([rng.integers(10, 13), rng.integers(13, 18), rng.integers(18, 25)]))
        spot = spots.find(size, size)
        if spot is None:
            continue
        drawn.append(kind)
        zoom = 4
        tile = image.crop((*spot, spot[0] + size, spot[1] + size)).resize((size * zoom,) * 2, Image.Resampling.NEAREST)
        fill = tuple(int(np.clip(c + rng.integers(-14, 15), 0, 255)) for c in COLOURS[colour])
        edge = (245, 245, 245) if colour in ("black", "blue", "purple") else (25, 25, 25)
        turn = 0.0 if kind == "circle" else rng.uniform(-0.15, 0.15)
        draw_shape(tile, kind, fill, edge, size, zoom, turn)
        image.paste(tile.resize((size, size), Image.Resampling.BOX), spot)
        things.append(Thing("shape", kind, colour, (*spot, spot[0] + size, spot[1] + size)))


def _label(rng, split, image, spots, things):
    while True:
        text = "".join(rng.choice(list(ALPHABET), size=int(rng.integers(2, 4))))
        if text_split(text) == split:
            break
    face = sources.font(str(rng.choice(sources.FONTS)), int(rng.integers(9, 12)))
    _, top, _, bottom = face.getbbox(text)
    w, h = math.ceil(face.getlength(text)) + 4, bottom - top + 4
    spot = spots.find(w, h, in_tile=True)
    if spot is None:
        return
    x, y = spot
    dark, light = rng.integers(0, 60, 3), rng.integers(205, 256, 3)
    paper, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
    pen = ImageDraw.Draw(image)
    pen.rectangle((x, y, x + w - 1, y + h - 1), fill=tuple(paper.tolist()))
    pen.text((x + 2, y + 2 - top), text, font=face, fill=tuple(ink.tolist()))
    things.append(Thing("label", text, None, (x, y, x + w, y + h)))


def _digit(rng, split, image, spots, things):
    digit = int(rng.integers(10))
    samples = sources.digits(split)[digit]
    ink = samples[int(rng.integers(len(samples)))]
    size = int(rng.integers(14, 19))
    spot = spots.find(size, size, in_tile=True)
    if spot is None:
        return
    mask = Image.fromarray(ink).resize((size - 2, size - 2), Image.Resampling.BICUBIC)
    tile = Image.new("RGB", (size, size), tuple(rng.integers(215, 256, 3).tolist()))
    tile.paste(tuple(rng.integers(0, 70, 3).tolist()), (1, 1), mask)
    image.paste(tile, spot)
    things.append(Thing("digit", str(digit), None, (*spot, spot[0] + size, spot[1] + size)))


def _plot(rng, split, image, spots, things):
    name = str(rng.choice(sources.TRENDS))
    rows = sources.curves(split)[name]
    curve = rows[int(rng.integers(len(rows)))]
    w, h = int(rng.integers(34, 49)), int(rng.integers(22, 31))
    spot = spots.find(w, h, in_tile=True)
    if spot is None:
        return
    zoom = 3
    tile = Image.new("RGB", (w * zoom, h * zoom), tuple(rng.integers(225, 256, 3).tolist()))
    pen = ImageDraw.Draw(tile)
    pen.line(
        [(4 * zoom, 3 * zoom), (4 * zoom, (h - 4) * zoom), ((w - 3) * zoom, (h - 4) * zoom)],
        (90, 90, 90),
        zoom,
    )
    xs = np.linspace(6, w - 4, len(curve)) * zoom
    ys = (h - 6 - curve * (h - 10)) * zoom
    colour = tuple(rng.integers(0, 170, 3).tolist())
    pen.line(list(zip(xs.tolist(), ys.tolist())), colour, int(1.6 * zoom), joint="curve")
    image.paste(tile.resize((w, h), Image.Resampling.BOX), spot)
    things.append(Thing("plot", name, None, (*spot, spot[0] + w, spot[1] + h)))


# ----------------------------------------------------------------------------------------------- questions


def _questions(rng, things, width, height):
    shapes = [t for t in things if t.kind == "shape"]
    names, hues = [t.name for t in shapes], [t.colour for t in shapes]
    pairs = {(t.colour, t.name) for t in shapes}
    lone = [t for t in shapes if names.count(t.name) == 1]  # named by its shape alone
    asked: list[Question] = []

    def ask(category, what, answer, about):
        phrase = str(rng.choice(PHRASES[category]))
        boxes = tuple((0, *thing.box) for thing in things if any(thing is one for one in about))
        text = phrase.format(what).replace(" a orange", " an orange")
        asked.append(Question(category, text, str(answer), boxes))

    def some(items, n):
        return [items[i] for i in rng.permutation(len(items))[:n]]

    for thing in some(lone, 2):
        ask("colour", thing.name, thing.colour, [thing])
    for thing in some([t for t in shapes if hues.count(t.colour) == 1], 2):
        ask("shape", thing.colour, thing.name, [thing])

    groups = {name + ("es" if name == "cross" else "s"): [t for t in shapes if t.name == name] for name in names}
    groups["shapes"] = shapes
    few = [(what, g) for what, g in sorted(groups.items()) if len(g) < 6]
    # Most kinds are there once: asked about less, so that 1 is no good guess.
    for what, group in some([(what, g) for what, g in few if rng.random() < (1 if len(g) > 1 else 0.3)], 2):
        ask("count", what, len(group), group)

    placed = [(t, t.name if t.kind == "shape" else t.kind) for t in things if t in lone or t.kind in _PANELS]
    for thing, what in some(placed, 2):
        dx = (thing.box[0] + thing.box[2]) / 2 - width / 2
        dy = (thing.box[1] + thing.box[3]) / 2 - height / 2
        if min(abs(dx), abs(dy)) >= 5:  # else no corner is plainly right
            ask("position", what, f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}", [thing])

    for _ in range(2):
        answer = bool(rng.random() < 0.5)
        if rng.random() < 0.4:  # colour and shape together; a "no" mixes two that are there, where it can
            free = [(c, n) for c in set(hues) for n in set(names) if (c, n) not in pairs]
            choice = sorted(pairs) if answer else sorted(free) or [(c, n) for c in COLOURS for n in SHAPES[:1]]
            choice = [p for p in choice if (p in pairs) == answer]
        else:
            kinds = {t.kind for t in things}
            choice = [("", n) for n in SHAPES if (n in names) == answer]
            choice += [("", k) for k in _PANELS if (k in kinds) == answer]
        if choice:
            colour, name = choice[int(rng.integers(len(choice)))]
            about = [t for t in things if name in (t.name, t.kind) and colour in ("", t.colour)] if answer else []
            ask("existence", f"{colour} {name}".strip(), "yes" if answer else "no", about)

    for thing in things:
        category = _PANELS.get(thing.kind)
        if category:
            ask(category, "", thing.name, [thing])
    return some(asked, len(asked))


_PANELS = {"label": "reading", "digit": "digit", "plot": "trend"}


def chance(category: str) -> float:
    """Share that drawing an answer at random gets right."""
    known, letters = ANSWERS[category], len(ALPHABET)
    return 1 / len(known) if known else 1 / (letters**2 + letters**3)


TASK = Task(
    name="scenes",
    title="Bundled visual questions",
    version=VERSION,
    media="image",
    chances={category: chance(category) for category in CATEGORIES},
    count=300,
    item=lambda split, seed, index: generate(split, seed, index)[0],
    card=__doc__,
)
