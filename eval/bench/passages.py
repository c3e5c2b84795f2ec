"""Texts that every Python ships, for language models to read: nothing is stored here, nothing fetched."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


KINDS: dict[str, Callable[[], str]] = {"prose": prose, "code": code}


def of(tokenizer: Any, kind: str, tokens: int, count: int) -> list[list[int]]:
    """Ids of `count` passages of so many tokens, from places spread evenly over all there is of a kind of `KINDS`."""
    text = KINDS[kind]()
    starts = [i * len(text) // count for i in range(count)]
    found = []
    for start in starts:
        start = text.index("\n", start) + 1  # at the beginning of a line
        found.append(tokenizer(text[start : start + 12 * tokens], add_special_tokens=False)["input_ids"][:tokens])
    return found
