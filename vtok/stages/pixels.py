"""Before the encoder: a picture with fewer pixels."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from vtok.compressor import Compressor


@dataclass(frozen=True, kw_only=True)
class Pixels(Compressor):
    """A method that gives the encoder a smaller picture."""

    stage = "pixels"

    @abstractmethod
    def scale(self) -> float:
        """The factor by which picture sides shrink before the encoder, in (0, 1]."""
