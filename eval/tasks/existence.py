"""Is it there? The form of POPE: yes-or-no questions about objects, with random, popular and adversarial negatives.

A crop of a photo of scikit-image or scikit-learn, 160 x 160, 192 x 128 or 128 x 192 pixels, with six to twelve objects:
coloured shapes, handwritten digits (scikit-learn's) and letters on paper. `random` asks about any object, `popular`
about the `POPULAR` ones, which most pictures hold, `adversarial` about one whose nearest kin are all there: the
shape in another colour and the colour on another shape, or the digit or letter that is taken for it.

Object and answer are drawn first and the picture is made to fit, so that the words of a question say nothing about its
answer; half of the test answers are "yes" in each category. This is where it differs from POPE, whose objects come
with the photos. Splits share no photo and no handwritten digit.

Licences: code and wheels BSD-3-Clause; of the photos scikit-image's come with its wheel, most of them in the public
domain or CC0, and scikit-learn's are CC BY 2.0 (danielbuechele, vultilion); fonts: DejaVu, out of matplotlib.
"""

from __future__ import annotations

from PIL import Image

from vtok.eval.tasks import canvas, scenes, sources
from vtok.eval.tasks.canvas import INK
from vtok.eval.tasks.task import Item, Question, Task, generator

SIZES = ((160, 160), (192, 128), (128, 192))
CATEGORIES = ("random", "popular", "adversarial")
SHAPES = [(colour, kind) for colour in INK for kind in scenes.SHAPES]
DIGITS = [("digit", d) for d in "0123456789"]
LETTERS = [("letter", letter) for letter in "CEFGHKMNOPQRUVXY"]
POPULAR = (
    ("red", "circle"),
    ("blue", "square"),
    ("yellow", "star"),
    ("green", "triangle"),
    ("digit", "7"),
    ("letter", "K"),
)
KIN = ("38", "56", "49", "17", "CG", "EF", "HN", "OQ", "PR", "UV", "XY")  # each is taken for the other
Thing = tuple[str, str]  # (colour, shape), ("digit", digit) or ("letter", letter)


def item(split: str, seed: int, index: int) -> Item:
    rng = generator("existence", split, seed, index)
    width, height = SIZES[index % len(SIZES)]
    image, photo = canvas.photo(rng, split, width, height)
    while True:
        asked, there = _plan(rng, index)
        # All that the questions need must fit; what is tried again depends on no answer's value.
        drawn = _draw(rng, split, image.copy(), there)
        if drawn:
            break
    image, boxes = drawn
    questions = []
    for category, thing, answer in asked:
        box = ((0, *boxes[thing]),) if answer == "yes" else ()
        questions.append(Question(category, f"Is there {words(thing)} in the picture?", answer, box))
    return Item(index, "image", (image,), tuple(questions), sources=(photo,))


def words(thing: Thing) -> str:
    first, second = thing
    article = "an" if first == "orange" else "a"
    return f"the {first} {second}" if first in ("digit", "letter") else f"{article} {first} {second}"


def kin(thing: Thing, rng) -> list[Thing]:
    """The things that are most like it."""
    first, second = thing
    if first in ("digit", "letter"):
        return [(first, pair.replace(second, "")) for pair in KIN if second in pair]
    colours = [c for c in INK if c != first]
    kinds = [k for k in scenes.SHAPES if k != second]
    return [(str(rng.choice(colours)), second), (first, str(rng.choice(kinds)))]


def _plan(rng, index: int) -> tuple[list[tuple[str, Thing, str]], list[Thing]]:
    """Questions (category, thing, answer), and the things to draw. Of each category's two questions one answer is
    "yes"; which comes first alternates with the index."""
    paired = [(kind, name) for kind, name in DIGITS + LETTERS if any(name in pair for pair in KIN)]
    while True:
        asked, need, never = [], [], []
        for n, category in enumerate(CATEGORIES):
            for answer in ("yes", "no") if (index >> n) % 2 else ("no", "yes"):
                pool = [SHAPES, DIGITS, LETTERS][int(rng.choice(3, p=(0.6, 0.2, 0.2)))]
                if category == "popular":
                    pool = POPULAR
                elif category == "adversarial":
                    pool = [thing for thing in pool if thing in SHAPES or thing in paired]
                thing = pool[int(rng.integers(len(pool)))]
                asked.append((category, thing, answer))
                (need if answer == "yes" else never).append(thing)
                if category == "adversarial":
                    need += kin(thing, rng)
        things = [thing for _, thing, _ in asked]
        if len(set(things)) == len(things) and not set(need) & set(never):
            break
    there = list(dict.fromkeys(need))
    for thing in POPULAR:
        if thing not in never and thing not in there and rng.random() < 0.35:
            there.append(thing)
    return asked, there


def _draw(rng, split: str, image: Image.Image, there: list[Thing]) -> tuple[Image.Image, dict[Thing, tuple]] | None:
    """The picture and each thing's box, or None where there is no room for all."""
    spots, boxes = scenes.Spots(rng, *image.size), {}
    for first, second in there:
        if first == "letter":
            face = sources.font(str(rng.choice(sources.FONTS)), 13)
            w, h = canvas.text_size(second, face)
            spot = spots.find(w + 6, h + 6)
            if not spot:
                return None
            shade = int(rng.integers(215, 256))
            boxes[first, second] = canvas.tag(image, second, face, (shade,) * 3, (20, 20, 20), *spot)
            continue
        size = int(rng.integers(18, 25))
        spot = spots.find(size, size)
        if not spot:
            return None
        boxes[first, second] = (*spot, spot[0] + size, spot[1] + size)
        if first == "digit":
            samples = sources.digits(split)[int(second)]
            ink = Image.fromarray(samples[int(rng.integers(len(samples)))])
            tile = Image.new("RGB", (size, size), tuple(rng.integers(215, 256, 3).tolist()))
            tile.paste((20, 20, 20), (1, 1), ink.resize((size - 2, size - 2), Image.Resampling.BICUBIC))
            image.paste(tile, spot)
        else:
            canvas.shape(image, second, INK[first], canvas.edge_of(first), *spot, size - 1)
    return image, boxes


TASK = Task(
    name="existence",
    title="Is it there? (POPE's form)",
    version=1,
    media="image",
    chances=dict.fromkeys(CATEGORIES, 0.5),
    count=240,
    item=item,
    card=__doc__,
    instruction="Answer yes or no.",
)
