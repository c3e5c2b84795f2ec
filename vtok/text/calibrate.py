"""Which layer of a language model knows what matters: found on prompts that hide a number in a text.

from vtok.text import calibrate
found = calibrate.depth(model, tokenizer, text, keep=0.3)
vtok.patch(model, "gemfilter", keep=0.3, depth=found.best)
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vtok.errors import InvalidValue
from vtok.patching import patch

FACT, QUESTION = "The secret number is {}.", "What is the secret number?"


@dataclass(frozen=True)
class Depth:
    """shares: layer -> the share of the hidden facts' tokens that the method keeps by this layer, 0 to 1."""

    shares: dict[int, float]

    @property
    def best(self) -> int:
        """The first layer that is within a hundredth of the best: an earlier one costs less."""
        most = max(self.shares.values())
        return min(layer for layer, share in self.shares.items() if share >= most - 0.01)


def depth(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    keep: float | int = 0.3,
    prompts: int = 8,
    tokens: int = 800,
    layers: Iterable[int] | None = None,
    method: str = "gemfilter",
    **options: Any,
) -> Depth:
    """How much of a fact hidden in a text each layer keeps, asked about it (GemFilter, arXiv 2409.17422, Section 4).

    text: what the fact is hidden in, of the kind that the model will read; it is repeated until there are so many
    tokens. keep: of the prompt. prompts: with the fact at evenly spread places. layers: all, if left out. options: of
    the method. One prompt and layer cost a forward up to this layer, and one of what is kept.

    Raises `InvalidValue` for an empty text."""
    if not text.strip():
        raise InvalidValue("The text in which a fact is to be hidden is empty.")
    hidden = list(_prompts(tokenizer, text, prompts, tokens))
    n_layers = model.config.get_text_config().num_hidden_layers
    shares = {}
    for layer in range(n_layers) if layers is None else layers:
        found = []
        with patch(model, method, keep=keep, depth=layer, **options) as handle:
            for ids, fact in hidden:
                with torch.no_grad():
                    model(input_ids=ids.to(model.device), use_cache=True, logits_to_keep=1)
                found.append(torch.isin(fact, handle.trace.positions[0]).float().mean().item())
        shares[layer] = sum(found) / len(found)
    return Depth(shares)


def _prompts(tokenizer: Any, text: str, count: int, tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids [1, S] of each prompt, and the places of its fact's tokens."""
    rng = random.Random(0)
    filler = tokenizer(text, add_special_tokens=False)["input_ids"]
    filler = (filler * (tokens // len(filler) + 1))[:tokens]
    for i in range(count):
        fact = tokenizer(" " + FACT.format(rng.randrange(10_000, 100_000)), add_special_tokens=False)["input_ids"]
        at = (2 * i + 1) * tokens // (2 * count)
        body = tokenizer.decode(filler[:at]) + tokenizer.decode(fact) + tokenizer.decode(filler[at:])
        asked = f"{body}\n\n{QUESTION}"
        if getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": asked}]
            asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
        start = next((j for j in range(len(ids)) if ids[j : j + len(fact)] == fact), None)
        if start is None:  # the text's last token and the fact's first became one
            start = next(j for j in range(len(ids)) if ids[j : j + len(fact) - 1] == fact[1:]) - 1
        yield torch.tensor([ids]), torch.arange(start, start + len(fact))
