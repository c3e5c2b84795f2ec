"""In the language model: visual tokens are dropped between decoder layers."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vtok.compressor import Compressor
from vtok.types import Activations, Attention


@dataclass(frozen=True, kw_only=True)
class InLLM(Compressor):
    """A method that drops visual tokens behind decoder layers, by what it observes there.

    anchor: whose attention or activations count: "prompt_end", the prompt's last token, or "after_visual", the first
        text token behind the last visual one, which every forward can find. Never "the last position": in a training
        forward that is a token of the answer.
    """

    stage = "llm"
    text_guided = True

    anchor: Literal["prompt_end", "after_visual"] = "prompt_end"

    @property
    def reads_prompt_end(self) -> bool:
        return self.anchor == "prompt_end"

    @abstractmethod
    def schedule(self, n_layers: int) -> dict[int, float | int | None]:
        """Layer index -> what `keep` of the sample's visual tokens remains after that decoder layer; None where the
        score itself decides, and those remain whose score is above 0."""

    @abstractmethod
    def score(self, seen: Attention | Activations) -> Tensor:
        """[B, L] importance of each key at a layer of the schedule; only the entries of visual tokens are used. `seen`
        is what the compressor needs of the layer: "attention" or "ffn"."""

    def remaining(self, n: int, keep: float | int, images: int) -> int:
        """How many of a sample's `n` visual tokens, those of `images` pictures, a value of `schedule()` means."""
        return min(n, keep * images if isinstance(keep, int) else math.floor(n * keep + 1e-9))
