"""Hooks and methods put on modules, and taken away again."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from vtok.engine import probe
from vtok.errors import PatchStateError

COPIED = (
    "A patched model cannot be copied or pickled, since a copy's hooks would belong to the original: unpatch it first "
    "(vtok.unpatch), or save its weights (save_pretrained, state_dict), and patch what is loaded."
)


class Seam:
    """A hook. It cannot be copied, since a copied model's hooks would belong to the original."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise PatchStateError(COPIED)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise PatchStateError(COPIED)


class Closed(Seam):
    """A hook that the compiler does not trace, since what it decides differs from forward to forward."""

    @torch.compiler.disable
    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class Seams:
    """The hooks and methods that were put on modules."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._methods: list[tuple[weakref.ref[nn.Module], str]] = []
        self._release: Callable[[], Any] | None = None

    def hook(self, register: Any, function: Any, *, traced: bool = False, with_kwargs: bool = True, **how: Any) -> None:
        seam = (Seam if traced else Closed)(function)
        self._handles.append(register(seam, with_kwargs=with_kwargs, **how))

    def stand_in(self, module: nn.Module, name: str, function: Any) -> None:
        """Let `function` be a method of this very module, until `remove`. It holds what was so before in `previous`."""
        function.previous = module.__dict__.get(name)
        setattr(module, name, types.MethodType(function, module))
        self._methods.append((weakref.ref(module), name))

    def observe(self, owner: nn.Module, implementation: str) -> None:
        """See into attention of this implementation, as long as `owner` lives."""
        probe.acquire(implementation)
        self._release = weakref.finalize(owner, probe.release, implementation)
        self._release.atexit = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for reference, name in self._methods:
            module = reference()
            function = getattr(vars(module).get(name) if module is not None else None, "__func__", None)
            if not hasattr(function, "previous"):
                continue  # somebody stood in after us: theirs to undo, and ours passes calls through
            if function.previous is None:
                delattr(module, name)
            else:  # accelerate's, where a device map spreads the model
                setattr(module, name, function.previous)
        if self._release is not None:
            self._release()
