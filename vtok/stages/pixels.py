"""Before the encoder: a picture with fewer pixels."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from vtok.adapter import shrink
from vtok.compressor import Compressor
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
