"""Before the encoder: a picture with fewer pixels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vtok.adapter import shrink
from vtok.compressor import Compressor
from vtok.engine.encode import EncoderCall
from vtok.engine.prefill import Prefill
from vtok.engine.trace import Part, Picture
from vtok.errors import Unsupported
from vtok.stages.stage import Site, Stage
from vtok.types import Layout


@dataclass(frozen=True, kw_only=True)
class Pixels(Compressor):
    """A method that gives the encoder a smaller picture."""

    stage = "pixels"

    @abstractmethod
    def scale(self) -> float:
        """The factor by which picture sides shrink before the encoder, in (0, 1]."""

    def count(self, layout: Layout) -> int:
        """How many tokens are made of a picture that has the layout at its full size."""
        view = tuple(max(1, int(side * self.scale() + 1e-6)) for side in layout.planes[0].view_shape)
        return shrink(layout, view)[0].n


class PixelsStage(Stage[Pixels]):
    name = "pixels"
    alone = True  # families change their modules while they encode smaller pictures

    def __init__(self, compressor: Pixels, site: Site) -> None:
        super().__init__(compressor, site)
        if any(part.stage == "blocks" and not part.is_identity for part in site.parts):
            raise Unsupported("A smaller picture and merging inside the encoder do not go together. Choose one.")

    def encode(self, call: EncoderCall, run: Callable[[], Any]) -> Any:
        """In the stead of the family's method: it is called on smaller pictures, and its output stretched again."""
        scale = self.compressor.scale()
        output, views = call.adapter.encode_small(call.core, call.modality, call.method, call.arguments, scale)
        call.small, call.sources = zip(*(shrink(layout, view) for layout, view in zip(call.layouts, views)))
        return output

    def part(self, prefill: Prefill) -> Part:
        return SmallPictures()


class SmallPictures(Part):
    def seen_as(self, picture: Picture) -> Layout:
        return picture.layout
