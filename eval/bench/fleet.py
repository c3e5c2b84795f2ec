"""How many cards a load needs, dense and compressed: what compression divides was measured by `vtok bench serve`, how
fast a card is stands in its data sheet, and all else is an assumption with a name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

HEAD = ("card", "variant", "encoder, ms", "prefill, ms", "decode, ms", "at once", "requests/s", "cards")


@dataclass(frozen=True)
class Card:
    """Of NVIDIA's data sheets: dense bfloat16 operations a second, bytes a second of its memory, its bytes."""

    name: str
    flops: float
    bandwidth: float
    memory: float


CARDS = (
    Card("L40S", 362e12, 0.864e12, 48e9),
    Card("A100 80 GB SXM", 312e12, 2.039e12, 80e9),
    Card("H100 SXM", 989e12, 3.35e12, 80e9),
)


@dataclass(frozen=True)
class Model:
    """LLaVA-NeXT with Vicuna-7B. encoder: parameters of CLIP ViT-L, which reads `patches` patches a picture, five views
    of 577. Two bytes a number."""

    parameters: float = 6.74e9
    layers: int = 32
    width: int = 4096
    kv_width: int = 4096
    encoder: float = 0.304e9
    patches: int = 5 * 577


@dataclass(frozen=True)
class Assumed:
    """rate: requests a second of the whole fleet. text, answer: tokens. flops_used, bandwidth_used: the share of a
    card's figures that a prefill and a decoding step reach. memory_used: the share that weights and cache may take."""

    rate: float = 100.0
    text: int = 64
    answer: int = 128
    flops_used: float = 0.5
    bandwidth_used: float = 0.6
    memory_used: float = 0.9


@dataclass(frozen=True)
class Cost:
    """Seconds of a card that a request takes, by phase; how many it holds at once."""

    encoder: float
    prefill: float
    decode: float
    at_once: int

    @property
    def rate(self) -> float:
        """Requests a second of one card, which does one thing at a time."""
        return 1 / (self.encoder + self.prefill + self.decode)


def cost(
    card: Card, model: Model, visual: int, assumed: Assumed, of_prefill: float = 1.0, of_cache: float = 1.0
) -> Cost:
    """of_prefill, of_cache: what is left of a dense request's prefill time and of its cache.

    Every cache is full, so a step of decoding reads the weights and all of the cache once, for `at_once` tokens."""
    tokens = visual + assumed.text
    flops = 2 * model.parameters * tokens + 2 * model.layers * model.width * tokens**2  # causal: half of the scores
    reached = card.flops * assumed.flops_used
    cache = of_cache * 2 * 2 * model.layers * model.kv_width * (tokens + assumed.answer)
    at_once = int((card.memory * assumed.memory_used - 2 * model.parameters) / cache)
    step = (2 * model.parameters + at_once * cache) / (card.bandwidth * assumed.bandwidth_used)
    encoder = 2 * model.encoder * model.patches / reached
    return Cost(encoder, of_prefill * flops / reached, assumed.answer * step / at_once, at_once)


def measured(results: dict[str, dict[Any, dict[str, float]]]) -> tuple[float, float]:
    """What is left of a dense request's time to the first token and of its cache, asked one at a time: of the results
    of `vtok bench serve`."""
    (_, dense), (_, own) = results.items()
    least = min(dense, key=int)
    return own[least]["first"] / dense[least]["first"], own[least]["kv"] / dense[least]["kv"]


def told(visual: int, results: dict[str, Any], model: Model = Model(), assumed: Assumed = Assumed()) -> str:
    """What the numbers of `rows_of` stand on."""
    prefill, cache = measured(results)
    sheets = (f"{c.name} {c.flops / 1e12:g} T, {c.bandwidth / 1e12:g} TB/s, {c.memory / 1e9:g} GB" for c in CARDS)
    return (
        f"For {assumed.rate:g} requests a second. Calculated, not measured. From above: of a dense request's time to "
        f"the first token {prefill:.3f} is left, and of its cache {cache:.3f}. From data sheets, operations a second "
        f"in bfloat16 without sparsity, bytes a second and bytes of memory: {'; '.join(sheets)}.\n\n"
        f"Assumed: LLaVA-NeXT with a decoder of {model.parameters / 1e9:g} G parameters and {model.layers} layers, "
        f"two bytes a number; {visual:,} visual tokens, {assumed.text} of text, {assumed.answer} of answer; a prefill "
        f"reaches {assumed.flops_used:.0%} of the operations, a step of decoding {assumed.bandwidth_used:.0%} of the "
        f"bandwidth; {assumed.memory_used:.0%} of the memory hold weights and cache; what is left of a small model's "
        f"prefill on a CPU, its thin encoder within, is what is left of the large one's on a card; all caches are "
        f"full; a card does one thing at a time; no two requests share a picture; network, router and peaks cost "
        f"nothing. *Encoder*, *prefill*, *decode*: a card's milliseconds for a request, decoding shared by those *at "
        f"once* in its memory."
    )


def rows_of(
    visual: int, results: dict[str, Any], model: Model = Model(), assumed: Assumed = Assumed()
) -> list[list[str]]:
    """Lines below `HEAD`."""
    left = dict(zip(results, ((1.0, 1.0), measured(results))))
    rows = []
    for card in CARDS:
        for variant, shares in left.items():
            each = cost(card, model, visual, assumed, *shares)
            phases = [f"{1e3 * seconds:.0f}" for seconds in (each.encoder, each.prefill, each.decode)]
            cards = math.ceil(assumed.rate / each.rate)
            rows.append([card.name, variant, *phases, str(each.at_once), f"{each.rate:.1f}", str(cards)])
    return rows
