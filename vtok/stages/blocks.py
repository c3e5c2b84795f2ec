"""Inside the encoder: tokens are grouped between the attention and the MLP of its blocks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtok.compressor import Compressor
from vtok.vit import Block


@dataclass(frozen=True, kw_only=True)
class Blocks(Compressor):
    """A method that groups tokens inside the blocks of a vision transformer."""

    stage = "blocks"
    masks: ClassVar[bool] = False  # True if `bias()` may give something
    scatters: ClassVar[bool] = False  # True if it leaves single patches of a picture, which lie on no grid

    @abstractmethod
    def merged_at(self, n_blocks: int, patches: int) -> list[int]:
        """How many of a view's rows each block groups away.

        Raises `InvalidValue` where there are not the right number of blocks."""

    @abstractmethod
    def group(self, block: Block) -> tuple[Tensor, int] | None:
        """Which rows of a block go on as one: [B, n] the new row of each, and how many new rows there are; or None."""

    @abstractmethod
    def merge(self, x: Tensor, size: Tensor, group: Tensor, n: int) -> Tensor:
        """[B, n, D], the rows that `group()` asked for, of x [B, rows, D], which stand for `size` [B, rows] patches."""

    def bias(self, size: Tensor) -> Tensor | None:
        """[B, n] what is added to the attention logits of rows that stand for `size` [B, n] patches, or None."""
        return None
