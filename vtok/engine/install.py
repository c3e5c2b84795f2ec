"""Puts an engine's seams on a model, and takes every one of them away again."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtok.adapter import Adapter
from vtok.engine.forward import Engine
from vtok.engine.seams import Seams
from vtok.errors import PatchStateError, Unsupported
from vtok.stages.stage import Site


def install(vlm: nn.Module, engine: Engine, site: Site, lock: Any) -> Seams:
    """Put all seams of an engine on a model. lock: held by each call of `generate`, or None."""
    seams, core, adapter = Seams(), site.core, site.adapter
    language_model = adapter.language_model(core)
    probes = {}  # found before the first hook, as there may be no such layer
    if engine.reads:
        tower, layers = adapter.tower(core.config), adapter.encoder_layers(core)
        probes = {key: tower.probe(layers, *key) for key in engine.reads}
    implementation = language_model.config._attn_implementation or ""
    in_layers = any(stage.in_layers for stage in engine.stages)
    engine.watches_layers = in_layers or (("flash" in implementation or adapter.late) and bool(engine.stages))
    for stage in engine.stages:  # before the probes, which then see what these leave
        for register, function, how in stage.encoder_hooks(site):
            seams.hook(register, _unless_paused(engine, stage, function), **how)
    hook = seams.hook
    hook(vlm.register_forward_pre_hook, engine.before_outer)
    hook(vlm.register_forward_hook, engine.after_outer, always_call=True, with_kwargs=False)
    hook(core.register_forward_pre_hook, engine.before_core)
    hook(core.register_forward_hook, engine.after_core, always_call=True, with_kwargs=False)
    hook(language_model.register_forward_pre_hook, engine.before_language_model)
    hook(language_model.register_forward_hook, engine.after_language_model, always_call=True)
    if engine.watches_layers:
        for i, layer in enumerate(site.layers):
            hook(layer.register_forward_pre_hook, functools.partial(engine.before_layer, i), traced=True)
            if i in engine.ffn_layers:
                hook(layer.self_attn.register_forward_pre_hook, engine.before_attention)
                seams.stand_in(layer.mlp, "forward", _feed_forward(engine, i, layer.mlp))
    for key, (module, read) in probes.items():
        hook(module.register_forward_hook, functools.partial(engine.in_encoder, key, read))
    for modality, name in adapter.encoders.items():
        seams.stand_in(core, name, _encoder_method(engine, type(core), name, modality))
    seams.stand_in(vlm, "generate", _generate(engine, vlm, lock))
    seams.stand_in(vlm, "generate_batch", _generate_batch(engine, vlm))
    if any(stage.observes for stage in engine.stages):
        seams.observe(core, implementation)
    return seams


def _unless_paused(engine: Engine, stage: Any, function: Callable) -> Callable:
    """A hook in the encoder that does nothing while its stage does not act."""

    @functools.wraps(function)
    def seam(*args: Any) -> Any:
        return function(*args) if stage in engine.stages else None

    return seam


def _encoder_method(engine: Engine, core_class: type, name: str, modality: str) -> Any:
    """A function to bind to the core model in place of its own `name`, with the same signature."""
    original = getattr(core_class, name)

    @functools.wraps(original)
    def encode(core: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return engine.encode(core, modality, types.MethodType(original, core), args, kwargs)

    return encode


def _generate(engine: Engine, vlm: nn.Module, lock: Any) -> Any:
    """A function to bind to the model in place of its `generate`: it notes how long the prompt is."""
    previous = vlm.__dict__.get("generate")

    @functools.wraps(type(vlm).generate)
    def generate(vlm: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        given = [x for x in (kwargs.get("inputs_embeds"), ids) if x is not None]
        run = previous or types.MethodType(type(vlm).generate, vlm)
        with engine.generating(given[0].shape[1] if given else 1, lock):  # of none generate makes the text's first
            return run(*args, **kwargs)

    return generate


def _generate_batch(engine: Engine, vlm: nn.Module) -> Any:
    """A function to bind to the model in place of its `generate_batch`, which carries token ids alone."""
    previous = vlm.__dict__.get("generate_batch")

    @functools.wraps(type(vlm).generate_batch)
    def generate_batch(vlm: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if any(token in ids for ids in inputs for token in engine.token_ids.values()):
            raise Unsupported("generate_batch takes ids alone, and would answer without the picture: use generate.")
        return (previous or types.MethodType(type(vlm).generate_batch, vlm))(inputs, *args, **kwargs)

    return generate_batch


def _feed_forward(engine: Engine, layer: int, mlp: nn.Module) -> Any:
    """A function to bind to a decoder layer's FFN in place of its `forward`."""
    inner = mlp.__dict__.get("forward")  # accelerate's, where a device map spreads the model

    @functools.wraps(type(mlp).forward)
    def forward(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return engine.feed_forward(layer, mlp, x, inner or types.MethodType(type(mlp).forward, mlp))

    return torch.compiler.disable(forward)


def refuse_compiled(model: nn.Module) -> None:
    """Raise `PatchStateError` where a part of the model was compiled: it would not see hooks that come later."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        compiled = isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
        if compiled or hasattr(forward, "_torchdynamo_orig_callable"):
            raise PatchStateError(
                f"This model is compiled ({type(module).__name__}), and would not see the patch. Patch first, then "
                f"torch.compile."
            )


def refuse_unseen(layers: nn.ModuleList, method: str, hint: str) -> None:
    """Raise `Unsupported` where decoder layers hand no keywords on to an attention of transformers' registry. hint:
    what works instead."""
    for kind in dict.fromkeys(type(layer) for layer in layers):
        layer = next(layer for layer in layers if type(layer) is kind)
        seen = [name for name, part in layer.named_children() if _by_registry(part)]
        if not seen or not _hands_keywords_on(kind, seen):
            raise Unsupported(
                f"{method} looks into decoder layers, and {kind.__name__} does not show its attention: that goes past "
                f"transformers' registry, or is handed no keywords.{hint}"
            )


def _by_registry(attention: nn.Module) -> bool:
    """Whether a part of a layer takes its attention from transformers' registry. Some have their own."""
    forward, name = inspect.unwrap(type(attention).forward), "ALL_ATTENTION_FUNCTIONS"
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return name in names and getattr(forward, "__globals__", {}).get(name) is ALL_ATTENTION_FUNCTIONS


def _hands_keywords_on(layer: type[nn.Module], names: list[str]) -> bool:
    """Whether a layer's forward calls one of these parts with the keywords that it does not know. Read in its source,
    as calling it would need a model's inputs; where there is none, the first forward finds out."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(layer.forward))))
    except (OSError, TypeError, SyntaxError):
        return True
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return any(call.func.attr in names and any(word.arg is None for word in call.keywords) for call in calls)


def refuse_windows(config: Any) -> None:
    """Raise `Unsupported` for a decoder whose layers see a window, in which dropped tokens would count."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    if window and kinds is None and getattr(text, "use_sliding_window", True):
        kinds = ["sliding_attention"]
    chunked = getattr(text, "attention_chunk_size", None) and (kinds is None or "chunked_attention" in kinds)
    if chunked or (window and "sliding_attention" in (kinds or ())):
        raise Unsupported(
            "Decoders with sliding-window attention are not supported: a window counts dropped tokens. Where all texts "
            "are shorter than the window none is needed: load the model with sliding_window=None, if its config can."
        )


def refuse_states(config: Any, method: str, hint: str) -> None:
    """Raise `Unsupported` for a decoder whose cache holds states, which no dropped token can be taken out of. hint:
    what works instead."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    if kinds := sorted({type(layer).__name__ for layer in layers} - {DynamicLayer.__name__}):
        raise Unsupported(
            f"{method} acts in decoder layers, and these cache states, of which no token can be taken out: "
            f"{', '.join(kinds)}.{hint}"
        )


def adapter_site(vlm: nn.Module, adapter: Adapter, parts: tuple) -> Site:
    """Where the stages of a patch are to act."""
    core = adapter.core(vlm)
    acting = tuple(part for part in parts if not part.is_identity)
    return Site(adapter, vlm.config, core, adapter.layers(core), acting)
