"""Between the encoder and the language model: some of a picture's tokens enter it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from vtok.compressor import Compressor
from vtok.types import Layout, Selection, VisualTokens, keep_count


@dataclass(frozen=True, kw_only=True)
class PreLLM(Compressor):
    """A method that chooses among the tokens of pictures before the language model.

    renumber: kept tokens get consecutive positions instead of their own, and the text behind them moves up. Only for
        one-dimensional RoPE.
    """

    stage = "pre_llm"
    merges: ClassVar[bool] = False  # True if kept tokens get new features, through which gradient must flow

    renumber: bool = False

    @property
    def reads_prompt_end(self) -> bool:
        return "question" in self.needs_now  # it is the text up to there

    @abstractmethod
    def select(self, tokens: VisualTokens) -> Selection:
        """Choose among the tokens of B pictures of one layout."""

    def count(self, layout: Layout) -> int | None:
        """How many of the layout's tokens `select` keeps, known without seeing any; None where their content decides,
        see `adaptive_now`. `keep` of all tokens of a picture, rounded down, unless overridden."""
        return None if self.adaptive_now else keep_count(layout.n, self.keep)
