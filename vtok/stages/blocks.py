"""Inside the encoder: tokens are grouped between the attention and the MLP of its blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtok import vit as vits
from vtok.compressor import Compressor
from vtok.engine.encode import EncoderCall
from vtok.engine.prefill import Prefill
from vtok.engine.trace import Part
from vtok.errors import Unsupported
from vtok.stages.stage import Site, Stage
from vtok.tower import NEEDS, layer_index
from vtok.vit import Block, leaders


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


class BlocksStage(Stage[Blocks]):
    name = "blocks"

    def __init__(self, compressor: Blocks, site: Site) -> None:
        super().__init__(compressor, site)
        for part in site.parts:
            needs = sorted(part.needs_now & (NEEDS | {"crops"}))
            if compressor.scatters and needs:
                wanted = ", ".join(needs)
                raise Unsupported(f"{part.name} needs {wanted} of whole views, and {compressor!r} leaves parts.")
        vit, family = vits.find(site.core)
        features = site.adapter.tower(site.core).features  # hidden states; behind a later block nothing is read
        n = len(family.blocks(vit)) + 1
        depth = max(layer_index(x, n) for x in ([features] if isinstance(features, int) else features))
        self.blocks = vits.Blocks(compressor, family, vit, depth)

    @property
    def drops(self) -> bool:
        return self.compressor.scatters  # else all tokens come out of the encoder again

    def encoder_hooks(self, site: Site) -> Iterable[tuple[Callable, Callable, dict[str, Any]]]:
        return self.blocks.hooks(vits.find(site.core)[0])

    def encode(self, call: EncoderCall, run: Callable[[], Any]) -> Any:
        if not self.compressor.scatters:
            return run()
        with self.blocks.noted() as rows:
            output = run()
        grouped = call.adapter.tower(call.core).arrange(torch.cat(rows), call.layouts)
        found = [leaders(layout, row, self.blocks.rows) for layout, row in zip(call.layouts, grouped)]
        call.small, call.sources, call.merged_into = zip(*found)
        return output

    def part(self, prefill: Prefill) -> Part:
        return Grouped(self.blocks)


@dataclass(frozen=True)
class Grouped(Part):
    blocks: vits.Blocks

    def merged_at(self, patches: int) -> Sequence[int]:
        return self.blocks.merged_at(patches)
