"""The base class of compressors and their registry. A compressor is one file in `vtok/compressors/`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from vtok import options as declared
from vtok.errors import UnknownName, meant
from vtok.options import Keep
from vtok.registry import register
from vtok.tower import NEEDS as ENCODER_NEEDS
from vtok.tower import Layer

_REGISTRY: dict[str, type[Compressor]] = {}


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """What all compressors share. Subclasses are frozen dataclasses whose fields are the method's hyper-parameters;
    what each accepts is declared in its type, see `vtok.options`, and what it does is a sentence of the docstring.

    A method derives from the base class of its stage (`vtok/stages/`: `Pixels`, `Patches`, `Blocks`, `PreLLM`,
    `InLLM`, `Decode`), which says what it sees and what it answers, and sets the class variables below. One that is a
    composition of others (`parts`) derives from this class.
    """

    name: ClassVar[str]  # the word for `vtok.patch(model, name)`
    stage: ClassVar[str]
    # of "crops", "frames", "question", "question_embeds", "attention", "ffn", "token_blocks", "patch_list" and those of
    # vtok/tower.py
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str]  # "title, arXiv id", or "baseline"
    # True if how many tokens stay depends on their content, not only on the grid; see `adaptive_now`
    adaptive: ClassVar[bool] = False
    text_guided: ClassVar[bool] = False
    optional: ClassVar[dict[str, dict[str, Any]]] = {}  # need -> the parameters that make it go away
    budgeted: ClassVar[dict[str, Any]] = {}  # the parameters without which it has no budget
    hints: ClassVar[dict[str, str]] = {}  # need -> what to tell a user whose model does not provide it
    trained: ClassVar[bool] = False  # True if it has weights of its own, without which it is refused
    # options of a few instances that tests of the whole contract run on, in models with four decoder layers
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    slow: ClassVar[bool] = False  # True if its selection may take over 5 % of a dense prefill, see docs/speed.md
    movable: ClassVar[bool] = False  # True if it can read the text at another place than the prompt's end (`anchor`)
    by_grid: ClassVar[bool] = False  # True if what it keeps follows from the grid, and no rounding can change it
    of_pictures: ClassVar[bool] = (
        True  # False if what it drops is not visual tokens: text, too, or columns of the cache
    )
    several_turns: ClassVar[bool] = True  # False if answers in one row, each to pictures of its own, would disturb it

    keep: Keep = 0.25

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            register(_REGISTRY, cls.name, cls)

    def __post_init__(self) -> None:
        declared.check_all(self)

    @classmethod
    def small_weights(cls, model: nn.Module) -> dict[str, Any]:
        """Of a trained method: the options that give it small random weights which fit the model, for tests."""
        return {}

    @property
    def is_identity(self) -> bool:
        """Whether nothing can be dropped, so that the model runs untouched."""
        return isinstance(self.keep, float) and self.keep == 1.0

    @property
    def needs_now(self) -> frozenset[str]:
        """What this instance needs; a subset of `needs` where a parameter makes a need go away."""
        return self.needs

    @property
    def adaptive_now(self) -> bool:
        """Whether this instance's count depends on the content; where it does not, `count` tells it."""
        return self.adaptive and not self.is_identity

    @property
    def reads_prompt_end(self) -> bool:
        """Whether what it keeps depends on where the prompt ends."""
        return False

    @property
    def replays(self) -> bool:
        """Whether a record of what was kept (`vtok.engine.replay`) is all that it needs to do the same again. What is
        recorded are visual tokens."""
        return self.of_pictures

    @property
    def encoder_layers(self) -> dict[str, tuple[Layer, ...]]:
        """For each of its needs that the vision encoder meets, the layers at which: the last, unless overridden."""
        return dict.fromkeys(sorted(self.needs_now & ENCODER_NEEDS), (-1,))

    def with_budget(self, budget: float, n_layers: int) -> Compressor:
        """The same compressor with its knobs set so that `trace.mean_keep` is at most `budget`, in (0, 1]; where it
        is not `of_pictures`, in models without pictures, `trace.mean_attended`."""
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


def find(name: str) -> type[Compressor]:
    """The class of that name. Raises `UnknownName`, with the nearest one and all there are."""
    registry = load_all()
    if name not in registry:
        near = meant(name, registry)
        raise UnknownName(f"No compressor is named {name!r}.{near} There are: {', '.join(registry)}.")
    return registry[name]


def build(name: str, **options: Any) -> Compressor:
    """Make a compressor from its name and options."""
    cls = find(name)
    for option in options:
        declared.named(cls, option, name)
    return cls(**options)
