"""The phase timer: when modules are entered and left, on a clock that waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def clock(device: torch.device | str, read: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Seconds by `read`, once the device has done all that it was given."""
    device = torch.device(device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return read()

    return now


class Marks:
    """The seconds at which a module was entered and left, in order, since this was made or `clear`.

    Hooks run in the order of their registration: what is hooked between two of these lies between their times.
    now: the clock. first: whether the first time alone is wanted, so that nothing waits for the device later on.
    """

    def __init__(self, module: nn.Module, now: Callable[[], float], first: bool = False) -> None:
        self.entered: list[float] = []
        self.left: list[float] = []

        def mark(times: list[float]) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if not (first and times):
                    times.append(now())

            return hook

        before, after = mark(self.entered), mark(self.left)
        self._handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def clear(self) -> None:
        self.entered.clear(), self.left.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
