"""Prompts for decoders: ordinary text, text that repeats what is in the prompt, and code. Passages and sources are read
out of the Python that runs this."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
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
    return [_chat(tokenizer, text) for text in asked]


def _chat(tokenizer: Any, text: str) -> dict[str, Tensor]:
    chat = [{"role": "user", "content": text}]
    return dict(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True))


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
