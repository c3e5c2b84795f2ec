"""What a measured number needs to be believed: the machine, the versions, the commit, the command; and memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def describe(device: str, dtype: str) -> dict[str, str]:
    """Name of the machine or card, threads, load, dtype, versions, commit and command line."""
    import transformers

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor() or platform.machine()} x {os.cpu_count()}"
    return {
        "machine": name,
        "device": device,
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "dtype": dtype,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "command": command(),
    }


def command() -> str:
    """What started this process, and those that share its work, as one would type it."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # None of a script
    program = Path(sys.argv[0]).name if module is None else f"-m {module.name.removesuffix('.__main__')}"
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        program = f"torchrun --nproc_per_node {processes} {program}"
    elif module is not None:
        program = f"python {program}"
    return " ".join([program, *sys.argv[1:]])


@cache
def commit() -> str:
    """The short hash of the checkout that this file is in, "+" behind it where files differ; or "unknown". As it was
    when first asked: what runs was read then, whatever has been checked out since."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class PeakMemory:
    """By how much memory rises at most above its level when this is made: on a card what PyTorch has allocated, on a
    CPU the process's resident memory, which Linux tells."""

    def __init__(self, device: str) -> None:
        gc.collect()
        self.cuda, self.before = device.startswith("cuda"), None
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with suppress(OSError, AttributeError, StopIteration):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present level
            self.before = _resident("VmHWM")

    def rise(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.before is None:
            return None
        return (torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")) - self.before


def kept_for_backward(model: nn.Module, work: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes of the tensors that forwards in `work` keep for their backward pass, each storage once, the model's weights
    left out; and what `work` returned."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = x, storage.nbytes()  # held, so that no other takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = work()
    return sum(size for _, size in kept.values()), result


def peak_memory(device: str, work: Callable[[], Any]) -> tuple[int | None, Any]:
    """Bytes by which memory rose at most above its level before `work`, and what `work` returned."""
    peak = PeakMemory(device)
    result = work()
    return peak.rise(), result


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
