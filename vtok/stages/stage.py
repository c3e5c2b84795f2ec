"""What a stage is: one place in the model where tokens can go, and what happens there in a patched model.

A stage is one file in `vtok/stages/` and its name in `vtok.stages.ORDER`. The file holds the base class of its
compressors (what they see, what they answer) and a `Stage` that calls them. The engine knows no stage by name: it asks
each active one, in order, at every seam. State of a forward is in the `Pass` (`p.state`), state of a sequence in its
cache (`cache.states`), none in the stage, so that threads do not meet.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from vtok.compressor import Compressor

if TYPE_CHECKING:
    from vtok.adapter import Adapter
    from vtok.engine.decoder import Pass, Reads, Seen
    from vtok.engine.encode import EncoderCall
    from vtok.engine.ffn import Visit
    from vtok.engine.forward import Engine
    from vtok.engine.prefill import Prefill
    from vtok.engine.trace import Part

C = TypeVar("C", bound=Compressor)
_REGISTRY: dict[str, type[Stage]] = {}


@dataclass(frozen=True)
class Site:
    """Where a stage is about to act. Nobody keeps it: a patch must not hold the model.

    config: of the whole model. core: joins vision and text. layers: of the decoder. parts: the compressors that act.
    """

    adapter: Adapter
    config: Any
    core: nn.Module
    layers: nn.ModuleList
    parts: tuple[Compressor, ...]


class Stage(Generic[C]):
    """A compressor at work at its place in one patched model. Holds no module."""

    name: ClassVar[str]
    in_layers: ClassVar[bool] = False  # whether it acts between decoder layers, or in them
    behind_prompt: ClassVar[bool] = False  # whether it acts on what comes behind the prompt, in one forward with it
    on_text: ClassVar[bool] = False  # whether it acts on prompts without pictures, too
    compiles: ClassVar[bool] = True  # whether what it does in layers can be part of a compiled graph
    in_encoder: ClassVar[bool] = False  # whether its `encoder_hooks` do what it decides
    alone: ClassVar[bool] = False  # whether one thread at a time may encode where it acts

    def __init__(self, compressor: C, site: Site) -> None:
        """Raises a `VtokError` where the compressor cannot act there."""
        self.compressor = compressor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _REGISTRY[cls.name] = cls

    # ---- what it needs, known when a model is patched -------------------------------------------------------------
    @property
    def drops(self) -> bool:
        """Whether something can be missing behind it: tokens of the prompt, columns, neurons."""
        return True

    @property
    def observes(self) -> bool:
        """Whether it looks into the attention of decoder layers."""
        return "attention" in self.compressor.needs_now

    def ffn_layers(self) -> Iterable[int]:
        """The decoder layers into whose FFN it looks."""
        return ()

    def encoder_hooks(self, site: Site) -> Iterable[tuple[Callable, Callable, dict[str, Any]]]:
        """(register, hook, options of it) for what it needs in the vision encoder beside its reads."""
        return ()

    # ---- a forward, in order -----------------------------------------------------------------------------------------
    def encode(self, call: EncoderCall, run: Callable[[], Any]) -> Any:
        """The encoder's output: `run()`, or what it becomes here."""
        return run()

    def select(self, prefill: Prefill) -> None:
        """Tokens that enter the language model are chosen; no waiting for the device."""

    def count(self, prefill: Prefill, keep: Tensor, droppable: Tensor) -> None:
        """What enters the language model is known, keep [B, S] bool, and what of it may be dropped later. Asks for the
        numbers that the stage wants to know on the host (`prefill.ask`)."""

    def begin(self, prefill: Prefill, p: Pass) -> None:
        """These numbers are told (`prefill.told`); the language model is about to run."""

    def resume(self, p: Pass, positions: Tensor) -> Tensor:
        """A forward of text on a cache that holds a prompt begins. Returns the positions of its tokens."""
        return positions

    def before_layer(self, p: Pass, layer: int, hidden: Tensor) -> Tensor:
        """What is present at a decoder layer may be narrowed (`p.narrow`). Returns what of `hidden` [B, L, D], all that
        the layer before gave, stands for more than itself then, and the rest as it is."""
        return hidden

    def entering(self, p: Pass, layer: int, hidden: Tensor) -> None:
        """`hidden` [B, L, D] enters a decoder layer."""

    def watches(self, p: Pass, layer: int) -> bool:
        """Whether the next two are to be called in this layer."""
        return False

    def attention(self, p: Pass, layer: int, seen: Seen) -> list[Reads] | None:
        """Looks into a layer's attention. May answer with what it is to read instead: for all queries, or for some
        after the other."""

    def attended(self, p: Pass, layer: int) -> None:
        """A layer's attention is done: what its cache holds may be cut (`p.cache.keep`)."""

    def finished(self, engine: Engine, module: nn.Module, p: Pass) -> None:
        """The language model `module` has run, and its cache may still be added to (`engine.run_on`)."""

    def feed_forward(self, p: Pass, visit: Visit) -> None:
        """Looks into a layer's FFN, in the layers of `ffn_layers`."""

    def part(self, prefill: Prefill) -> Part | None:
        """What it adds to the trace."""


def of(compressor: Compressor, site: Site) -> Stage:
    """The stage of a compressor, on a model. Raises a `VtokError` where it cannot act there."""
    return find(compressor.stage)(compressor, site)


def find(name: str) -> type[Stage]:
    """The stage of that name."""
    return _REGISTRY[name]


def load_all() -> tuple[str, ...]:
    """Import every stage, and return their names in order."""
    import vtok.stages

    for name in vtok.stages.ORDER:
        importlib.import_module(f"vtok.stages.{name}")
    return vtok.stages.ORDER
