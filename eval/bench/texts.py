"""Texts for language models: prompts that decoders answer (ordinary text, text that repeats what is in the prompt, and
code), and long passages to read. Passages and sources are read out of the Python that runs this; nothing is stored.
"""

from __future__ import annotations

import inspect
import sysconfig
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

KINDS = ("ordinary", "repetitive", "code")
FIRST = 2  # of each kind: asked before anything is measured

ORDINARY = (
    "Explain why leaves turn red and yellow in autumn.",
    "What should I look at when I buy a used bicycle?",
    "Tell me a short story about a lighthouse keeper who finds a letter.",
    "How does a refrigerator keep food cold?",
    "Give me advice on how to learn a new language as an adult.",
    "Write a friendly letter to a neighbour about a garden party next Saturday.",
)
REPEATING = (
    "Repeat the following text word for word:",
    "Copy this text exactly as it is:",
    "Correct the spelling of this text and write all of it again:",
    "Summarize the following text. Quote its most important sentences word for word:",
    "Write this text again, with each sentence on a line of its own:",
    "Repeat this text, and change nothing in it:",
)
PASSAGES = ("break", "del", "pass", "continue", "bltin-ellipsis-object", "context-managers")
SOURCES = (
    ("textwrap", "wrap"),
    ("calendar", "TextCalendar"),
    ("difflib", "SequenceMatcher"),
    ("string", "Formatter"),
    ("fractions", "Fraction"),
    ("statistics", "NormalDist"),
)
LINES = 40  # of a source that is to be gone on with


def prompts(kind: str, tokenizer: Any) -> list[dict[str, Tensor]]:
    """Inputs of `generate`, one a prompt; the first `FIRST` of them to warm up."""
    if kind == "code":
        return [dict(tokenizer(_begun(*source), return_tensors="pt")) for source in SOURCES]
    asked: Sequence[str] = ORDINARY
    if kind == "repetitive":
        asked = [f"{ask}\n\n{_passage(topic)}" for ask, topic in zip(REPEATING, PASSAGES)]
    return [chat(tokenizer, text) for text in asked]


def chat(tokenizer: Any, text: str) -> dict[str, Tensor]:
    turn = [{"role": "user", "content": text}]
    return dict(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True))


def _passage(topic: str) -> str:
    """About 100 words of what Python's help says on a topic, without its heading."""
    from pydoc_data.topics import topics

    words = " ".join(topics[topic].splitlines()[3:]).split()
    return textwrap.fill(" ".join(words[:100]), 10_000)


def _begun(module: str, name: str) -> str:
    """The first lines of a function or class."""
    source = inspect.getsource(getattr(__import__(module), name)).splitlines()
    return "\n".join(source[:LINES])


def repeated(prompt: Sequence[int], answer: Sequence[int], n: int = 4) -> float:
    """The share of an answer's runs of n tokens that stood before, in the prompt or in the answer."""
    text = [*prompt, *answer]
    seen: set[tuple[int, ...]] = set()
    old = 0
    for end in range(n, len(text) + 1):
        run = tuple(text[end - n : end])
        if end > len(prompt):
            old += run in seen
        seen.add(run)
    return old / len(answer)


# ---- to read ---------------------------------------------------------------------------------------------------------
# Long files of the standard library with much prose in them.
MODULES = ("argparse", "ast", "datetime", "decimal", "difflib", "doctest", "inspect", "logging/__init__", "tarfile")


def prose() -> str:
    """The language reference, as `help()` shows it."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))


def code() -> str:
    """Modules of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join((folder / f"{name}.py").read_text() for name in MODULES)


READ: dict[str, Callable[[], str]] = {"prose": prose, "code": code}


def passages(tokenizer: Any, kind: str, tokens: int, count: int) -> list[list[int]]:
    """Ids of `count` passages of so many tokens, from places spread evenly over all there is of a kind of `READ`."""
    text = READ[kind]()
    starts = [i * len(text) // count for i in range(count)]
    found = []
    for start in starts:
        start = text.index("\n", start) + 1  # at the beginning of a line
        found.append(tokenizer(text[start : start + 12 * tokens], add_special_tokens=False)["input_ids"][:tokens])
    return found
