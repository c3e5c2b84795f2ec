"""Which version of an operation runs: the torch one, or the Triton one in the file beside it.

Each torch twin is also an operation of torch.library, `torch.ops.vtok.<its name>`, of which the compiler sees nothing
but the shapes: so compiled code, too, calls the Triton kernel on a card. Elsewhere it fuses the twin, which it sees.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from vtok.errors import InvalidValue, MissingExtra, Unsupported, VtokError

BACKENDS = ("auto", "torch", "triton")
SWITCH = "VTOK_KERNELS"  # environment variable; "torch" turns every Triton kernel off
_broken: set[str] = set()  # Triton modules that this machine could not run, not to be tried again


def operation(shapes: Callable, differentiable: bool = False) -> Callable[[Callable], Callable]:
    """Decorator of a twin: register it with torch.library as `vtok::<its name>`.

    shapes: called with the twin's arguments, gives empty tensors like its results, for tracing. The twin's annotations
    are the operation's schema; no result may share memory with an argument.
    differentiable: whether its Triton version, too, has a gradient. Compiled code takes the twin where one is wanted.
    """

    def register(twin: Callable) -> Callable:
        @functools.wraps(twin)
        def run(*args):
            return dispatch(twin, "auto", *args)

        twin.differentiable = differentiable
        twin.operation = torch.library.custom_op(f"vtok::{twin.__name__}", run, mutates_args=())
        twin.operation.register_fake(shapes)
        return twin

    return register


def dispatch(twin: Callable[..., Tensor], backend: str, *args):
    """`twin(*args)`, or what the function of the same name in `<module of twin>_triton` gives for these arguments.

    backend: "torch" is `twin`. "triton" is its Triton version, or the error that says why it cannot be had. "auto" is
    Triton for CUDA tensors if nothing speaks against it, and else `twin`. What a user would want to know of is logged
    once: no Triton, an old card, a kernel that does not compile. Not logged is what is meant to be so: other devices,
    `VTOK_KERNELS=torch`, gradients that Triton does not give.
    """
    if backend not in BACKENDS:
        raise InvalidValue(f"backend must be one of {BACKENDS}, got {backend!r}")
    tensors = [a for a in args if isinstance(a, Tensor)]
    if all(t.is_meta for t in tensors):
        return twin.operation(*args)  # shapes without values
    if backend == "torch" or (backend == "auto" and not _automatic(twin, tensors)):
        return twin(*args)
    if backend == "auto" and torch.compiler.is_compiling():
        return twin.operation(*args)
    name = f"{twin.__module__}_triton"
    problem = obstacle(twin, tensors)
    if problem is None and (backend == "triton" or name not in _broken):
        try:
            with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device, torch where its input is
                return getattr(importlib.import_module(name), twin.__name__)(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, a driver or a card that Triton does not take: no type says so
            problem = Unsupported(f"{name} does not run on this machine: {type(error).__name__}: {error}")
            problem.__cause__ = error
            _broken.add(name)
    if backend == "triton":
        raise problem
    if problem is not None:
        _log(str(problem))
    return twin(*args)


def _automatic(twin: Callable, tensors: list[Tensor]) -> bool:
    """Whether "auto" thinks of Triton at all."""
    if not _on_cuda(tensors) or _switched_off() or _lacks_gradient(twin, tensors):
        return False
    return not _interpreted()  # the interpreter is for tests, and slow


def obstacle(twin: Callable, tensors: list[Tensor]) -> VtokError | None:
    """Why no Triton kernel can do the twin's work on these tensors; None if nothing is known to be in the way."""
    if _switched_off():
        return InvalidValue(f"backend='triton' is switched off by {SWITCH}=torch; unset it, or use backend='auto'.")
    if not _installed():
        return MissingExtra("Triton is not installed: pip install 'vtok[triton]', or use backend='torch'.")
    if _lacks_gradient(twin, tensors):
        return Unsupported("This Triton kernel has no gradient: use backend='torch', or torch.no_grad().")
    if _interpreted():
        return None
    if not _on_cuda(tensors):
        devices = sorted({str(t.device) for t in tensors})
        return Unsupported(
            f"Triton runs on CUDA tensors, these are on {', '.join(devices)}. Use backend='torch'; for tests on a CPU "
            "set TRITON_INTERPRET=1 before Triton is imported."
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(tensors[0].device) < (8, 0):
        name = torch.cuda.get_device_name(tensors[0].device)
        return Unsupported(f"Triton needs a card of compute capability 8.0 or newer, {name} is older.")
    return None


def _lacks_gradient(twin: Callable, tensors: list[Tensor]) -> bool:
    """Whether a gradient is wanted that Triton does not give. As one operation of compiled code it gives none."""
    gives = getattr(twin, "differentiable", False) and not torch.compiler.is_compiling()
    return not gives and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _switched_off() -> bool:
    wish = os.environ.get(SWITCH) or "auto"
    if wish not in ("auto", "torch"):
        raise InvalidValue(f"{SWITCH} must be 'auto' or 'torch', got {wish!r}")
    return wish == "torch"


def _on_cuda(tensors: list[Tensor]) -> bool:
    return all(t.is_cuda for t in tensors)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter. It decides so when imported; a later change means nothing."""
    if not _installed():
        return False
    triton = importlib.import_module("triton")
    return not isinstance(triton.language.max, triton.JITFunction)


@functools.cache
def _log(reason: str) -> None:
    logging.getLogger("vtok").warning("%s vtok goes on in plain torch.", reason)


def takes_half(*tensors: Tensor) -> bool:
    """Whether a Triton kernel may multiply these as they are: one half type, whose products fp32 sums hold exactly.

    All else it first turns into fp32. So it does with bfloat16 in the interpreter, which multiplies its bit patterns.
    """
    types = {t.dtype for t in tensors}
    return types == {torch.float16} or (types == {torch.bfloat16} and all(t.is_cuda for t in tensors))
