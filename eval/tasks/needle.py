"""A detail of a few pixels in a large busy picture: what a smaller picture or a careless selection loses.

A crop of a photo of scikit-image or scikit-learn, 256 x 256, 256 x 192 or 192 x 256 pixels, with tags that bear a code
of two or three characters 8 to 9 pixels high (`code`), shapes that bear a dot 4 to 5 pixels wide (`dot`: its colour;
`mark`: the shape that bears the dot of a colour), dice with dots 3 pixels wide (`dice`: how many) and rings
with a gap of 3 to 4 pixels (`gap`: on which side). Each kind is there several times, in distinct colours, so that the
question tells which one is meant and the others distract.

Splits share no photo and no code. All answers of a category but `code` are equally likely.

Licences: code and wheels BSD-3-Clause; of the photos scikit-image's come with its wheel, most of them in the public
domain or CC0, and scikit-learn's are CC BY 2.0 (danielbuechele, vultilion); fonts: DejaVu, out of matplotlib.
"""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from vtok.eval.tasks import canvas, scenes, sources
from vtok.eval.tasks.canvas import CODES, INK
from vtok.eval.tasks.task import Item, Question, Task, generator, owner

SIZES = ((256, 256), (256, 192), (192, 256))
BODIES = ((150, 150, 150), (196, 172, 140), (120, 140, 150))  # of shapes with dots: no colour that a dot has
DOTS = ("red", "green", "blue", "yellow", "white", "black")
PAPERS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple")
SIDES = ("right", "bottom", "left", "top")  # by the angle of the gap, clockwise from the right


def item(split: str, seed: int, index: int) -> Item:
    rng = generator("needle", split, seed, index)
    width, height = SIZES[index % len(SIZES)]
    image, photo = canvas.photo(rng, split, width, height)
    spots = scenes.Spots(rng, width, height)
    asked: list[Question] = []

    def ask(category, text, answer, box):
        asked.append(Question(category, text, str(answer), ((0, *box),)))

    shapes = rng.permutation(scenes.SHAPES)[: rng.integers(4, 7)].tolist()
    colours = rng.permutation(DOTS)[: len(shapes)].tolist()
    body = BODIES[int(rng.integers(len(BODIES)))]
    placed = []
    for kind, colour in zip(shapes, colours):
        size = int(rng.integers(22, 29))
        spot = spots.find(size, size)
        if spot:
            box = (*spot, spot[0] + size, spot[1] + size)
            canvas.shape(image, kind, body, (25, 25, 25), *spot, size)
            middle = (spot[0] + size / 2, spot[1] + size * (0.62 if kind == "triangle" else 0.5))
            canvas.disc(image, INK[colour], middle, rng.uniform(4, 5))
            placed.append((kind, colour, box))
    order = rng.permutation(len(placed))
    kind, colour, box = placed[order[0]]
    ask("dot", f"What colour is the dot on the {kind}?", colour, box)
    kind, colour, box = placed[order[-1]]
    ask("mark", f"Which shape has the {colour} dot?", kind, box)

    papers = rng.permutation(PAPERS).tolist()
    for colour in papers[:3]:
        text = code(rng, split)
        face = sources.font(str(rng.choice(sources.FONTS)), int(rng.integers(11, 13)))
        w, h = canvas.text_size(text, face)
        spot = spots.find(w + 6, h + 6)
        if spot:
            box = canvas.tag(image, text, face, INK[colour], canvas.edge_of(colour), *spot)
            ask("code", f"What is the code on the {colour} tag?", text, box)
    for colour in rng.permutation(PAPERS).tolist()[:3]:
        spot = spots.find(18, 18)
        if spot:
            pips = int(rng.integers(1, 7))
            box = die(image, pips, INK[colour], canvas.edge_of(colour), *spot)
            ask("dice", f"How many dots are on the {colour} die?", pips, box)
    for colour in rng.permutation(PAPERS).tolist()[:3]:
        spot = spots.find(17, 17)
        if spot:
            side = int(rng.integers(4))
            box = ring(image, side, INK[colour], canvas.edge_of(colour), *spot)
            ask("gap", f"Where is the gap in the {colour} ring?", SIDES[side], box)
    questions = tuple(asked[i] for i in rng.permutation(len(asked)))
    return Item(index, "image", (image,), questions, sources=(photo,))


def code(rng, split: str) -> str:
    """A code of two or three characters that belongs to the split."""
    while True:
        text = "".join(rng.choice(list(CODES), size=int(rng.integers(2, 4))))
        if owner(text) == split:
            return text


def die(image: Image.Image, pips: int, paper, ink, left: int, top: int) -> tuple:
    """The face of a die, 18 x 18 pixels."""
    ImageDraw.Draw(image).rectangle((left, top, left + 17, top + 17), fill=paper, outline=ink)
    low, mid, high = 4, 9, 14
    at = {1: [(mid, mid)], 2: [(low, low), (high, high)]}
    at[3] = at[1] + at[2]
    at[4] = [(low, low), (high, high), (low, high), (high, low)]
    at[5] = at[4] + at[1]
    at[6] = [*at[4], (low, mid), (high, mid)]
    for x, y in at[pips]:
        canvas.disc(image, ink, (left + x, top + y), 3)
    return (left, top, left + 18, top + 18)


def ring(image: Image.Image, side: int, ink, plate, left: int, top: int) -> tuple:
    """A ring with a gap on a plate, 17 x 17 pixels."""
    zoom, size = 4, 17
    tile = Image.new("RGB", (size * zoom, size * zoom), plate)
    pen = ImageDraw.Draw(tile)
    pen.ellipse((2 * zoom, 2 * zoom, 15 * zoom, 15 * zoom), outline=ink, width=3 * zoom)
    middle, reach, half = 8.5 * zoom, 8 * zoom, 2 * zoom
    across = [(0, -half), (reach, -half), (reach, half), (0, half)]
    turn = side * math.pi / 2
    cos, sin = round(math.cos(turn)), round(math.sin(turn))
    pen.polygon([(middle + x * cos - y * sin, middle + x * sin + y * cos) for x, y in across], fill=plate)
    image.paste(tile.resize((size, size), Image.Resampling.BOX), (left, top))
    return (left, top, left + size, top + size)


TASK = Task(
    name="needle",
    title="A small detail in a large picture",
    version=1,
    media="image",
    chances={
        "code": 1 / (len(CODES) ** 2 + len(CODES) ** 3),
        "dot": 1 / len(DOTS),
        "mark": 1 / len(scenes.SHAPES),
        "dice": 1 / 6,
        "gap": 1 / 4,
    },
    count=200,
    item=item,
    card=__doc__,
)
