"""StreamingLLM: a sliding window over the cache, behind the first columns, which take up attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtok.engine.columns import Columns
from vtok.errors import InvalidValue
from vtok.options import AtLeast0
from vtok.stages.kv import KV


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(KV):
    """The first `sinks` columns and the latest ones (Section 3.2). While answering, each new column pushes one out.

    sinks: columns at the beginning that stay.
    renumber: count positions within the cache; not for M-RoPE.
    Differs from the paper: there positions are always counted within the cache. Here columns keep their own by default.
    Not good for: anything that is said in the middle of a prompt.
    """

    name = "streaming_llm"
    paper = "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453"
    bounded = True
    by_grid = True
    text_guided = False
    examples = ({}, {"keep": 6, "sinks": 2})

    sinks: AtLeast0 = 4
    renumber: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name, share = ("keep", self.keep) if self.text is None else ("text", self.text)
        if isinstance(share, int) and share <= self.sinks:
            raise InvalidValue(f"{name} must be above sinks, {self.sinks}, got {share}: the window would be empty.")
        if self.renumber and self.apart:
            raise InvalidValue("renumber counts all columns as one: give keep, not visual and text.")

    @property
    def moves(self) -> int:
        return self.sinks if self.renumber else 0

    @property
    def least(self) -> int:
        return self.sinks + 1

    def score(self, seen: Columns) -> Tensor:
        return seen.place.float()

    def stays(self, seen: Columns) -> Tensor:
        return seen.place < self.sinks
