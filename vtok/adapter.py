"""The base class of model-family adapters, and how a model finds its own. An adapter is one file in `adapters/`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok.errors import Unsupported
from vtok.registry import register
from vtok.tower import Layer, Tower
from vtok.types import Layout, Plane

_REGISTRY: dict[str, type[Adapter]] = {}


@dataclass(frozen=True)
class Encoded:
    """What the encoder made of the pictures (or clips) of one call, in order.

    layouts: one a picture, as the prompt's placeholders count it.
    small: the layouts after an encoder-stage compressor, one a picture, or None.
    sources: for each picture the [n_small] tokens of `layouts[i]` that stand for the tokens of `small[i]`, or None.
    probed: for each picture what compressors asked of the encoder, (need, layer) -> [V, P, ...]; or None.
    previews: for each picture what `Adapter.join` wants to see of it; None where the pictures are whole.
    merged_into: for each picture [n] the token of `layouts[i]` that stands for each after merging; or None.
    """

    modality: str
    layouts: tuple[Layout, ...]
    small: tuple[Layout, ...] | None = None
    sources: tuple[Tensor, ...] | None = None
    probed: tuple[dict[tuple[str, Layer], Tensor], ...] | None = None
    previews: tuple[Tensor, ...] | None = None
    merged_into: tuple[Tensor, ...] | None = None

    def pick(self, order: list[int]) -> Encoded:
        """The same pictures in another order, repeated where `order` repeats them (beam search)."""
        take = lambda items: None if items is None else tuple(items[i] for i in order)
        each = (self.layouts, self.small, self.sources, self.probed, self.previews, self.merged_into)
        return Encoded(self.modality, *map(take, each))


@dataclass(frozen=True)
class Placed:
    """Where the views of a call stand in the prompts, in order. `Adapter.join` reads from it which are one picture.

    where: [sum(sizes)] their placeholders, in the batch flattened from rows of `length`. sizes: placeholders of each.
    tokens: for places [K] of the flattened batch a number each, the same where the same token stands.
    """

    where: Tensor
    sizes: Sequence[int]
    length: int
    tokens: Callable[[Tensor], Tensor]

    def unbroken(self) -> list[list[int]]:
        """Views grouped: those whose placeholders follow each other in one row of the batch. Waits for the device."""
        starts = self._ends[:-1]  # of the second view on
        follows = (self.where[starts] == self.where[starts - 1] + 1) & (self.where[starts] % self.length != 0)
        groups = [[0]]
        for view, joined in enumerate(follows.tolist(), start=1):
            if joined:
                groups[-1].append(view)
            else:
                groups.append([view])
        return groups

    def before(self) -> Tensor:
        """[V] the token in front of each view."""
        first = torch.cat([self._ends.new_zeros(1), self._ends[:-1]])
        return self.tokens(self.where[first] - 1)

    def behind(self) -> Tensor:
        """[V] the token behind each view."""
        return self.tokens(self.where[self._ends - 1] + 1)

    @property
    def _ends(self) -> Tensor:
        return torch.tensor(self.sizes, device=self.where.device).cumsum(0)


class Adapter(ABC):
    """Tells the engine where things are in one model family. Names no compressor except as the measured default."""

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]  # of transformers' configs
    # what compressors may need, see Compressor.needs; "question", "question_embeds" and "ffn" are added to all, "ffn"
    # being checked on the model (vtok/engine/ffn.py), and "frames" to those with an encoder of clips
    provides: ClassVar[frozenset[str]] = frozenset({"attention"})
    lacks: ClassVar[frozenset[str]] = frozenset()  # of what a family would have from its base class or from all
    encoders: ClassVar[dict[str, str]] = {"image": "get_image_features"}  # modality -> method of the core model
    encoder: ClassVar[str] = "vision_tower"  # path in the core model of the vision encoder
    projector: ClassVar[str] = "multi_modal_projector"  # path in the core model of what maps features to embeddings
    late: ClassVar[bool] = False  # whether visual features also enter behind decoder layers, see `late_features`
    windows: ClassVar[bool] = False  # whether decoder layers may see a window, which then counts the tokens kept
    # What `patch` takes where no method is named: the best at a quarter of the tokens in the one table that there is
    # (model_cards/vtok-tiny-llava-next). A family that has been measured itself overrides it.
    default: ClassVar[dict[str, Any]] = {"method": "divprune", "keep": 0.25}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        clips = {"frames"} if "video" in cls.encoders else set()
        cls.provides = (cls.provides | {"question", "question_embeds", "ffn"} | clips) - cls.lacks
        for model_type in cls.model_types:
            register(_REGISTRY, model_type, cls)

    def core(self, model: nn.Module) -> nn.Module:
        """The module that joins text and vision and calls `language_model`."""
        return model.model

    def language_model(self, core: nn.Module) -> nn.Module:
        """The decoder, without its head."""
        return core.language_model

    def layers(self, core: nn.Module) -> nn.ModuleList:
        """Those of the decoder."""
        return self.language_model(core).layers

    def encoder_layers(self, core: nn.Module) -> Sequence[nn.Module]:
        return self.tower(core.config).blocks(core.get_submodule(self.encoder))

    # ---- what a model's config says, without the model -------------------------------------------------------------
    def check(self, config: Any) -> None:
        """Raise `Unsupported` for a variant of the family that the engine would get wrong."""

    def available(self, config: Any) -> frozenset[str]:
        """What a model of this config provides: `provides`, less what its encoder lacks."""
        return self.provides

    def tower(self, config: Any) -> Tower:
        """The vision encoder: what may be read of it, its blocks, its sizes."""
        return Tower(config=config)

    def token_id(self, config: Any, modality: str) -> int:
        return getattr(config, f"{modality}_token_id")

    @abstractmethod
    def layouts(self, config: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """One layout a picture, from the arguments of the encoder method: of pixels only the shape is asked for, of
        grids and sizes the values."""

    # ---- of one call -----------------------------------------------------------------------------------------------
    def late_features(self, kwargs: dict[str, Any]) -> dict[int, Tensor]:
        """Take out of the language model's keywords what it adds to the visual tokens behind some decoder layers.

        Returns {layer: [V, D]}, added to the output of that layer, one row a visual place of the flattened batch. The
        engine adds them in the language model's stead, to the tokens that are present there. Only where `late` is set,
        and never behind the last layer."""
        return {}

    def blocks(self, kwargs: dict[str, Any]) -> Tensor | None:
        """For families whose pictures' tokens see each other, later ones too: [B, S] which block of such tokens each
        belongs to, -1 for none, from the keywords of the core model. None for all others."""
        return None

    def masks(self, config: Any, embeds: Tensor, valid: Tensor | None, cache: Any, blocks: Tensor) -> Any:
        """What the language model takes as `attention_mask` where there are `blocks` [B, L].

        config: of the decoder. embeds: [B, L, D]. valid: [B, columns + L] bool, or None where nothing is padding.
        cache: holds `columns` columns; or None."""
        raise Unsupported(f"How {self.family} masks blocks is not known.")

    def previews(self, arguments: dict[str, Any]) -> tuple[Tensor, ...] | None:
        """For families whose encoder method is given views and not told which of them are a picture: what `join` wants
        to see of each. None for all others."""
        return None

    def by_view(self, config: Any, output: Any) -> None:
        """Let `output.pooler_output` of the encoder method have an entry [n_rows, D] for each layout, where the family
        gives it otherwise. Done twice it is harmless."""

    def join(self, encoded: Encoded, placed: Placed) -> Encoded:
        """Make pictures of views. Called where `previews` gave something; the result has no previews."""
        raise Unsupported(f"Which views of {self.family} are one picture is not known.")

    def pixels(self, modality: str, arguments: dict[str, Any]) -> Tensor:
        """[patches, values] that an encoder with a list of patches is given, the patches of a token next to each other.
        Only for those that provide "patch_list"."""
        raise Unsupported(f"The encoder of {self.family} takes whole views, and no list of patches.")

    def encode_small(
        self, core: nn.Module, modality: str, encode: Callable[..., Any], arguments: dict[str, Any], scale: float
    ) -> tuple[Any, list[tuple[int, int]]]:
        """Encode pictures whose sides are shrunk by `scale` and stretch the features back over the dense layout.

        Returns the encoder's output, with as many rows as for the dense picture (each cell repeating the feature of
        the small picture's cell that covers it), and for each picture the (rows, cols) of one small view."""
        raise Unsupported(f"A smaller picture cannot be had for {self.family}.")

    @abstractmethod
    def tiny(self, **options: Any) -> tuple[nn.Module, Any]:
        """A random model of a few hundred thousand parameters and its processor, made with no network, for tests."""


def shrink(layout: Layout, view: tuple[int, int]) -> tuple[Layout, Tensor]:
    """The layout whose views (a picture, a frame, one crop) have only `view` = (rows, cols) cells.

    Returns it and `source` [n_small]: for each small cell the dense token in the middle of the cells that it covers.
    """

    def axis(n: int, offset: int, dense: int, small: int) -> list[int]:
        runs: dict[tuple[int, int], list[int]] = {}
        for i in range(n):
            crop, at = divmod(i + offset, dense)
            runs.setdefault((crop, at * small // dense), []).append(i)
        return [run[len(run) // 2] for run in runs.values()]

    planes, sources = [], []
    for plane, start in zip(layout.planes, layout.starts):
        shape, offset, target = plane.view_shape, plane.offset, view
        if any(plane.resampled):  # its cells are not the encoder's: it shrinks as a whole, in proportion
            shape, offset = (plane.rows, plane.cols), (0, 0)
            target = tuple(max(1, n * v // s) for n, v, s in zip(shape, view, plane.view_shape))
        rows = axis(plane.rows, offset[0], shape[0], target[0])
        cols = axis(plane.cols, offset[1], shape[1], target[1])
        sources.append(start + (_long(rows)[:, None] * plane.cols + _long(cols)).flatten())
        small = replace(plane, rows=len(rows), cols=len(cols))
        if plane.kind == "crops":
            offset = tuple(o * v // s for o, v, s in zip(plane.offset, view, plane.view_shape))
            small = replace(small, crop_shape=view, offset=offset)
        if any(plane.resampled):
            span = tuple(max(1, n * v // s) for n, v, s in zip(plane.resampled, view, plane.view_shape))
            small = replace(small, resampled=span)
        planes.append(small)
    return replace(layout, planes=tuple(planes)), torch.cat(sources)


def _long(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long)  # none at all too: an empty plane


def stretch(plane: Plane, view: tuple[int, int]) -> Tensor:
    """[rows * cols] for each cell of a whole-view plane, the cell of a `view`-sized grid that covers it."""
    rows = torch.arange(plane.rows) * view[0] // plane.rows
    cols = torch.arange(plane.cols) * view[1] // plane.cols
    return (rows[:, None] * view[1] + cols).flatten()


def projected(config: Any) -> tuple[int, ...]:
    """The hidden states of the encoder that the projector reads, where a config names one or several."""
    taken = config.vision_feature_layer
    return (taken,) if isinstance(taken, int) else tuple(taken)


def bind(method: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults left out, `**kwargs` flattened."""
    bound = inspect.signature(method).bind(*args, **kwargs).arguments
    return {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}


def load_all() -> dict[str, Adapter]:
    """Import every file of `adapters/` and return family -> adapter."""
    import vtok.adapters

    for module in pkgutil.iter_modules(vtok.adapters.__path__):
        importlib.import_module(f"vtok.adapters.{module.name}")
    return {cls.family: cls() for cls in sorted(set(_REGISTRY.values()), key=lambda cls: cls.family)}


def of(config: Any) -> Adapter:
    """The adapter of a whole model's config, by its `model_type`. Raises `Unsupported` where no family has it."""
    load_all()
    if config.model_type not in _REGISTRY:
        raise Unsupported(f"No family has the model_type {config.model_type!r}. Supported families: {_families()}.")
    return _REGISTRY[config.model_type]()


def _families() -> str:
    return ", ".join(sorted({a.family for a in _REGISTRY.values()}))


def class_of(module: nn.Module) -> type:
    """The class that a module was written as: FSDP gives each module that it shards a class of torch's."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed."))


def modelling_file(module: nn.Module) -> ModuleType:
    """The Python file in which a module's class is written."""
    return sys.modules[class_of(module).__module__]


def find(model: nn.Module) -> tuple[nn.Module, Adapter]:
    """The vision-language model or language model inside `model` (itself, or wrapped by PEFT and the like) and its
    adapter."""
    from vtok.adapters.causal_lm import CausalLM

    load_all()
    for module in model.modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        known = model_type in _REGISTRY and "lm_head" in module._modules  # wrappers answer for it, but do not hold it
        if known or CausalLM.describes(module):
            if not class_of(module).__module__.startswith("transformers."):
                raise Unsupported(
                    f"{type(module).__name__} is remote code. Load the checkpoint with transformers' own class "
                    f"(trust_remote_code=False; for many there is a converted '-hf' repository)."
                )
            return module, _REGISTRY[model_type]() if known else CausalLM()
    raise Unsupported(
        f"{type(model).__name__} is no vision-language model that vtok knows. Supported families: {_families()}. "
        f"Pass the ...ForConditionalGeneration model (or a ...ForCausalLM, for methods of the cache)."
    )
