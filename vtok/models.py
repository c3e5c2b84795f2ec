"""The model loader: a model and its processor by name, the same for the command line, the evaluation and scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtok.errors import InvalidValue, UnknownName, meant

DTYPES = ("float32", "bfloat16", "float16")


def place(name: str) -> str:
    """Where a model is loaded from: the folder of a bundled one, a local folder, or NAME of a repository of the hub.

    Imports no torch. Raises `UnknownName` where it can be neither of them."""
    from vtok import zoo

    bundled = zoo.names()
    if name in bundled:
        return str(zoo.path(name))
    if not Path(name).is_dir() and "/" not in name:
        there = ", ".join(bundled) or "none"
        raise UnknownName(
            f"No model {name!r}: it is no local folder, and the bundled models are: {there}.{meant(name, bundled)}"
        )
    return name


def device_of(name: str | None = None) -> str:
    """A device of torch's by name, such as "cpu", "cuda" or "cuda:1"; left out: the GPU if there is one, else the CPU.

    Raises `InvalidValue` where this machine has no such device."""
    if name is not None and name.partition(":")[0].lower() == "gpu":
        raise InvalidValue(f"There is no device {name!r}: a GPU is called cuda, or cuda:1 for the second.")
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        raise InvalidValue(f"There is no device {name!r} here. There is: {device_of()}.") from error
    return name


def dtype_of(name: str) -> Any:
    """A floating-point dtype of torch's by name. Raises `InvalidValue`."""
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidValue(f"dtype is a name of torch's such as {', '.join(DTYPES)}, not {name!r}.")
    return found


def load(
    name: str | Path,
    device: str | None = None,
    dtype: str | None = None,
    *,
    device_map: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """A vision-language model in eval mode, and its processor.

    name: a bundled model, a local folder, or a repository of the hub.
    device: see `device_of`. device_map: instead, as in transformers, which then spreads the model.
    dtype: a name of torch's; if left out (or "auto") the checkpoint's own, or float32 for bundled models, whose
        weights are stored as float16. attn_implementation: as in transformers.
    Raises `UnknownName` where there is no such model or it cannot be loaded, and `InvalidValue`.
    """
    from vtok import zoo

    name = str(name)
    source = place(name)
    how: dict[str, Any] = {"dtype": "float32" if name in zoo.names() else "auto"}
    if dtype not in (None, "auto"):
        how["dtype"] = dtype_of(dtype)
    if device_map is None:
        device = device_of(device)
    else:
        how["device_map"] = device_map
    if attn_implementation is not None:
        how["attn_implementation"] = attn_implementation
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(source, **how).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnknownName(f"The model {name!r} could not be loaded: {reason}") from error
    return (model if device_map is not None else model.to(device)), processor
