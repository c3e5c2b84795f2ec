"""What a run of lmms-eval stands on: the process it is, the model's identity, and lmms-eval's cache."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.caching.response_cache import ResponseCache

from vtok import models
from vtok.errors import InvalidValue


def accelerator(device_map: str | None) -> Any:
    """Of a process that shares the work, or None of the only one. Raises `InvalidValue` where they would not share."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return None
    from accelerate import Accelerator

    if device_map is not None:
        raise InvalidValue("device_map spreads one model over devices: run it in one process.")
    made = Accelerator()
    if made.num_processes == 1:
        raise InvalidValue(
            f"Of {world} processes accelerate takes each for the only one without a GPU: set ACCELERATE_USE_CPU=true."
        )
    return made


def batch_size(value: int | str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise InvalidValue(f"batch_size is a number of at least 1, not {value!r}.")
    return number


def weights(name: str, model: Any) -> dict[str, Any]:
    """What tells a model's weights from others: its name, commit, and files."""
    place = Path(models.place(name))
    files = sorted(place.glob("*")) if place.is_dir() else []
    held = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.suffix != ".md"]
    return {"name": name, "commit": getattr(model.config, "_commit_hash", None), "files": held}


def limit_pixels(processor: Any, low: int | None, high: int | None) -> None:
    """Set the limits of pictures, for processors that have such. Raises `InvalidValue` for others."""
    if low is None and high is None:
        return
    images = processor.image_processor
    size = dict(images.size or {})
    if not {"shortest_edge", "longest_edge"} <= set(size) or not hasattr(images, "merge_size"):
        raise InvalidValue(f"{type(images).__name__} has no limits of pixels: leave out min_pixels and max_pixels.")
    size |= {key: value for key, value in (("shortest_edge", low), ("longest_edge", high)) if value is not None}
    images.size = size


def key_cache_by_model(ours: type) -> None:
    """lmms-eval's cache is keyed on the argument string alone: not on what is in files that it names, nor, for a model
    object, on anything. For a model of class `ours` its fingerprint is added."""
    execute: Callable = ResponseCache.execute

    @functools.wraps(execute)
    def keyed(cache: ResponseCache, lm: Any, reqtype: str, requests: list[Instance]) -> list:
        if not isinstance(lm, ours):
            return execute(cache, lm, reqtype, requests)
        if reqtype == "loglikelihood":  # 0.7.3 can neither store these nor give them back
            return lm.loglikelihood(requests)
        before = cache._model_fingerprint_hash
        cache._model_fingerprint_hash = f"{before}-{lm.fingerprint()}"
        try:
            return execute(cache, lm, reqtype, requests)
        finally:
            cache._model_fingerprint_hash = before

    ResponseCache.execute = keyed
