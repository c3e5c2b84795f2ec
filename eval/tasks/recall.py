"""Facts in a long text: what a smaller cache loses.

Sentences without meaning, about 850 tokens of them, hold facts: codes of cities, of which one is asked for that stands
in the `first`, the `middle` or the `last` third of the text, alone or among `several` of its kind; or a chain of two
variables, of which the last one's value is asked (`chain`). The question stands behind the text, in the same prompt.
One question an item, the kinds in turn.

Splits share no code. Nobody guesses a code of five digits.

Licences: nothing but its own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from vtok.eval.tasks.task import Item, Question, Task, generator, owner

KINDS = ("first", "middle", "last", "several", "chain")
PEOPLE = ("Anna", "Boris", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ivan", "Julia", "Kofi", "Lena")
DEEDS = ("carried", "painted", "counted", "repaired", "sold", "borrowed", "washed", "measured", "found", "lost")
THINGS = ("a chair", "three lamps", "the old clock", "some bread", "a green coat", "two bottles", "the map", "a basket")
PLACES = ("near the river", "behind the station", "in the garden", "at the market", "under the bridge", "by the mill")
TIMES = ("on Monday", "in the morning", "last winter", "before noon", "after the rain", "in June", "at dusk")
CITIES = ("Lima", "Oslo", "Cairo", "Quito", "Delhi", "Paris", "Tokyo", "Accra", "Sofia", "Turin")
NAMES = ("alpha", "beta", "gamma", "delta", "omega", "sigma")


@dataclass(frozen=True)
class Recall(Task):
    def score(self, answer: str, said: str) -> bool:
        """Whether the code is the only number that was said."""
        digits = "".join(c if c.isdigit() else " " for c in said).split()
        return set(digits) == {answer}


def item(split: str, seed: int, index: int, sentences: int) -> Item:
    rng = generator("recall", split, seed, index)
    pick = lambda words: str(words[int(rng.integers(len(words)))])
    text = [f"{pick(PEOPLE)} {pick(DEEDS)} {pick(THINGS)} {pick(PLACES)} {pick(TIMES)}." for _ in range(sentences)]
    kind, third = KINDS[index % len(KINDS)], sentences // 3
    cities, names = rng.permutation(CITIES).tolist(), rng.permutation(NAMES).tolist()
    value = code(rng, split)
    place = {"first": 0, "middle": 1, "last": 2}.get(kind, int(rng.integers(3))) * third + int(
        rng.integers(2, third - 2)
    )
    question = f"What is the code of {cities[0]}?"
    facts = [(place, f"The code of {cities[0]} is {value}.")]
    if kind == "several":
        facts += [(int(rng.integers(2, sentences)), f"The code of {c} is {code(rng, split)}.") for c in cities[1:4]]
    if kind == "chain":
        late = int(rng.integers(place + 1, sentences + 1))
        facts = [(place, f"The value of {names[0]} is {value}.")]
        facts += [(late, f"The value of {names[1]} is the value of {names[0]}.")]
        question = f"What number is the value of {names[1]}?"
    for at, fact in sorted(facts, reverse=True):
        text.insert(at, fact)
    asked = f"{' '.join(text)}\n\n{question} Answer with the number alone."
    return Item(index, "text", (), (Question(kind, asked, value),))


def code(rng, split: str) -> str:
    """A number of five digits that belongs to the split."""
    while True:
        text = str(int(rng.integers(10_000, 100_000)))
        if owner(text) == split:
            return text


def task(name: str, title: str, sentences: int) -> Recall:
    """The task at a length: `sentences` of about 11 tokens each."""
    return Recall(
        name=name,
        title=title,
        version=1,
        media="text",
        chances=dict.fromkeys(KINDS, 1 / 90_000),
        count=200,
        item=partial(item, sentences=sentences),
        card=__doc__,
        instruction="",
    )


TASK = task("recall", "Facts in a long text", 72)
