"""Data-parallel gradients on CPU: worker processes of one thread each, which share the weights.

The parts of a step are taken from one queue, so a worker that other programs slow down takes fewer of them; those of
the kind that has taken longest come first, so that none waits long for the last.
Threads inside an operation cannot do that: all wait for the slowest, which on a busy machine halves speed.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Hashable

import torch
from torch import multiprocessing, nn


class Team:
    """`work(index)` gives the loss of a part, a scalar tensor, and anything picklable to hand back. `kind(index)` tells
    parts apart that take unlike times."""

    def __init__(self, size: int, weights: list[nn.Parameter], work: Callable, kind: Callable[[int], Hashable]):
        self.weights, self.kind = weights, kind
        self.seconds: dict[Hashable, float] = {}  # of the last part of each kind
        self.grads = torch.zeros(size, sum(w.numel() for w in weights)).share_memory_()
        context = multiprocessing.get_context("fork")
        self.tasks, self.results = context.Queue(), context.Queue()
        args = (weights, work, self.tasks, self.results, os.getpid())
        self.workers = [context.Process(target=_serve, args=(g, *args), daemon=True) for g in self.grads]
        for worker in self.workers:
            worker.start()

    def step(self, indices) -> list:
        """Leave the mean gradient over the parts in the weights; return what `work` handed back."""
        for index in sorted(indices, key=lambda index: -self.seconds.get(self.kind(index), 0.0)):
            self.tasks.put(index)
        answers = []
        for _ in indices:
            index, seconds, answer = self.results.get()
            if isinstance(answer, Exception):
                raise answer
            self.seconds[self.kind(index)] = seconds
            answers.append(answer)
        mean = (self.grads.sum(0) / len(indices)).split([w.numel() for w in self.weights])
        for weight, grad in zip(self.weights, mean):
            weight.grad = grad.view_as(weight)
        self.grads.zero_()
        return answers

    def stop(self) -> None:
        for _ in self.workers:
            self.tasks.put(None)
        for worker in self.workers:
            worker.join()


def _serve(grads, weights, work, tasks, results, parent):
    torch.set_num_threads(1)  # also what makes forking safe: no thread pool is entered
    for weight, grad in zip(weights, grads.split([w.numel() for w in weights])):
        weight.grad = grad.view_as(weight)  # backward adds to it in place
    while True:
        try:
            index = tasks.get(timeout=5)
        except queue.Empty:
            if os.getppid() != parent:  # killed
                return
            continue
        if index is None:
            return
        began = time.perf_counter()
        try:
            loss, answer = work(index)
            loss.backward()
        except Exception as error:
            answer = error
        results.put((index, time.perf_counter() - began, answer))
