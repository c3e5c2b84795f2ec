"""`vtok.patch` and its undo: installs the engine's seams on a model, and takes every one of them away again."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
import transformers
from torch import nn

from vtok import adapter as adapters
from vtok import compressor as compressors
from vtok import tower as towers
from vtok import vit as vits
from vtok.compressor import STAGES, Compressor
from vtok.engine import ffn, probe
from vtok.engine.forward import Engine
from vtok.engine.trace import Shapes, Trace
from vtok.errors import InvalidValue, PatchStateError, Unsupported
from vtok.tower import NEEDS as ENCODER_NEEDS
from vtok.tower import Tower, layer_index
from vtok.types import check_keep

TRANSFORMERS = ((5, 19), (5, 24))  # tested from the first up to, not with, the second; as in pyproject.toml
_PATCHES: weakref.WeakKeyDictionary[nn.Module, Patch] = weakref.WeakKeyDictionary()  # core model -> its patch


def patch(
    model: nn.Module,
    method: str | Compressor | Sequence[str | Compressor] | None = None,
    *,
    budget: float | None = None,
    **options: Any,
) -> Patch:
    """Make a vision-language model run on fewer visual tokens, in place.

    model: a `...ForConditionalGeneration` of a supported family, or a wrapper around one (PEFT). For methods that act
        in the blocks of a vision transformer ("tome") also one alone, of transformers, timm or open_clip, or its owner.
    method: the name of a compressor, a compressor object, or several, one a stage. None takes the family's default.
    budget: instead of `keep`: the mean over decoder layers of kept over all visual tokens is at most this, in (0, 1].
    options: of a compressor given by name, such as `keep`.

    Returns the handle, which is also a context manager. Raises `UnknownName`, `InvalidValue`, `Unsupported` or
    `PatchStateError`, and then leaves the model as it was.
    """
    _check_transformers(transformers.__version__)
    _refuse_compiled(model)
    try:
        vlm, adapter = adapters.find(model)
    except Unsupported as no_vlm:
        return _patch_vit(model, method, budget, options, no_vlm)
    core = adapter.core(vlm)
    if core in _PATCHES:
        raise PatchStateError(f"This model is already patched: {_PATCHES[core]!r}. Call vtok.unpatch(model) first.")
    adapter.check(vlm.config)
    if method is None:
        method = adapter.default["method"]
        chosen = {"keep": adapter.default["keep"]} if budget is None else {}
        options = {**chosen, **options}
    parts = _parts(method, options, budget, len(adapter.layers(core.language_model)))
    _check_parts(parts, vlm, adapter)
    return Patch(vlm, adapter, parts)


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: the model is exactly what it was. Raises `PatchStateError` if it is not patched."""
    patches = {_PATCHES[module] for module in model.modules() if module in _PATCHES}
    if not patches:
        raise PatchStateError("This model is not patched.")
    for found in patches:
        found.remove()


def available() -> dict[str, dict[str, dict[str, Any]]]:
    """What there is: {"compressors": {name: facts}, "adapters": {family: facts}}.

    "families" of a compressor are those that give all it needs, "lacking" says what the others do not; where that is
    among its "optional" needs, one of its "hints" says which parameter makes up for it."""
    families = adapters.load_all()
    return {
        "compressors": {
            name: {
                "stage": cls.stage,
                "needs": sorted(cls.needs),
                "paper": cls.paper,
                "adaptive": cls.adaptive,
                "text_guided": cls.text_guided,
                "trained": cls.trained,
                "slow": cls.slow,
                "optional": sorted(cls.optional),
                "hints": dict(cls.hints),
                "families": [family for family, adapter in families.items() if cls.needs <= adapter.provides],
                "lacking": {
                    family: missing
                    for family, adapter in families.items()
                    if (missing := sorted(cls.needs - adapter.provides))
                },
            }
            for name, cls in compressors.load_all().items()
        },
        "adapters": {
            family: {
                "model_types": list(adapter.model_types),
                "modalities": list(adapter.encoders),
                "provides": sorted(adapter.provides),
                "default": dict(adapter.default),
            }
            for family, adapter in families.items()
        },
    }


class Patch:
    """The handle of a patched model. Use it as a context manager, or call `remove()`."""

    def __init__(self, vlm: nn.Module, adapter: adapters.Adapter, parts: tuple[Compressor, ...]) -> None:
        core = adapter.core(vlm)
        language_model = core.language_model
        self.family = adapter.family
        self.compressors = parts
        self._core = weakref.ref(core)
        self._handles: list[Any] = []
        self._methods: list[tuple[weakref.ref[nn.Module], str]] = []
        self._compiled = False
        flash = "flash" in (language_model.config._attn_implementation or "")
        llm = any(part.stage in ("llm", "decode") and not part.is_identity for part in parts)
        watches_layers = llm or ((flash or adapter.late) and not all(part.is_identity for part in parts))
        shapes = Shapes(adapter, vlm.config, language_model.get_input_embeddings().weight.itemsize)
        token_ids = {modality: adapter.token_id(core.config, modality) for modality in adapter.encoders}
        engine = self._engine = Engine(adapter, parts, token_ids, shapes, watches_layers)
        probes = {}  # found before the first hook, as there may be no such layer
        if engine.reads:
            tower, layers = adapter.tower(vlm.config), adapter.encoder_layers(core)
            probes = {key: tower.probe(layers, *key) for key in engine.reads}
        blocks = []
        if engine.encoder is not None and "token_blocks" in engine.encoder.needs_now:
            tower, vit = adapter.tower(vlm.config), core.get_submodule(adapter.encoder)
            n = len(tower.blocks(vit)) + 1  # hidden states; behind the block of the last that is read nothing matters
            depth = max(layer_index(x, n) for x in tower.features)
            engine.blocks, blocks = _blocks(engine.encoder, vit, tower, depth)

        hook = self._hook
        for register, function, how in blocks:  # before the probes, which then see what these leave
            hook(register, function, **how)
        hook(vlm.register_forward_pre_hook, engine.before_outer)
        hook(vlm.register_forward_hook, engine.after_outer, always_call=True, with_kwargs=False)
        hook(core.register_forward_pre_hook, engine.before_core)
        hook(core.register_forward_hook, engine.after_core, always_call=True, with_kwargs=False)
        hook(language_model.register_forward_pre_hook, engine.before_language_model)
        hook(language_model.register_forward_hook, engine.after_language_model)
        if watches_layers:
            for i, layer in enumerate(adapter.layers(language_model)):
                hook(layer.register_forward_pre_hook, functools.partial(engine.before_layer, i), traced=True)
                if i in engine.ffn_layers:
                    hook(layer.self_attn.register_forward_pre_hook, engine.before_attention, traced=True)
                    self._stand_in(layer.mlp, "forward", _feed_forward(engine, i, layer.mlp))
        for key, (module, read) in probes.items():
            hook(module.register_forward_hook, functools.partial(engine.in_encoder, key, read))
        for modality, name in adapter.encoders.items():
            self._stand_in(core, name, _encoder_method(engine, type(core), name, modality))
        self._release = None
        if "attention" in engine.needs:
            implementation = language_model.config._attn_implementation
            probe.acquire(implementation)
            self._release = weakref.finalize(core, probe.release, implementation)
            self._release.atexit = False
        _PATCHES[core] = self

    def _hook(
        self, register: Any, function: Any, *, traced: bool = False, with_kwargs: bool = True, **options: Any
    ) -> None:
        seam = (_Seam if traced else _Closed)(function)
        self._handles.append(register(seam, with_kwargs=with_kwargs, **options))

    def _stand_in(self, module: nn.Module, name: str, function: Any) -> None:
        """Let `function` be a method of this very module, until `remove`. It holds what was so before in `previous`."""
        function.previous = module.__dict__.get(name)
        setattr(module, name, types.MethodType(function, module))
        self._methods.append((weakref.ref(module), name))

    @property
    def trace(self) -> Trace:
        """The record of the last prefill. Raises `PatchStateError` before the first."""
        if self._engine.trace is None:
            raise PatchStateError("Nothing to report yet: run the patched model on a picture first.")
        return self._engine.trace

    def compile(self, **options: Any) -> None:
        """Compile the language model with what the patch does in its layers, as one graph, until `remove()`.

        options: of `torch.compile`; `fullgraph` is True unless given. What the patch does around the language model
        (selection before it, compaction, restoring) stays outside of the graph. With a fixed count its shapes follow
        from the picture's size alone, so that another picture of this size compiles nothing anew.
        Times of selection within the language model are not measured then. Raises `Unsupported` for compressors in
        the language model whose count depends on the content, and for those of the "decode" stage.
        """
        core = self._core()
        if not self.active:
            raise PatchStateError("This patch was removed: there is nothing of it to compile.")
        if self._compiled or any(module._compiled_call_impl is not None for module in core.modules()):
            raise PatchStateError("This model is compiled already. Remove the patch, and begin again.")
        for part in self.compressors:
            if not part.is_identity and (part.stage == "decode" or (part.stage == "llm" and part.adaptive)):
                raise Unsupported(
                    f"{part.name} makes shapes of what it finds in the picture, which cannot be compiled."
                )
        compiled = torch.compile(core.language_model.forward, **{"fullgraph": True, **options})

        @functools.wraps(type(core.language_model).forward)
        def forward(language_model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return compiled(*args, **kwargs)

        self._stand_in(core.language_model, "forward", forward)
        self._compiled = True

    @property
    def active(self) -> bool:
        """Whether the patch is on the model."""
        core = self._core()
        return core is not None and _PATCHES.get(core) is self

    def remove(self) -> None:
        """Take the patch off. Doing so twice is harmless."""
        if not self.active:
            return
        core = self._core()
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
        del _PATCHES[core]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        parts = ", ".join(repr(part) for part in self.compressors)
        return f"<vtok.Patch {parts} on {self.family}{'' if self.active else ', removed'}>"


class VitPatch(Patch):
    """The handle of a patched vision transformer that is no part of a vision-language model."""

    def __init__(self, vit: nn.Module, tower: Tower, compressor: Compressor) -> None:
        self.family = tower.kind
        self.compressors = (compressor,)
        self._core = weakref.ref(vit)
        self._handles, self._methods, self._release, self._blocks = [], [], None, None
        if not compressor.is_identity:
            self._blocks, hooks = _blocks(compressor, vit, tower)
            for register, function, how in hooks:
                self._hook(register, function, **how)
        _PATCHES[vit] = self

    @property
    def trace(self) -> vits.VitTrace:
        """The record of the last forward. Raises `PatchStateError` before the first, or if nothing is ever merged."""
        if self._blocks is None or self._blocks.last is None:
            raise PatchStateError("Nothing to report: run the patched model on a picture first.")
        return self._blocks.trace()

    def compile(self, **options: Any) -> None:
        """Raises `Unsupported`: there is no language model to compile apart."""
        raise Unsupported("A vision transformer alone is compiled whole: torch.compile(model), after vtok.patch.")


def _patch_vit(model: nn.Module, method: Any, budget: float | None, options: dict, no_vlm: Unsupported) -> VitPatch:
    found = None if method is None else towers.find(model)
    if found is None:
        raise no_vlm
    vit, tower = found
    if vit in _PATCHES:
        raise PatchStateError(f"This model is already patched: {_PATCHES[vit]!r}. Call vtok.unpatch(model) first.")
    parts = _parts(method, options, budget, len(tower.blocks(vit)))
    if len(parts) > 1 or "token_blocks" not in parts[0].needs:
        raise no_vlm
    if lacking := parts[0].needs_now - {"token_blocks"}:
        raise Unsupported(f"{parts[0]!r} needs {', '.join(lacking)}, which a vision transformer alone does not have.")
    return VitPatch(vit, tower, parts[0])


def _blocks(compressor: Compressor, vit: nn.Module, tower: Tower, depth: int | None = None) -> tuple[Any, list]:
    """A compressor in the blocks of `vit`, and its hooks: (where to register, hook, options)."""
    tower.check(vit, compressor.masks)
    modules = tower.blocks(vit)
    if any(isinstance(hook, _Seam) for block in modules for hook in block._forward_pre_hooks.values()):
        raise PatchStateError("This vision tower is patched already, alone or in another model. Unpatch that first.")
    blocks = vits.Blocks(compressor, tower, len(modules), depth)
    return blocks, list(blocks.hooks(modules))


class _Seam:
    """A hook. It cannot be copied, since a copied model's hooks would belong to the original."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict) -> _Seam:
        raise PatchStateError("A patched model cannot be copied: unpatch it, copy it, then patch both.")


class _Closed(_Seam):
    """A hook that the compiler does not trace, since what it decides differs from forward to forward."""

    @torch.compiler.disable
    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def _encoder_method(engine: Engine, core_class: type, name: str, modality: str) -> Any:
    """A function to bind to the core model in place of its own `name`, with the same signature."""
    original = getattr(core_class, name)

    @functools.wraps(original)
    def encode(core: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return engine.encode(core, modality, types.MethodType(original, core), args, kwargs)

    return encode


def _feed_forward(engine: Engine, layer: int, mlp: nn.Module) -> Any:
    """A function to bind to a decoder layer's FFN in place of its `forward`."""
    inner = mlp.__dict__.get("forward")  # accelerate's, where a device map spreads the model

    @functools.wraps(type(mlp).forward)
    def forward(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return engine.feed_forward(layer, mlp, x, inner or types.MethodType(type(mlp).forward, mlp))

    return torch.compiler.disable(forward)


def _parts(method: Any, options: dict[str, Any], budget: float | None, n_layers: int) -> tuple[Compressor, ...]:
    if budget is not None:
        if "keep" in options:
            raise InvalidValue("Give keep or budget, not both.")
        if isinstance(budget, bool) or not isinstance(budget, float | int) or not 0.0 < budget <= 1.0:
            raise InvalidValue(f"budget must be a fraction in (0, 1], got {budget!r}")
    if "keep" in options:
        check_keep(options["keep"])
    methods = [method] if isinstance(method, str | Compressor) else list(method)
    if not methods:
        raise InvalidValue("No compressor was given.")
    if options and not (len(methods) == 1 and isinstance(methods[0], str)):
        raise InvalidValue(
            f"Options ({', '.join(options)}) go with one compressor given by name; set them on the objects."
        )
    built = []
    for item in methods:
        if isinstance(item, str):
            item = compressors.build(item, **options)
        elif not isinstance(item, Compressor):
            raise InvalidValue(f"A method is a name or a compressor object, not {item!r}.")
        built.append(item)
    if budget is not None:
        if len(built) > 1:
            raise InvalidValue("A budget can be solved for one compressor; give each its own keep.")
        built = [built[0].with_budget(float(budget), n_layers)]
    return tuple(part for item in built for part in item.parts())


def _check_parts(parts: tuple[Compressor, ...], vlm: nn.Module, adapter: adapters.Adapter) -> None:
    stages = [part.stage for part in parts]
    for stage in stages:
        if stage not in STAGES:
            raise Unsupported(f"There is no stage {stage!r}. Stages are: {', '.join(STAGES)}.")
        if stages.count(stage) > 1:
            names = ", ".join(part.name for part in parts if part.stage == stage)
            raise Unsupported(f"At most one compressor a stage: {names} all act at {stage!r}.")
    for part in parts:
        if part.stage == "decode":
            part.sparse_layers(len(adapter.layers(adapter.core(vlm).language_model)))
        if part.stage == "llm":
            part.schedule(len(adapter.layers(adapter.core(vlm).language_model)))  # raises where the depth is too small
        if missing := sorted(part.needs_now - adapter.available(vlm.config)):
            hints = "".join(f" {part.hints[need]}" for need in missing if need in part.hints)
            raise Unsupported(
                f"{part.name} needs {', '.join(missing)}, which this {adapter.family} model does not have.{hints}"
            )
        if "ffn" in part.needs_now and not part.is_identity:
            layers = adapter.layers(adapter.core(vlm).language_model)
            for layer in layers:
                ffn.check(layer, part.name, copies=part.stage == "decode")
            ffn.check_formula(layers[0].mlp, part.name)
    whole_views = ENCODER_NEEDS | {"crops"}
    for part, other in permutations(parts, 2):
        if part.scatters and not part.is_identity and (needs := sorted(other.needs_now & whole_views)):
            raise Unsupported(f"{other.name} needs {', '.join(needs)} of whole views, and {part!r} leaves parts.")
    text = vlm.config.get_text_config()
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()) and getattr(text, "sliding_window", None):
        raise Unsupported("Decoders with sliding-window attention are not supported: a window counts dropped tokens.")
    rope = getattr(text, "rope_parameters", None) or {}
    for part in parts:
        if getattr(part, "renumber", False) and "mrope_section" in rope:
            raise Unsupported(f"{part.name}(renumber=True) has no meaning for the M-RoPE of {adapter.family}.")


def _check_transformers(version: str) -> None:
    low, high = TRANSFORMERS
    if not low <= tuple(int(part) for part in version.split(".")[:2]) < high:
        raise Unsupported(
            f"transformers {version} is outside the tested window {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}: "
            f'pip install "transformers>={low[0]}.{low[1]},<{high[0]}.{high[1]}"'
        )


def _refuse_compiled(model: nn.Module) -> None:
    compiled = isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or any(
        module._compiled_call_impl is not None for module in model.modules()
    )
    if compiled:
        raise PatchStateError("This model is compiled, and would not see the patch. Patch first, then torch.compile.")


__all__ = ["Patch", "available", "patch", "unpatch"]
