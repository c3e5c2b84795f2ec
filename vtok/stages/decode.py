"""Behind the prompt: text goes through a part of the decoder's FFN neurons, those that the prompt used."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtok.compressor import Compressor
from vtok.types import Activations


@dataclass(frozen=True, kw_only=True)
class Decode(Compressor):
    """A method that decodes with some of the FFN neurons."""

    stage = "decode"
    text_guided = True
    min_tokens: ClassVar[int] = 1  # a shorter prompt, in tokens that enter the language model, stays dense

    @property
    def reads_prompt_end(self) -> bool:
        return True

    @abstractmethod
    def sparse_layers(self, n_layers: int) -> range:
        """The decoder layers in which text behind the prompt goes through some neurons of the FFN alone."""

    @abstractmethod
    def neurons(self, activations: Activations) -> Tensor:
        """[B, K] long, ascending: those neurons, for one of these layers."""
