"""Baseline: a smaller picture."""

import math
from dataclasses import dataclass

from vtok.options import Fraction
from vtok.stages.pixels import Pixels


@dataclass(frozen=True, kw_only=True)
class Downsample(Pixels):
    """Shrink each picture (each view of it) before the encoder, so that fewer tokens come out.

    keep: fraction of the tokens; the sides shrink by its square root. A count is refused.
    The encoder's position embeddings are interpolated; a token stands at the place that the middle of its cell had.
    Differs from the paper: there is none; a baseline, and one that many methods do not beat.
    """

    name = "downsample"
    paper = "baseline"
    by_grid = True

    keep: Fraction = 0.25

    def scale(self) -> float:
        return math.sqrt(self.keep)
