"""Reading a page: invoices, forms, tables and letters, rendered with small type.

Pages of 192 x 256 or 256 x 256 pixels in six typefaces of 11 to 13 pixels, on white or tinted paper, with rules, frames
or striped rows. Asked are the value of a named field (`field`: a word, `code`: letters and digits, `number`), a cell of
a table by row and column (`cell`), the printed total (`total`), the row with the largest entry (`largest`) and the
heading (`heading`). Names, places and headings are few and known; codes and numbers have to be read.

Splits share no code and no number above 99; words and typefaces are the same in all.

Licences: fonts DejaVu, STIX and Computer Modern, out of matplotlib. Nothing else is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from vtok.eval.tasks import sources
from vtok.eval.tasks.canvas import CODES, text_size
from vtok.eval.tasks.task import Item, Question, Task, generator, owner

SIZES = ((256, 256), (192, 256))
FACES = (
    ("DejaVuSans.ttf", 11),
    ("DejaVuSans-Bold.ttf", 11),
    ("DejaVuSansMono.ttf", 11),
    ("DejaVuSerif.ttf", 11),
    ("STIXGeneralBol.ttf", 13),
    ("cmss10.ttf", 12),
)
PAPER = ((255, 255, 255), (250, 246, 232), (238, 244, 252), (242, 250, 240))
INKS = ((10, 10, 10), (20, 30, 90), (90, 20, 20))
NAMES = ("Adams", "Baker", "Clark", "Evans", "Green", "Hill", "King", "Lopez", "Moore", "Reed", "Stone", "Young")
CITIES = ("Berlin", "Cairo", "Delhi", "Lima", "London", "Madrid", "Oslo", "Paris", "Quito", "Rome", "Seoul", "Tokyo")
GOODS = ("Bread", "Cups", "Flour", "Lamps", "Nails", "Paint", "Paper", "Pens", "Rope", "Soap", "Tea", "Wire")
MONTHS = ("January", "April", "May", "June", "July", "August", "October", "March")
MATTERS = ("Rent", "Travel", "Repair", "School", "Garden", "Health", "Taxes", "Sport")
HEADINGS = {
    "invoice": ("Invoice", "Receipt", "Bill", "Order"),
    "form": ("Visitor", "Patient", "Member", "Student"),
    "table": ("Sales", "Stock", "Costs", "Visits"),
    "letter": ("Notice", "Reminder", "Request", "Thanks"),
}
KINDS = tuple(HEADINGS)
Rect = tuple[float, float, float, float]


@dataclass
class Page:
    """A page that is being written: where each piece of text went is what the questions point at."""

    rng: np.random.Generator
    image: Image.Image
    face: str
    size: int
    ink: tuple[int, int, int]
    asked: list[Question]

    @property
    def pen(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    def write(self, text: str, x: float, y: float, right: bool = False, larger: int = 0) -> Rect:
        """Write a line whose type begins at y; `right`: x is its right end. Returns the ink's rectangle."""
        font = sources.font(self.face, self.size + larger)
        x -= font.getlength(text) if right else 0
        self.pen.text((x, y), text, font=font, fill=self.ink)
        return self.pen.textbbox((x, y), text, font=font)

    def width(self, text: str) -> int:
        return text_size(text, sources.font(self.face, self.size))[0]

    def ask(self, category: str, text: str, answer: str, *rects: Rect) -> None:
        w, h = self.image.size
        boxes = tuple((0, max(a - 2, 0), max(b - 2, 0), min(c + 2, w), min(d + 2, h)) for a, b, c, d in rects)
        self.asked.append(Question(category, text, answer, boxes))

    def one_of(self, words: tuple[str, ...]) -> str:
        return words[int(self.rng.integers(len(words)))]

    def some_of(self, words: tuple[str, ...], count: int) -> list[str]:
        return [words[i] for i in self.rng.permutation(len(words))[:count]]


def item(split: str, seed: int, index: int) -> Item:
    rng = generator("documents", split, seed, index)
    kind = KINDS[index % len(KINDS)]
    size = SIZES[int(rng.integers(len(SIZES)))]
    paper = PAPER[int(rng.integers(len(PAPER)))]
    ink = INKS[int(rng.choice(3, p=(0.7, 0.15, 0.15)))]
    page = Page(rng, Image.new("RGB", size, paper), *FACES[int(rng.integers(len(FACES)))], ink, [])
    {"invoice": _invoice, "form": _form, "table": _table, "letter": _letter}[kind](page, split)
    questions = tuple(page.asked[i] for i in rng.permutation(len(page.asked)))
    return Item(index, "image", (page.image,), questions)


def code(rng: np.random.Generator, split: str, length: int = 4) -> str:
    """A code of the split."""
    while True:
        text = "".join(rng.choice(list(CODES), size=length))
        if owner(text) == split:
            return text


def number(rng: np.random.Generator, split: str, low: int, high: int) -> int:
    """A number of the split, low <= number < high."""
    while True:
        value = int(rng.integers(low, high))
        if value < 100 or owner(str(value)) == split:
            return value


def _heading(page: Page, kind: str, y: int) -> None:
    """Left, centred or on a dark band, and always asked about."""
    text = page.one_of(HEADINGS[kind])
    font = sources.font(page.face, page.size + 4)
    w = font.getlength(text)
    style = int(page.rng.integers(3))
    x = 10 if style == 0 else (page.image.width - w) / 2
    ink = page.ink
    if style == 2:
        page.pen.rectangle((0, y - 3, page.image.width, y + page.size + 9), fill=ink)
        page.ink = (255, 255, 255)
    rect = page.write(text, x, y, larger=4)
    page.ink = ink
    page.ask("heading", "What is the heading?", text, rect)


def _fields(page: Page, rows: list[tuple[str, str, str]], y: int, step: int) -> int:
    """Lines "label  value" of (category, label, value), in one of three looks; returns where the next line goes."""
    style = int(page.rng.integers(3))
    column = 16 + max(page.width(label + ":") for _, label, _ in rows)
    for category, label, value in rows:
        page.write(label + ("" if style == 1 else ":"), 10, y)
        if style == 0:
            rect = page.write(value, column + 4, y)
        elif style == 1:  # in a frame
            page.pen.rectangle((column, y - 2, page.image.width - 11, y + page.size + 3), fill="white", outline="grey")
            rect = page.write(value, column + 5, y)
        else:  # at the right margin, on a dotted line
            rect = page.write(value, page.image.width - 12, y, right=True)
            for x in range(column, int(rect[0]) - 4, 4):
                page.pen.point((x, y + page.size), fill="grey")
        page.ask(category, f"What is the {label.lower()}?", value, rect)
        y += step
    return y


def _rules(page: Page, top: int, count: int, step: int) -> None:
    """Rules, stripes or nothing behind the rows of a table."""
    style = int(page.rng.integers(3))
    for i in range(count):
        y = top + i * step
        if style == 0:
            page.pen.line((8, y - 2, page.image.width - 9, y - 2), fill="grey")
        elif style == 1 and i % 2 == 0:
            page.pen.rectangle((8, y - 1, page.image.width - 9, y + step - 3), fill=(222, 224, 228))


def _invoice(page: Page, split: str) -> None:
    _heading(page, "invoice", 8)
    rows = [
        ("code", "Number", code(page.rng, split)),
        ("field", "Client", page.one_of(NAMES)),
        ("field", "City", page.one_of(CITIES)),
    ]
    y = _fields(page, page.some_of(tuple(rows), int(page.rng.integers(2, 4))), 34, 18) + 6
    goods = page.some_of(GOODS, int(page.rng.integers(3, 6)))
    while True:
        prices = [number(page.rng, split, 100, 1000) for _ in goods]
        total = sum(prices)
        if owner(str(total)) == split and len(set(prices)) == len(prices):
            break
    _rules(page, y, len(goods), 18)
    rects = []
    for name, price in zip(goods, prices):
        page.write(name, 12, y)
        rects.append(page.write(str(price), page.image.width - 14, y, right=True))
        y += 18
    i = int(page.rng.integers(len(goods)))
    page.ask("cell", f"What is the price of {goods[i].lower()}?", str(prices[i]), rects[i])
    best = int(np.argmax(prices))
    page.ask("largest", "Which item costs the most?", goods[best], *rects)
    page.pen.line((8, y, page.image.width - 9, y), fill=page.ink, width=1)
    page.write("Total", 12, y + 5)
    page.ask(
        "total", "What is the total?", str(total), page.write(str(total), page.image.width - 14, y + 5, right=True)
    )


def _form(page: Page, split: str) -> None:
    _heading(page, "form", 8)
    rows = [
        ("field", "Name", page.one_of(NAMES)),
        ("field", "City", page.one_of(CITIES)),
        ("code", "Code", code(page.rng, split)),
        ("number", "Room", str(number(page.rng, split, 100, 1000))),
        ("number", "Age", str(number(page.rng, split, 18, 90))),
        ("number", "Phone", str(number(page.rng, split, 10000, 100000))),
        ("field", "Month", page.one_of(MONTHS)),
        ("code", "Badge", code(page.rng, split)),
    ]
    chosen = page.some_of(tuple(rows), int(page.rng.integers(5, 9)))
    _fields(page, chosen, 36, int(page.rng.integers(22, 27)))


def _table(page: Page, split: str) -> None:
    _heading(page, "table", 8)
    names = page.some_of(page.some_of((NAMES, CITIES, GOODS), 1)[0], int(page.rng.integers(5, 9)))
    columns = page.some_of(("North", "South", "East", "West"), 2)
    while True:
        values = np.array([[number(page.rng, split, 10, 1000) for _ in columns] for _ in names])  # [rows, 2]
        top = np.sort(values, axis=0)[-2:]
        if (top[1] >= top[0] + 50).all():  # plain to see
            break
    ends = (page.image.width * 0.68, page.image.width - 14)
    y = 38
    for text, end in zip(columns, ends):
        page.write(text, end, y, right=True)
    page.pen.line((8, y + 16, page.image.width - 9, y + 16), fill=page.ink)
    y, step = y + 21, 20
    _rules(page, y, len(names), step)
    rects = []
    for name, row in zip(names, values.tolist()):
        page.write(name, 12, y)
        rects.append([page.write(str(v), end, y, right=True) for v, end in zip(row, ends)])
        y += step
    for _ in range(2):
        i, j = int(page.rng.integers(len(names))), int(page.rng.integers(2))
        text = f"What is the {columns[j].lower()} value of {names[i]}?"
        page.ask("cell", text, str(values[i, j]), rects[i][j])
    j = int(page.rng.integers(2))
    best = names[int(values[:, j].argmax())]
    page.ask("largest", f"Which row has the largest {columns[j].lower()} value?", best, *(r[j] for r in rects))


def _letter(page: Page, split: str) -> None:
    end = page.image.width - 12
    sender, city, to, sign = page.one_of(CITIES), page.one_of(MONTHS), *page.some_of(NAMES, 2)
    matter, ref = page.one_of(MATTERS), code(page.rng, split)
    sum_due, day = number(page.rng, split, 100, 1000), number(page.rng, split, 1, 29)
    page.ask("field", "Which city was the letter sent from?", sender, page.write(sender, end, 8, right=True))
    rect = page.write(f"{day} {city}", end, 24, right=True)
    page.ask("field", "In which month was the letter sent?", city, rect)
    _heading(page, "letter", 46)
    page.ask("field", "Who is the letter to?", to, page.write(f"Dear {to},", 10, 74))
    page.ask("field", "What is the letter about?", matter, page.write(f"Subject: {matter}", 10, 94))
    lines = [
        ("code", "What is the reference?", ref, f"Reference {ref}"),
        ("number", "How much is due?", str(sum_due), f"Please pay {sum_due}"),
    ]
    filler = ("We hope you are well.", "This is for your file.", "Please keep this page.", "Call us any time.")
    body = [*lines, *(("", "", "", text) for text in page.some_of(filler, 2))]
    y = 118
    for i in page.rng.permutation(len(body)):
        category, question, answer, text = body[i]
        rect = page.write(text, 10, y)
        if category:
            page.ask(category, question, answer, rect)
        y += 19
    page.write("Yours,", 10, y + 6)
    page.ask("field", "Who signed the letter?", sign, page.write(sign, 10, y + 24))


_THREE_DIGITS = 1 / 900
TASK = Task(
    name="documents",
    title="Reading pages",
    version=1,
    media="image",
    chances={
        "field": 1 / 10,  # names and places are 12, months and matters 8
        "code": 1 / len(CODES) ** 4,
        "number": _THREE_DIGITS,
        "cell": _THREE_DIGITS,
        "total": 1 / 4000,
        "largest": (1 / len(GOODS) + 1 / len(NAMES + CITIES + GOODS)) / 2,  # items of an invoice, rows of a table
        "heading": 1 / 16,
    },
    count=400,
    item=item,
    card=__doc__,
    instruction="Answer with one word, number or code.",
)
