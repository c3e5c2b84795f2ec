"""Before the blocks of an encoder that takes a list of patches: some of a picture's cells are encoded, and no others.

A cell is the square of patches that becomes one token. What is left out gets the feature of a cell that stands for it,
so that the family's own splitting runs unchanged; one token of each that was encoded enters the decoder.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtok.compressor import Compressor
from vtok.engine.encode import EncoderCall
from vtok.engine.prefill import Prefill
from vtok.engine.trace import Part, Picture
from vtok.errors import Unsupported
from vtok.stages.stage import Site, Stage
from vtok.tower import NEEDS
from vtok.types import Layout, Plane


@dataclass(frozen=True, kw_only=True)
class Patches(Compressor):
    """A method that says, of each cell of a picture, which one is encoded in its stead."""

    stage = "patches"
    needs = frozenset({"patch_list"})

    @property
    def replays(self) -> bool:
        return False  # pixels are the same again, and so is what follows from them

    @abstractmethod
    def anchors(self, pixels: Tensor) -> Tensor:
        """[T, rows, cols] long, for each cell of T frames the index, counted over all T * rows * cols in raster order,
        of the one that stands for it: its own where it is encoded.

        pixels: [T, rows, cols, V] the values of a cell, as the encoder is given them."""


class PatchesStage(Stage[Patches]):
    name = "patches"
    in_encoder = True

    def __init__(self, compressor: Patches, site: Site) -> None:
        super().__init__(compressor, site)
        beside = [part for part in site.parts if part is not compressor]
        if any(part.stage in ("pixels", "blocks") and not part.is_identity for part in beside):
            raise Unsupported(f"{compressor.name} does not go with another method in the encoder. Choose one.")
        if needs := sorted({need for part in beside for need in part.needs_now & (NEEDS | {"crops", "frames"})}):
            names = ", ".join(part.name for part in beside)
            raise Unsupported(f"{names} needs {', '.join(needs)} of whole views, and {compressor.name} leaves parts.")
        self.tower, self.local = site.adapter.tower(site.config), _Work()

    def encoder_hooks(self, site: Site) -> Iterable[tuple[Callable, Callable, dict[str, Any]]]:
        vit = site.core.get_submodule(site.adapter.encoder)
        yield vit.register_forward_pre_hook, self._before_tower, {}
        yield vit.register_forward_hook, self._after_tower, {}

    def encode(self, call: EncoderCall, run: Callable[[], Any]) -> Any:
        of_cell = call.adapter.pixels(call.modality, call.arguments).unflatten(0, (-1, self.tower.merge**2)).flatten(1)
        anchors = []
        with torch.no_grad():
            for layout, values in zip(call.layouts, of_cell.split([layout.n for layout in call.layouts])):
                plane = layout.planes[0]
                cells = values.view(len(layout.planes), plane.rows, plane.cols, -1)
                anchors.append(self.compressor.anchors(cells).flatten())
        left = [some(layout, anchor) for layout, anchor in zip(call.layouts, anchors)]
        call.small, call.sources, call.merged_into = (*zip(*left), tuple(anchors))
        if all(small is layout for small, layout in zip(call.small, call.layouts)):
            return run()
        self.local.kept = torch.cat([anchor == torch.arange(len(anchor), device=anchor.device) for anchor in anchors])
        starts = torch.tensor([0, *(layout.n for layout in call.layouts[:-1])]).cumsum(0).tolist()
        rank = self.local.kept.cumsum(0) - 1
        self.local.row = rank[torch.cat([anchor + start for anchor, start in zip(anchors, starts)])]
        try:
            return run()
        finally:
            self.local.kept = self.local.row = None

    def _before_tower(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return None if self.local.kept is None else self.tower.on_some(module, args, kwargs, self.local.kept)

    def _after_tower(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Each cell gets the feature of the one that stands for it."""
        if (row := self.local.row) is None:
            return None
        output.pooler_output = output.pooler_output[row]
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [level[row] for level in output.deepstack_features]
        return output

    def part(self, prefill: Prefill) -> Part:
        return SomePatches()


def some(layout: Layout, anchor: Tensor) -> tuple[Layout, Tensor]:
    """The layout of the cells that are encoded, each frame a single row of them, and [n'] which tokens of `layout` they
    are; the layout itself where all are. anchor: [n] the cell that stands for each. Waits for the device."""
    token = torch.arange(layout.n, device=anchor.device)
    kept = token[anchor == token]
    if len(kept) == layout.n:
        return layout, kept
    ends = torch.tensor([*layout.starts[1:], layout.n], device=anchor.device)
    counts = torch.searchsorted(kept, ends).diff(prepend=ends.new_zeros(1)).tolist()
    planes = tuple(Plane(1, count, "image", plane.box) for plane, count in zip(layout.planes, counts))
    return Layout(planes, modality=layout.modality), kept


class _Work(threading.local):
    """While one thread encodes: [cells] bool, which of all pictures' are encoded; [cells] the row of what comes out
    that each gets."""

    kept: Tensor | None = None
    row: Tensor | None = None


class SomePatches(Part):
    """FLOPs of windows are counted as if the cells that are left lay side by side."""

    def seen_as(self, picture: Picture) -> Layout:
        return picture.layout
