"""What the model is asked about a series, and what is read of its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vtok.errors import InvalidValue

TAGS = ("think", "class", "extension")  # in the order of an answer
RULES = ("paper", "code")
ENDS = re.compile(r"(\s|<\|[^<>|]*\|>)+\Z")  # end-of-turn tokens that were decoded with the text
BLOCK = "<{0}>(?P<{0}>.*?)</{0}>"


def question(about: str, classes: Sequence[str], *, extension: bool = False, brief: bool = False) -> str:
    """The prompt: what is shown, the classes, and the form of the answer.

    about: what the series are, as in "The picture shows ABOUT". extension: ask for an insight behind the class.
    brief: the classes alone, for small models that learn the form from examples."""
    listed = f"{', '.join(classes[:-1])} or {classes[-1]}"
    if brief:
        return f"Which class is it, {listed}?"
    parts = ["<think>what you see and what follows from it</think>", "<class>one of the classes</class>"]
    if extension:
        parts.append("<extension>what is worth knowing beyond the class</extension>")
    return (
        f"The picture shows {about}, drawn over time. Which class is it, {listed}?\n"
        f"Answer in exactly this form: {''.join(parts)}"
    )


def answer(think: str, label: str, extension: str = "", *, before: str = "") -> str:
    """An answer as the model should write it; without an insight if that is empty.

    before: stands before each text: a space makes a word one token where a small vocabulary knows no others.
    Raises `InvalidValue` for text that is empty where it must not be, or holds a tag."""
    said = {"think": think, "class": label, "extension": extension}
    for tag, text in said.items():
        if (tag != "extension" and not text.strip()) or any(f"{end}{one}>" in text for one in TAGS for end in "</"):
            raise InvalidValue(f"The {tag} part of an answer is empty or holds a tag: {text!r}.")
    return "".join(f"<{tag}>{before}{text}</{tag}>" for tag, text in said.items() if text)


@dataclass(frozen=True)
class Answer:
    """What was read of an answer.

    label: the class as the list spells it, or None. well: whether the form is right. think, extension: texts, empty if
    there is none."""

    label: str | None
    well: bool
    think: str = ""
    extension: str = ""


def parse(text: str, classes: Sequence[str], *, extension: bool = False, rules: str = "paper") -> Answer:
    """Read an answer. Case and spaces around a class do not matter.

    rules: "paper": think, class and, exactly if asked for, extension, in this order, once each, not empty, nothing
            besides, and a class of the list; an answer in another form has no class.
        "code": as TimeMaster's code for Computers: the first class tag that holds a class of the list decides; nothing
            else is looked at.
    extension: whether the prompt asked for one.
    Source: TimeMaster, Section 4, and verl/utils/reward_score/ctu.py. Raises `InvalidValue` for other rules."""
    if rules not in RULES:
        raise InvalidValue(f"rules are one of {', '.join(RULES)}, not {rules!r}.")
    own = {label.lower(): label for label in classes}
    if rules == "code":
        said = [own.get(found.strip().lower()) for found in re.findall(BLOCK.format("class"), text, re.S | re.I)]
        label = next(filter(None, said), None)
        rest = {tag: _first(tag, text) for tag in ("think", "extension")}
        return Answer(label, label is not None, **rest)
    wanted = TAGS if extension else TAGS[:2]
    found = re.fullmatch(r"\s*" + r"\s*".join(map(BLOCK.format, wanted)), ENDS.sub("", text), re.S)
    if found is None:
        return Answer(None, False)
    parts = {tag: inside.strip() for tag, inside in found.groupdict().items()}
    label = own.get(parts["class"].lower())
    twice = any(f"{end}{tag}>" in inside for inside in parts.values() for tag in TAGS for end in ("<", "</"))
    if label is None or twice or not all(parts.values()):
        return Answer(None, False)
    return Answer(label, True, parts["think"], parts.get("extension", ""))


def _first(tag: str, text: str) -> str:
    found = re.search(BLOCK.format(tag), text, re.S | re.I)
    return found[tag].strip() if found else ""
