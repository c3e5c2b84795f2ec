"""`vtok.patch` and its undo, and the handle that it gives."""

from __future__ import annotations

import functools
import html
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from os import PathLike
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vtok import adapter as adapters
from vtok import compressor as compressors
from vtok import config as configs
from vtok import tower as towers
from vtok.compressor import Compressor
from vtok.engine.forward import Engine
from vtok.engine.install import adapter_site, install, refuse_compiled, refuse_states, refuse_unseen, refuse_windows
from vtok.engine.prompt import Told
from vtok.engine.replay import Kept, Recorded
from vtok.engine.seams import Seams
from vtok.engine.trace import Shapes, Trace
from vtok.errors import InvalidValue, NothingToReport, PatchStateError, Unsupported
from vtok.stages import stage as stages
from vtok.stages.blocks import Grouping, VitTrace, check_tower
from vtok.stages.stage import Site, Stage
from vtok.tower import Tower

TRANSFORMERS = ((5, 19), (5, 25))  # tested from the first up to, not with, the second; as in pyproject.toml
_PATCHES: weakref.WeakKeyDictionary[nn.Module, Patch] = weakref.WeakKeyDictionary()  # core model -> its patch
Method = str | Compressor | Sequence[str | Compressor]


def patch(
    model: nn.Module,
    method: Method | None = None,
    *,
    budget: float | None = None,
    config: str | PathLike[str] | Mapping[str, Any] | None = None,
    **options: Any,
) -> Patch:
    """Make a vision-language model run on fewer visual tokens, or a language model on a smaller cache, in place.

    model: a `...ForConditionalGeneration` of a supported family, or a wrapper around one (PEFT). For methods of the
        cache and the prompt also a `...ForCausalLM` with a plain dynamic cache. For methods that act in the blocks of a
        vision transformer ("tome") also one alone, of transformers, timm or open_clip, or its owner.
    method: the name of a compressor, a compressor object, or several, one a stage. None takes the family's default.
    budget: instead of `keep`: the mean over decoder layers of kept over all visual tokens is at most this, in (0, 1].
        Of a language model: of the columns of the cache to which a token attends (`Trace.mean_attended`).
    config: instead of a method: a file that `Patch.save` wrote, or what is in it.
    options: of a compressor given by name, such as `keep`.

    Returns the handle, which is also a context manager. Raises `UnknownName`, `InvalidValue`, `Unsupported` or
    `PatchStateError`, and then leaves the model as it was.
    """
    _check_transformers(transformers.__version__)
    if config is not None:
        if method is not None or options or budget is not None:
            raise InvalidValue("A config says all: give no method, budget or options beside it.")
        method = configs.load(config)
    _check_arguments(model, method)
    refuse_compiled(model)
    try:
        vlm, adapter = adapters.find(model)
    except Unsupported as no_vlm:
        return _patch_vit(model, method, budget, options, no_vlm)
    core = adapter.core(vlm)
    if core in _PATCHES:
        raise PatchStateError(
            f"This model is already patched: {_PATCHES[core]!r}. Call swap() on that handle, or vtok.unpatch(model)."
        )
    adapter.check(vlm.config)
    return Patch(vlm, adapter, _chosen(adapter, method, options, budget, len(adapter.layers(core))))


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: the model is exactly what it was. Raises `PatchStateError` if it is not patched."""
    patches = patches_on(model)
    if not patches:
        raise PatchStateError("This model is not patched.")
    for found in patches:
        found.remove()


def patches_on(model: nn.Module) -> list[Handle]:
    """The patches that are on a model and its parts."""
    return [_PATCHES[module] for module in model.modules() if module in _PATCHES]


class Handle:
    """What `patch` gives back: a context manager that takes the patch off again."""

    family: str
    compressors: tuple[Compressor, ...]
    _target: weakref.ref[nn.Module]
    _seams: Seams

    @property
    def active(self) -> bool:
        """Whether the patch is on the model."""
        target = self._target()
        return target is not None and _PATCHES.get(target) is self

    def remove(self) -> None:
        """Take the patch off. Doing so twice is harmless."""
        if self.active:
            self._seams.remove()
            del _PATCHES[self._target()]

    def save(self, file: str | PathLike[str]) -> None:
        """Write the choice of compressors as JSON. `vtok.load(file)` gives them back, and `vtok.patch(model,
        config=file)` takes the file itself."""
        configs.save(self.compressors, file)

    def __enter__(self):
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        parts = ", ".join(repr(part) for part in self.compressors)
        return f"<vtok.Patch {parts} on {self.family}{'' if self.active else ', removed'}>"


class Patch(Handle):
    """The handle of a patched model. Use it as a context manager, or call `remove()`.

    Threads may share the model: each has its own `trace`, and `paused`, `using` and `prompt` hold for the calling
    thread alone.
    """

    def __init__(self, vlm: nn.Module, adapter: adapters.Adapter, parts: tuple[Compressor, ...]) -> None:
        core = adapter.core(vlm)
        self.family, self._adapter = adapter.family, adapter
        self._target, self._vlm = weakref.ref(core), weakref.ref(vlm)
        # Qwen-VL keeps the position offsets of the last prompt on the model: one call of `generate` at a time
        self._lock = threading.RLock() if hasattr(core, "rope_deltas") else None
        self._compiled = False
        self._install(parts)
        _PATCHES[core] = self

    def _install(self, parts: tuple[Compressor, ...]) -> None:
        """Check the compressors against the model, and put the engine's seams on it."""
        vlm, adapter = self._vlm(), self._adapter
        site = adapter_site(vlm, adapter, parts)
        _check_parts(parts, site)
        acting = _stages(parts, site)
        token_ids = {modality: adapter.token_id(site.core.config, modality) for modality in adapter.encoders}
        engine = Engine(adapter, acting, token_ids, Shapes(adapter, vlm.config), _reads(site.parts))
        self._seams = install(vlm, engine, site, self._lock)
        self._engine, self.compressors = engine, parts

    @property
    def trace(self) -> Trace:
        """The record of the last prefill, of this thread if it has run one. Raises `NothingToReport` before one."""
        if self._engine.trace is None:
            raise NothingToReport("Nothing to report yet: run the patched model on a prompt first.")
        return self._engine.trace

    def swap(self, method: Method | None = None, *, budget: float | None = None, **options: Any) -> Patch:
        """Let another method act on the model, as `patch` takes it. Where it cannot, the former goes on."""
        self._must_be_on("swap the method of")
        core = self._target()
        n_layers = len(self._adapter.layers(core))
        parts = _chosen(self._adapter, method, options, budget, n_layers)
        self._refuse_compiled("is compiled, and would not see another method")
        before, old = self._seams, self.compressors
        before.remove()
        try:
            self._install(parts)
        except BaseException:
            self._install(old)
            raise
        return self

    @contextmanager
    def paused(self) -> Iterator[Patch]:
        """Within, pictures are not compressed, in this thread. Conversations on a compressed cache go on."""
        self._must_be_on("pause")
        with self._engine.acting([]):
            yield self

    @contextmanager
    def using(self, method: str | None = None, **knobs: Any) -> Iterator[Patch]:
        """Within, a compressor has other knobs, in this thread.

        method: which, by name, where there are several. knobs: of the compressor, such as keep=0.1. A list gives one
            value a picture, in the order of the prompts, for methods before the language model.
        Raises `Unsupported` where the change needs other seams than the patch has: `swap` puts them there."""
        self._must_be_on("change")
        if not knobs:
            raise InvalidValue("Say which knob to change, as in using(keep=0.1).")
        site = adapter_site(self._vlm(), self._adapter, self.compressors)
        named = [part for part in self.compressors if method in (None, part.name)]
        if len(named) != 1:
            names = ", ".join(part.name for part in self.compressors)
            raise InvalidValue(f"Say which compressor to change, one of: {names}; got {method!r}.")
        each = _each(named[0], knobs)
        parts = tuple(each[0] if part is named[0] else part for part in self.compressors)
        site = replace(site, parts=tuple(part for part in parts if not part.is_identity))
        _check_parts(parts, site)
        there = {id(stage.compressor): stage for stage in self._engine.installed}  # hooks in the encoder know these
        acting = [there.get(id(stage.compressor), stage) for stage in _stages(parts, site)]
        if len(each) > 1:
            index = [stage.compressor is each[0] for stage in acting].index(True)
            acting[index].each(each)
        self._engine.check_seams(acting, _reads(site.parts))
        with self._engine.acting(acting):
            yield self

    @contextmanager
    def prompt(self, length: int | Tensor | None = None) -> Iterator[Patch]:
        """Within, a forward without labels outside of `generate` holds prompts of so many columns, in this thread.

        length: an int, or [B]; None says that all of the input is prompt. Methods that read the text need to know."""
        told = Told(whole=True) if length is None else Told(length=length)
        before, self._engine.local.prompt = self._engine.local.prompt, told
        try:
            yield self
        finally:
            self._engine.local.prompt = before

    @contextmanager
    def replaying(self, samples: Sequence[Kept]) -> Iterator[Patch]:
        """Within, forwards keep what is recorded instead of choosing, in this thread.

        samples: of each row of each forward, in their order; `patch.trace.kept()` gives those of a prefill. So a
        training forward keeps the tokens of its rollout, whatever its batch, padding and rounding. A method that
        `Compressor.replays` is False for acts as ever. Raises `InvalidValue` where records and rows do not fit."""
        self._must_be_on("replay")
        recorded, local = Recorded(samples), self._engine.local
        before, local.recorded = local.recorded, recorded
        try:
            with self._engine.acting(self._engine.installed):
                yield self
        finally:
            local.recorded = before
        recorded.finish()

    def compile(self, **options: Any) -> None:
        """Compile the language model with what the patch does in its layers, as one graph, until `remove()`.

        options: of `torch.compile`; `fullgraph` is True unless given. What the patch does around the language model
        (selection before it, compaction, restoring) stays outside of the graph. With a fixed count its shapes follow
        from the picture's size alone, so that another picture of this size compiles nothing anew.
        Times of selection within the language model are not measured then. Raises `Unsupported` for compressors in
        the language model whose count depends on the content, and for those that look into FFNs.
        """
        self._must_be_on("compile")
        core = self._target()
        self._refuse_compiled("is compiled already")
        for stage in self._engine.installed:
            if stage.in_layers and (stage.compressor.adaptive or any(True for _ in stage.ffn_layers())):
                raise Unsupported(
                    f"{stage.compressor.name} makes shapes of what it finds in the picture, which cannot be compiled."
                )
            if not stage.compiles:
                raise Unsupported(f"{stage.compressor.name} changes the cache in its layers, which cannot be compiled.")
        decoder = self._adapter.language_model(core)
        compiled = torch.compile(decoder.forward, **{"fullgraph": True, **options})

        @functools.wraps(type(decoder).forward)
        def forward(language_model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return compiled(*args, **kwargs)

        self._seams.stand_in(decoder, "forward", forward)
        self._compiled = True

    def _must_be_on(self, wish: str) -> None:
        if not self.active:
            raise PatchStateError(f"This patch was removed: there is nothing of it to {wish}.")

    def _refuse_compiled(self, words: str) -> None:
        if self._compiled or any(module._compiled_call_impl is not None for module in self._target().modules()):
            raise PatchStateError(f"This model {words}. Remove the patch first.")

    def _saved(self) -> str:
        """What the last prefill saved, in words."""
        trace = self._engine.trace
        if trace is None:
            return "no picture yet" if self._adapter.encoders else "no prompt yet"
        tokens = f"{trace.mean_keep:.1%} of {sum(trace.n_visual)} visual tokens kept in the last prefill"
        if not trace.pictures:
            if not any(stage.on_text for stage in self._engine.installed):
                return "no picture in the last prompt"
            tokens = "in the last prefill"
        try:
            flops, cache = trace.flops(), trace.kv_bytes()
        except Unsupported:
            return tokens
        shares = {"FLOPs": flops["compressed"]["prefill"] / flops["dense"]["prefill"]}
        shares["cache"] = cache["compressed"] / cache["dense"]
        return f"{tokens}, {', '.join(f'{share:.1%} of the {name}' for name, share in shares.items())}"

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}: {self._saved()}>"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td><code>{html.escape(repr(part))}</code></td></tr>" for part in self.compressors)
        where = html.escape(self.family) + ("" if self.active else " (removed)")
        return f"<table><tr><th>vtok on {where}: {html.escape(self._saved())}</th></tr>{rows}</table>"


class VitPatch(Handle):
    """The handle of a patched vision transformer that is no part of a vision-language model."""

    def __init__(self, vit: nn.Module, tower: Tower, compressor: Compressor) -> None:
        self.family, self.compressors = tower.kind, (compressor,)
        self._target, self._seams, self._grouping = weakref.ref(vit), Seams(), None
        if not compressor.is_identity:
            modules = tower.blocks(vit)
            self._grouping = Grouping(compressor, tower, len(modules))
            for register, function, how in self._grouping.hooks(modules):
                self._seams.hook(register, function, **how)
        _PATCHES[vit] = self

    @property
    def trace(self) -> VitTrace:
        """The record of the last forward. Raises `NothingToReport` before the first, or if nothing is ever merged."""
        if self._grouping is None or self._grouping.trace is None:
            raise NothingToReport("Nothing to report: run the patched model on a picture first.")
        return self._grouping.trace

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
    check_tower(tower, vit, parts[0])
    return VitPatch(vit, tower, parts[0])


def _check_arguments(model: Any, method: Any) -> None:
    """Say what was meant where something else than a model and a method was given."""
    if isinstance(model, str | PathLike):
        raise InvalidValue(f"patch takes a model, not its name: load it, as vtok.models.load({str(model)!r}) does.")
    if not isinstance(model, nn.Module):
        if isinstance(getattr(model, "model", None), nn.Module):
            raise InvalidValue(f"patch takes a model, not a {type(model).__name__}: pass its .model.")
        raise InvalidValue(f"patch takes a torch module, not a {type(model).__name__}.")
    if isinstance(method, int | float) and not isinstance(method, bool):
        raise InvalidValue(f"A method is a name or a compressor object, not {method!r}. Did you mean keep={method!r}?")
    if isinstance(method, type) and issubclass(method, Compressor):
        raise InvalidValue(f"A compressor is an object: {method.__name__}(...), not the class.")


def _chosen(
    adapter: adapters.Adapter, method: Method | None, options: dict[str, Any], budget: float | None, n_layers: int
) -> tuple[Compressor, ...]:
    """The compressors of a call; the family's default where no method is named."""
    if method is None:
        if not adapter.default:
            raise InvalidValue('A language model has no default method: name one, as in patch(model, "snapkv").')
        method = adapter.default["method"]
        options = {**({"keep": adapter.default["keep"]} if budget is None else {}), **options}
    return _parts(method, options, budget, n_layers, bool(adapter.encoders))


def _parts(
    method: Any, options: dict[str, Any], budget: float | None, n_layers: int, pictures: bool = True
) -> tuple[Compressor, ...]:
    """The single-stage parts of what `patch` is given. pictures: whether a budget is a share of visual tokens, and not
    of the cache."""
    if budget is not None:
        if "keep" in options:
            raise InvalidValue("Give keep or budget, not both.")
        if isinstance(budget, bool) or not isinstance(budget, float | int) or not 0.0 < budget <= 1.0:
            raise InvalidValue(f"budget must be a fraction in (0, 1], got {budget!r}")
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
        solved = [i for i, item in enumerate(built) if item.of_pictures == pictures]
        if len(solved) != 1:
            names, what = ", ".join(item.name for item in built), "visual tokens" if pictures else "the cache"
            raise InvalidValue(
                f"A budget is for one compressor that drops {what}, not for {names}: give each its own keep."
            )
        built[solved[0]] = built[solved[0]].with_budget(float(budget), n_layers)
    return tuple(part for item in built for part in item.parts())


def _each(part: Compressor, knobs: dict[str, Any]) -> list[Compressor]:
    """The compressor with other knobs: one, or where a knob is a list one a picture."""
    known = {f.name for f in fields(part) if f.init}
    if unknown := sorted(set(knobs) - known):
        raise InvalidValue(f"{part.name} has no option {', '.join(unknown)}. It has: {', '.join(sorted(known))}.")
    lists = {name: value for name, value in knobs.items() if isinstance(value, list)}
    if not lists:
        return [replace(part, **knobs)]
    if part.stage != "pre_llm":
        raise Unsupported(f"{part.name} cannot have one value a picture: methods before the language model can.")
    if len({len(values) for values in lists.values()}) > 1 or not all(lists.values()):
        raise InvalidValue("Lists of knobs have one value a picture each, so they are of one length.")
    rows = [dict(zip(lists, row)) for row in zip(*lists.values())]
    return [replace(part, **{**knobs, **row}) for row in rows]


def _stages(parts: tuple[Compressor, ...], site: Site) -> list[Stage]:
    """The stages that act, in order."""
    order = stages.load_all()
    return [stages.of(part, site) for part in sorted(site.parts, key=lambda part: order.index(part.stage))]


def _reads(parts: tuple[Compressor, ...]) -> list[tuple[str, Any]]:
    """What acting compressors read of the vision encoder, (need, layer)."""
    reads = {(need, x) for part in parts for need, layers in part.encoder_layers.items() for x in layers}
    return sorted(reads, key=str)


def _check_parts(parts: tuple[Compressor, ...], site: Site) -> None:
    """Refuse what the stages and the family cannot give."""
    order, names = stages.load_all(), [part.stage for part in parts]
    for stage in names:
        if stage not in order:
            raise Unsupported(f"There is no stage {stage!r}. Stages are: {', '.join(order)}.")
        if names.count(stage) > 1:
            same = ", ".join(part.name for part in parts if part.stage == stage)
            raise Unsupported(f"At most one compressor a stage: {same} all act at {stage!r}.")
    available = site.adapter.available(site.config)
    pictures = " Methods before the language model work here: divprune, for example."
    hint = pictures if site.adapter.encoders else " No method of vtok works on this language model."
    for part in parts:
        if not site.adapter.encoders and not stages.find(part.stage).on_text:
            raise Unsupported(f"{part.name} acts on pictures, and {type(site.core).__name__} takes none.")
        if missing := sorted(part.needs_now - available):
            hints = "".join(f" {part.hints[need]}" for need in missing if need in part.hints)
            if "attention" in missing:
                hints += f" Its layers have windows or states, of which no token can be taken out.{hint}"
            raise Unsupported(
                f"{part.name} needs {', '.join(missing)}, which this {site.adapter.family} model does not have.{hints}"
            )
    if site.parts and not site.adapter.windows:
        refuse_windows(site.config)
    for part in site.parts:
        if part.needs_now & {"attention", "ffn"}:
            refuse_unseen(site.layers, part.name, hint)
            refuse_states(site.config, part.name, hint)


def _check_transformers(version: str) -> None:
    low, high = TRANSFORMERS
    if not low <= tuple(int(part) for part in version.split(".")[:2]) < high:
        raise Unsupported(
            f"transformers {version} is outside the tested window {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}: "
            f'pip install "transformers>={low[0]}.{low[1]},<{high[0]}.{high[1]}"'
        )


__all__ = ["Patch", "patch", "unpatch"]
