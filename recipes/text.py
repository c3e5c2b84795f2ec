"""Pages full of codes and numbers, which teach a vision tower to read: training material only, no task.

A page of an offline task shows ten characters that its questions label; one of these shows 54 to 93 on a tile of
128 x 128 pixels, each labelled, in the typefaces, sizes and colours of those tasks.
"""

from __future__ import annotations

from PIL import Image, ImageDraw

from vtok.eval.tasks import canvas, sources, task
from vtok.eval.tasks import documents as task_documents
from vtok.eval.tasks.task import Item, Question, Task, generator

SIDE = 128  # pixels
FACES = (*task_documents.FACES, *((face, size) for face in sources.FONTS for size in (11, 12)))
COLOURED = 0.4  # share of the pages on a tag's colours


def item(split: str, seed: int, index: int) -> Item:
    rng = generator("text", split, seed, index)
    face, size = FACES[int(rng.integers(len(FACES)))]
    font = sources.font(face, size)
    if rng.random() < COLOURED:
        name = tuple(canvas.INK)[int(rng.integers(len(canvas.INK)))]
        paper, ink = canvas.INK[name], canvas.edge_of(name)
    else:
        paper = task_documents.PAPER[int(rng.integers(len(task_documents.PAPER)))]
        ink = task_documents.INKS[int(rng.integers(len(task_documents.INKS)))]
    image = Image.new("RGB", (SIDE, SIDE), paper)
    pen, asked = ImageDraw.Draw(image), []
    y = float(rng.integers(2, 8))
    while y + size + 3 < SIDE:
        x = float(rng.integers(2, 12))
        while True:
            text = _word(rng, split)
            if x + font.getlength(text) > SIDE - 2:
                break
            _, top, _, bottom = pen.textbbox((x, y), text, font=font)
            pen.text((x, y), text, font=font, fill=ink)
            for n, letter in enumerate(text):
                left, right = (x + font.getlength(text[:end]) for end in (n, n + 1))
                asked.append(Question("letter", "", letter, ((0, left, top, right, bottom),)))
            x += font.getlength(text) + int(rng.integers(4, 14))
        y += size + int(rng.integers(4, 10))
    return Item(index, "image", (image,), tuple(asked))


def _word(rng, split: str) -> str:
    if rng.random() < 0.5:
        return task_documents.code(rng, split, int(rng.integers(2, 5)))
    return str(task_documents.number(rng, split, 10, 10 ** int(rng.integers(3, 6))))


TASK = Task(
    name="text",
    title="Letters on a page",
    version=1,
    media="image",
    chances={"letter": 1 / 30},
    count=0,
    item=item,
    card=__doc__,
)


def taught(name: str) -> Task:
    """What a recipe calls by that name: an offline task, or `text`."""
    return TASK if name == TASK.name else task.get(name)
