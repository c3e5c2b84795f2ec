"""Segments of a clip: runs of frames that look alike (DySeg of FastVID, arXiv 2503.11187; also in FlashVID)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from vtok.types import ranks
from vtok.views import unit


@dataclass(frozen=True)
class Segments:
    """The segments of B clips of T frames. Found without a wait for the device.

    index: [B, T] long, that of each frame, from 0.
    same: [B, T, T] bool, whether two frames are of one.
    length: [B, T] long, the number of frames in that of each frame.
    """

    index: Tensor
    same: Tensor
    length: Tensor

    @staticmethod
    def of(x: Tensor, tau: float, least: int) -> Segments:
        """Of clips x [B, T, P, D]: cut where the cosine of the means of two frames is below `tau`, and where it is
        smallest (ties: the earlier), so that there are at least `least` segments, as far as there are frames."""
        similar = transitions(x)
        cut = (similar < tau) | (ranks(-similar) < least - 1)
        index = F.pad(cut.long().cumsum(1), (1, 0))
        same = index[:, :, None] == index[:, None]
        return Segments(index, same, same.sum(2))

    def total(self, numbers: Tensor) -> Tensor:
        """[B, T] the sum of numbers [B, T] over the segment of each frame."""
        return (self.same * numbers[:, None]).sum(2)


def transitions(x: Tensor) -> Tensor:
    """[B, T - 1] the cosine of the mean of each frame of x [B, T, P, D] and that of the next."""
    mean = unit(x.mean(2))
    return (mean[:, 1:] * mean[:, :-1]).sum(-1)
