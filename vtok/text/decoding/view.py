"""The part of a prompt's cache that a compressor would leave: what self-speculation drafts on."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import DynamicCache

from vtok.engine import encode
from vtok.engine.aside import Enough
from vtok.engine.cache import NAME, CompressedCache
from vtok.engine.forward import PIXELS
from vtok.errors import Unsupported
from vtok.patching import Patch, patch
from vtok.stages.stage import Stage


def looks_at_layers(handle: Patch) -> bool:
    """Whether a choice is made in the language model, which then must run."""
    return any(stage.in_layers for stage in handle._engine.stages)


def looks_at_encoder(handle: Patch) -> bool:
    """Whether a choice is made in the vision encoder, or by what is read there, which then must run."""
    engine = handle._engine
    acts = lambda stage: any(getattr(type(stage), x) is not getattr(Stage, x) for x in ("encode", "encoder_hooks"))
    return bool(engine.reads) or any(map(acts, engine.stages))


def guess(handle: Patch) -> float:
    """What a choice may take, in prefills, before one was timed."""
    return 0.5 if looks_at_layers(handle) else 0.2 if looks_at_encoder(handle) else 0.02


def compressed(
    model: nn.Module, method: Any, inputs: dict[str, Any], encoded: dict[str, Any], dense: DynamicCache
) -> DynamicCache | None:
    """The part of a prompt's cache that is there under a method; None where that is all of it.

    inputs: of the model's forward, one prompt with its pixels. encoded: modality -> what its encoder made of them.
    dense: the cache behind it. Columns of tokens that a method drops are left out, the same in all layers: those that
    the last layer does not have. Where a method evicts from the cache itself, the part is what it leaves. The patch is
    gone afterwards, whatever happens. Encoder and language model run only where the choice needs them."""
    held = DynamicCache()
    with patch(model, method) as handle:
        hook = None
        if not looks_at_encoder(handle):
            inputs = _with_features(handle, inputs, encoded)
        if not looks_at_layers(handle):
            hook = handle._adapter.language_model(handle._target()).register_forward_pre_hook(_enough)
        try:
            last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
            model(**inputs, use_cache=True, **last, **{NAME: held})
        except Enough:
            pass
        finally:
            if hook is not None:
                hook.remove()
        kept = handle.trace.positions_at(handle.trace.shapes.layers - 1)[0]
    if any(len(layer.keys[0, 0]) < len(kept) for layer in held.layers if layer.is_initialized):
        return _left(held)
    if len(kept) == inputs["input_ids"].shape[1]:
        return None
    part = DynamicCache()
    for i, layer in enumerate(dense.layers):
        index = kept.to(layer.keys.device)
        part.update(layer.keys.index_select(2, index), layer.values.index_select(2, index), i)
    return part


def _left(held: CompressedCache) -> DynamicCache:
    """What a method that evicts has left, as a plain cache. Raises `Unsupported` where that needs a mask."""
    if any(valid is not None and not bool(valid.all()) for valid in held.valid.values()):
        raise Unsupported(
            "Drafts on a cache whose heads hold different numbers of columns: choose a method of one number."
        )
    part = DynamicCache()
    for i, layer in enumerate(held.layers):
        part.update(layer.keys, layer.values, i)
    return part


def _enough(module: nn.Module, args: tuple) -> None:
    """What is kept is known: the language model need not run."""
    raise Enough


def _with_features(handle: Patch, inputs: dict[str, Any], encoded: dict[str, Any]) -> dict[str, Any]:
    """The inputs with what `generate` encoded in place of the pixels, where it did."""
    core, adapter = handle._target(), handle._adapter
    ready = {modality: output for modality, output in encoded.items() if output is not None}
    for modality, output in ready.items():
        names = inspect.signature(getattr(type(core), adapter.encoders[modality])).parameters
        arguments = {name: inputs[name] for name in names if name in inputs}
        encode.mark(adapter, core, modality, output, arguments)
    if not ready:
        return inputs
    return {**{k: v for k, v in inputs.items() if k not in PIXELS}, "mm_encoder_outputs": ready}
