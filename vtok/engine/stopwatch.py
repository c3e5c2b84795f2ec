"""Time on the device's clock."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Seconds spent in `with` blocks, on the device's clock, read without waiting until asked. Compiled code, in which
    a clock cannot be read, adds none."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.laps: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            self.start = self._now()

    def __exit__(self, *exc: Any) -> None:
        if not torch.compiler.is_compiling():
            self.laps.append((self.start, self._now()))

    def seconds(self) -> float:
        if not self.cuda:
            return sum(end - start for start, end in self.laps)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.laps) / 1e3
