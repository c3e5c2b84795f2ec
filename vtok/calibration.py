"""`keep="auto"`: as many tokens as a picture needs by its own redundancy, for a loss that `vtok calibrate` allowed."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.files import read_json

Auto = Literal["auto"]
VARIANCE = 0.95  # share of the variance that a picture's principal components are to hold
SAMPLE = 512  # tokens of a picture whose spectrum is taken: eigenvalues cost the cube of them


@dataclass(frozen=True)
class Calibration:
    """What `vtok calibrate` found for one method on one model.

    scale: a picture keeps this times the root of what it needs (`needed`), a fraction. The root: between one fraction
        for all and one in proportion. keeps: the fractions that were tried, rising; a picture's is rounded up to one.
    width: of the tokens, by which another model's are recognised. loss: what was allowed, a share of the questions.
    """

    method: str
    scale: float
    keeps: tuple[float, ...]
    width: int
    loss: float

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Calibration:
        """Raises `InvalidValue` where the file holds nothing of that kind."""
        content = read_json(file, "calibration")
        names = [field.name for field in fields(cls)]
        if not isinstance(content, dict) or not content.keys() >= set(names):
            raise InvalidValue(f"{str(file)!r} was not written by `vtok calibrate`.")
        return cls(**{name: content[name] for name in names} | {"keeps": tuple(content["keeps"])})

    def of(self, features: Tensor) -> list[float]:
        """The fraction that each of B pictures of one layout keeps, [B, n, D]. Waits for the device once. Raises
        `InvalidValue` for tokens of another model."""
        if features.shape[-1] != self.width:
            raise InvalidValue(
                f"The calibration is of a model whose tokens are {self.width} wide, and this one's are "
                f"{features.shape[-1]}: run `vtok calibrate` on it."
            )
        return rounded_up(needed(spectrum(features)).tolist(), self.scale, self.keeps)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def spectrum(features: Tensor) -> Tensor:
    """[B, m] which share of the variance of a picture's tokens [B, n, D] their first principal components hold
    together, of m = min(n, `SAMPLE`) tokens, evenly spread. Of equal tokens, which have no variance, all of it."""
    n = features.shape[1]
    some = torch.linspace(0, n - 1, min(n, SAMPLE), device=features.device).round().long()
    x = features[:, some].float()
    x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    x = x - x.mean(1, keepdim=True)
    values = torch.linalg.eigvalsh(x @ x.mT).flip(-1).clamp_min(0)
    whole = values.sum(-1, keepdim=True)
    return torch.where(whole > 1e-9, values.cumsum(-1) / whole.clamp_min(1e-12), 1.0)


def needed(spectra: Tensor, variance: float = VARIANCE) -> Tensor:
    """[B] fractions of the tokens, in (0, 1]: the principal components that it takes, of m, for that share of the
    variance."""
    m = spectra.shape[1]
    return ((spectra < variance).sum(1) + 1).clamp_max(m).double() / m


def rounded_up(needs: Sequence[float], scale: float, keeps: Sequence[float]) -> list[float]:
    """What pictures keep that need these fractions of their tokens."""
    return [keeps[min(bisect_left(keeps, scale * math.sqrt(need)), len(keeps) - 1)] for need in needs]
