"""What a prefill kept, sample by sample, so that another forward can keep the same.

A rollout and the training forwards behind it have other batches, other padding and, in half precision, other rounding:
scores that nearly tie fall out otherwise, and other tokens are kept. So the choice is recorded once, and replayed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtok.errors import InvalidValue

if TYPE_CHECKING:
    from vtok.engine.prefill import Prefill


@dataclass(frozen=True)
class Kept:
    """What one sample of a prefill kept. On the CPU.

    layers: first decoder layer -> for each of the sample's pictures, in the prompt's order, [n] bool: which of its
        tokens are present from there on; 0 for what enters the language model. Separators (newlines) do not count.
    parts: stage -> what else it needs to do the same again, such as into which token another was merged.
    """

    layers: Mapping[int, tuple[Tensor, ...]] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)

    def present_at(self, layer: int) -> tuple[Tensor, ...]:
        """For each picture [n] bool, at a decoder layer."""
        return self.layers[max(first for first in self.layers if first <= layer)]


class Recorded:
    """Records of samples on their way into forwards, as many from the front as a forward has rows."""

    def __init__(self, samples: Iterable[Kept]) -> None:
        self._waiting = deque(samples)

    def next(self, batch: int) -> list[Kept]:
        if batch > len(self._waiting):
            raise InvalidValue(
                f"This forward has {batch} rows, and {len(self._waiting)} records of what to keep are left: give "
                f"replaying() one for each row of each forward, in their order."
            )
        return [self._waiting.popleft() for _ in range(batch)]

    def finish(self) -> None:
        """Raise `InvalidValue` where records are left over: they belonged to rows that never came."""
        if self._waiting:
            raise InvalidValue(f"{len(self._waiting)} records of what to keep were not used: no forward took them.")


@dataclass(frozen=True)
class Replay:
    """The records of one prefill's rows, told to its stages.

    of: [P] for each picture of the forward its sample and its number in that."""

    samples: Sequence[Kept]
    of: Sequence[tuple[int, int]]

    @staticmethod
    def on(prefill: Prefill, samples: Sequence[Kept]) -> Replay:
        """Waits for the device. Raises `InvalidValue` where records do not fit the pictures of this forward."""
        first = torch.stack([picture.tokens[0] for picture in prefill.pictures]) // prefill.length
        owners = first.tolist()
        of = [(owner, owners[:i].count(owner)) for i, owner in enumerate(owners)]
        for b, sample in enumerate(samples):
            sizes = [len(picture.tokens) for picture, (owner, _) in zip(prefill.pictures, of) if owner == b]
            recorded = [len(mask) for mask in sample.layers.get(0, ())]
            if sizes != recorded:
                raise InvalidValue(
                    f"Row {b} has pictures of {sizes} tokens, and its record is of {recorded}: records and rows are "
                    f"not in one order, or pictures were processed in another size."
                )
        return Replay(samples, of)

    def part(self, stage: str, picture: int) -> Any:
        """What a stage recorded of a picture of this forward, or None."""
        sample, number = self.of[picture]
        recorded = self.samples[sample].parts.get(stage)
        return None if recorded is None else recorded[number]

    def mask(self, picture: int, layer: int) -> Tensor:
        """[n] bool, the tokens of a picture of this forward that are present at a decoder layer. On the CPU."""
        sample, number = self.of[picture]
        return self.samples[sample].present_at(layer)[number]

    def layers(self) -> list[int]:
        """Decoder layers, but the first, from which on less is present in some sample."""
        return sorted({first for sample in self.samples for first in sample.layers if first})

    def present(self, prefill: Prefill, layer: int) -> tuple[Tensor, list[int]]:
        """[B, S] bool, the visual tokens present at a decoder layer, on the device; and how many a sample has."""
        flat = torch.zeros(prefill.batch * prefill.length, dtype=torch.bool, device=prefill.device)
        counts = [0] * prefill.batch
        for i, picture in enumerate(prefill.pictures):
            mask = self.mask(i, layer)
            counts[self.of[i][0]] += int(mask.sum())
            flat[picture.tokens] = mask.to(prefill.device)
        return flat.view(prefill.batch, prefill.length), counts
