"""The base class of compressors and their registry. A compressor is one file in `vtok/compressors/`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

from vtok.errors import InvalidValue, UnknownName
from vtok.tower import NEEDS as ENCODER_NEEDS
from vtok.tower import Layer
from vtok.types import check_keep

_REGISTRY: dict[str, type[Compressor]] = {}


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """What all compressors share. Subclasses are frozen dataclasses whose fields are the method's hyper-parameters.

    A method derives from the base class of its stage (`vtok/stages/`: `Pixels`, `Blocks`, `PreLLM`, `InLLM`, `Decode`),
    which says what it sees and what it answers, and sets the class variables below. One that is a composition of
    others (`parts`) derives from this class.
    """

    name: ClassVar[str]  # the word for `vtok.patch(model, name)`
    stage: ClassVar[str]
    # of "crops", "question", "attention", "ffn", "token_blocks" and those of vtok/tower.py
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str]  # "title, arXiv id", or "baseline"
    adaptive: ClassVar[bool] = False  # True if the count depends on the content, not only on the grid
    text_guided: ClassVar[bool] = False
    optional: ClassVar[dict[str, dict[str, Any]]] = {}  # need -> the parameters that make it go away
    hints: ClassVar[dict[str, str]] = {}  # need -> what to tell a user whose model does not provide it
    trained: ClassVar[bool] = False  # True if it has weights of its own, without which it is refused
    slow: ClassVar[bool] = False  # True if its selection may take over 5 % of a dense prefill, see docs/speed.md

    movable: ClassVar[bool] = False  # True if it can read the text at another place than the prompt's end (`anchor`)
    several_turns: ClassVar[bool] = True  # False if answers in one row, each to pictures of its own, would disturb it

    keep: float | int = 0.25

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        check_keep(self.keep)

    @property
    def is_identity(self) -> bool:
        """Whether nothing can be dropped, so that the model runs untouched."""
        return isinstance(self.keep, float) and self.keep == 1.0

    @property
    def needs_now(self) -> frozenset[str]:
        """What this instance needs; a subset of `needs` where a parameter makes a need go away."""
        return self.needs

    @property
    def reads_prompt_end(self) -> bool:
        """Whether what it keeps depends on where the prompt ends."""
        return False

    @property
    def encoder_layers(self) -> dict[str, tuple[Layer, ...]]:
        """For each of its needs that the vision encoder meets, the layers at which: the last, unless overridden."""
        return dict.fromkeys(sorted(self.needs_now & ENCODER_NEEDS), (-1,))

    def with_budget(self, budget: float, n_layers: int) -> Compressor:
        """The same compressor with its knobs set so that `trace.mean_keep` is at most `budget`, in (0, 1]."""
        return dataclasses.replace(self, keep=float(budget))

    def parts(self) -> tuple[Compressor, ...]:
        """The single-stage compressors this one is made of (itself, unless it is a named composition)."""
        return (self,)


def load_all() -> dict[str, type[Compressor]]:
    """Import every file of `vtok/compressors/` and return name -> class."""
    import vtok.compressors

    for module in pkgutil.iter_modules(vtok.compressors.__path__):
        importlib.import_module(f"vtok.compressors.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def build(name: str, **options: Any) -> Compressor:
    """Make a compressor from its name and options."""
    registry = load_all()
    if name not in registry:
        raise UnknownName(f"No compressor is named {name!r}. There are: {', '.join(registry)}.")
    cls = registry[name]
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    if unknown := sorted(set(options) - fields):
        raise InvalidValue(f"{name} has no option {', '.join(unknown)}. It has: {', '.join(sorted(fields))}.")
    return cls(**options)
