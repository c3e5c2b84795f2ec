"""One fact in a picture of a hundred words: what methods inside the decoder have to find, where depth is real.

The pictures are those of `smollm2-words` (`vtok.words`): a word a patch, so that the model's image rows are the
embeddings of a text. Sentences without meaning fill them, all but one: "The name of the ship is Oslo." The question is
the sentence without its last word, which the model goes on with. What has to be kept is the row of that word, and a
method that reads attention has to find it by the question. The names are those of no person in the other sentences.

Splits share no text; names and sentences are drawn from the same words.

Licences: nothing but its own words. The weights of SmolLM2 are Apache-2.0 and come in a package of their own.
"""

from __future__ import annotations

import zlib

from vtok import words
from vtok.eval.tasks.recall import DEEDS, PLACES, THINGS, TIMES
from vtok.eval.tasks.task import Item, Question, Task, generator

PEOPLE = ("Anna", "Boris", "Chen", "Ivan", "Julia", "Peter", "Maria", "Tom", "Lucy", "Sarah")
THING = ("ship", "island", "hotel", "horse")
NAMES = (
    *("Paris", "London", "Berlin", "Madrid", "Rome", "Tokyo", "Cairo", "Lima", "Oslo", "Delhi"),
    *("Henry", "Robert", "George", "Victoria", "Albert", "Oscar", "Simon", "Martin", "Oliver", "Daniel"),
)


def item(split: str, seed: int, index: int) -> Item:
    rng = generator("needle_text", split, seed, index)
    pick = lambda words: str(words[int(rng.integers(len(words)))])
    thing, name = THING[index % len(THING)], pick(NAMES)
    stem = f"The name of the {thing} is"
    fact, filler, length = _pieces(f"{stem} {name}."), [], 0
    while True:
        sentence = _pieces(f"{pick(PEOPLE)} {pick(DEEDS)} {pick(THINGS)} {pick(PLACES)} {pick(TIMES)}.")
        if length + len(sentence) > words.SIDE**2 - len(fact):
            break
        filler.append(sentence)
        length += len(sentence)
    at = int(rng.integers(1, len(filler)))  # neither first nor last
    text = [piece for sentence in (*filler[:at], fact, *filler[at:]) for piece in sentence]
    needed = sum(map(len, filler[:at])) + len(fact) - 2  # the name, before the full stop
    row, column = divmod(needed, words.SIDE)
    left, top = column * words.PATCH, row * words.PATCH
    box = (0, left, top, left + words.PATCH, top + words.PATCH)
    source = f"text {zlib.crc32(''.join(text).encode()):08x}"
    return Item(index, "words", (words.picture(text),), (Question(thing, stem, name, (box,)),), sources=(source,))


def _pieces(sentence: str) -> list[str]:
    """Words with the space before them, and the full stop."""
    return [f" {word}" for word in sentence.removesuffix(".").split()] + ["."]


TASK = Task(
    name="needle_text",
    title="A fact in a picture of words",
    version=1,
    media="words",
    chances=dict.fromkeys(THING, 1 / len(NAMES)),
    count=400,
    item=item,
    card=__doc__,
    instruction="",
)
