"""What `vtok show` does with a text: which of the prompt's columns each method leaves in the cache, layer by layer.

An HTML page with the prompt's own words, fainter where fewer heads hold them, and a slider over decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor, nn

from vtok.errors import InvalidValue
from vtok.prompts import ask
from vtok.runs import DENSE, Asked

METHODS = ("snapkv", "h2o", "streaming_llm")


@dataclass(frozen=True)
class Held:
    """One method's answer, and [layers, N] the share of a layer's heads that hold each token of the prompt."""

    method: str
    answer: str
    shares: Tensor

    @property
    def words(self) -> str:
        """How much is held, in words."""
        layers, n = self.shares.shape
        return f"{self.shares.sum() / layers:.4g} of {n} columns stay in the cache, mean over layers and heads"

    @property
    def means(self) -> list[float]:
        """Of each token the mean over layers."""
        return self.shares.mean(0).tolist()

    @property
    def digits(self) -> list[str]:
        """Of each layer a digit a token, its share in ninths."""
        return ["".join(map(str, row)) for row in (9 * self.shares).round().int().tolist()]


def follow(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    methods: Sequence[str],
    keep: float | int = 0.25,
    budget: float | None = None,
    max_new_tokens: int = 20,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[str], list[Held]]:
    """The prompt's tokens as text, and what the dense model and each method, at `keep` or `budget`, hold of them."""
    asked = Asked.of(model, tokenizer, ask(text), methods, max_new_tokens, keep, budget)
    runs = asked.all(progress)
    layers = runs[methods[0]].trace.shapes.layers
    tokens = asked.inputs["input_ids"][0].tolist()
    found = []
    for method, run in runs.items():
        held = [torch.ones(len(tokens)) if method == DENSE else run.trace.columns_at(i)[0] for i in range(layers)]
        found.append(Held(method, run.text, torch.stack(held)))
    return [tokenizer.decode([token]) for token in tokens], found


def page(words: Sequence[str], shown: Sequence[Held], about: str = "") -> str:
    """A web page that refers to nothing outside itself. Without scripts it shows the mean over layers."""
    env = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    template = Path(__file__).with_name("show_text.html.j2").read_text(encoding="utf-8")
    return env.from_string(template).render(words=words, shown=shown, about=about)


def write(words: Sequence[str], shown: Sequence[Held], about: str, folder: Path) -> Path:
    """`kept.html`, in `folder`, which is made if need be."""
    file = folder / "kept.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(page(words, shown, about), encoding="utf-8")
    except OSError as error:
        raise InvalidValue(f"Could not write to {str(file)!r} ({error.strerror}).") from error
    return file
