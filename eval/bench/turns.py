"""Calls side by side, a step each in turn: what slows the machine for a while slows all of them alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


class Turns:
    """Threads of which one works at a time, until it calls `give`."""

    def __init__(self) -> None:
        self._changed, self._own = threading.Condition(), threading.local()
        self._order: list[int] = []  # the first one works
        self._used: list[float] = []
        self._since = 0.0

    def run(self, *calls: Callable[[], Any]) -> list[tuple[Any, float]]:
        """What each call returns, and the CPU seconds of the process in its turns. Raises what a call raises."""
        self._order, self._used = list(range(len(calls))), [0.0] * len(calls)
        threads = torch.get_num_threads()  # a new thread has torch's default
        with ThreadPoolExecutor(len(calls)) as pool:
            futures = [pool.submit(self._work, number, call, threads) for number, call in enumerate(calls)]
            found = [future.result() for future in futures]
        return list(zip(found, self._used, strict=True))

    def give(self) -> None:
        """Let the others work, and wait for the next turn."""
        with self._changed:
            self._stop()
            self._order.append(self._order.pop(0))
            self._changed.notify_all()
            self._start()

    def clock(self) -> float:
        """CPU seconds of the process in the turns of the calling thread, which has its turn."""
        return self._used[self._own.number] + time.process_time() - self._since

    def _work(self, number: int, call: Callable[[], Any], threads: int) -> Any:
        self._own.number = number
        torch.set_num_threads(threads)
        with self._changed:
            self._start()
        try:
            return call()
        finally:
            with self._changed:
                self._stop()
                self._order.remove(number)
                self._changed.notify_all()

    def _start(self) -> None:
        self._changed.wait_for(lambda: self._order[0] == self._own.number)
        self._since = time.process_time()

    def _stop(self) -> None:
        self._used[self._own.number] += time.process_time() - self._since
