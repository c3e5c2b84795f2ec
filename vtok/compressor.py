"""The base class of compressors and their registry. A compressor is one file in `vtok/compressors/`."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vtok.errors import InvalidValue, UnknownName, Unsupported
from vtok.tower import NEEDS as ENCODER_NEEDS
from vtok.tower import Layer
from vtok.types import Activations, Attention, Selection, VisualTokens, check_keep
from vtok.vit import Block

STAGES = ("encoder", "pre_llm", "llm", "decode")
# Where a text-guided compressor reads the text: at the prompt's last token, or at the first text token after the last
# visual one. Never "the last position": in a training forward that is a token of the answer.
ANCHORS = ("prompt_end", "after_visual")
_REGISTRY: dict[str, type[Compressor]] = {}


@dataclass(frozen=True, kw_only=True)
class Compressor:
    """Base of all compressors. Subclasses are frozen dataclasses whose fields are the method's hyper-parameters.

    A subclass sets the class variables below and, by its stage, overrides one method:
    "encoder": `scale()`, or, to act in the blocks of a ViT, `merged_at`, `group` and `merge`; "pre_llm":
    `select(tokens)`; "llm": `schedule(n_layers)` and `score(attention)`; "decode": `sparse_layers(n_layers)` and
    `neurons(activations)`.
    """

    name: ClassVar[str]  # the word for `vtok.patch(model, name)`
    stage: ClassVar[str]
    needs: ClassVar[frozenset[str]] = (
        frozenset()
    )  # of "crops", "question", "attention", "ffn" and those of vtok/tower.py
    paper: ClassVar[str]  # "title, arXiv id", or "baseline"
    adaptive: ClassVar[bool] = False  # True if the count depends on the content, not only on the grid
    text_guided: ClassVar[bool] = False
    optional: ClassVar[dict[str, dict[str, Any]]] = {}  # need -> the parameters that make it go away
    budgeted: ClassVar[dict[str, Any]] = {}  # the parameters without which it has no budget
    hints: ClassVar[dict[str, str]] = {}  # need -> what to tell a user whose model does not provide it
    merges: ClassVar[bool] = False  # True if kept tokens get new features, through which gradient must flow
    masks: ClassVar[bool] = False  # True if `bias()` may give something
    scatters: ClassVar[bool] = False  # True if it leaves single patches of a picture, which lie on no grid
    trained: ClassVar[bool] = False  # True if it has weights of its own, without which it is refused
    slow: ClassVar[bool] = False  # True if its selection may take over 5 % of a dense prefill, see docs/speed.md
    min_tokens: ClassVar[int] = 1  # "decode": a shorter prompt, in tokens that enter the language model, stays dense

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
    def encoder_layers(self) -> dict[str, tuple[Layer, ...]]:
        """For each of its needs that the vision encoder meets, the layers at which: the last, unless overridden."""
        return dict.fromkeys(sorted(self.needs_now & ENCODER_NEEDS), (-1,))

    def scale(self) -> float:
        """The factor by which picture sides shrink before the encoder, in (0, 1]."""
        raise Unsupported(f"{type(self).__name__} does not act in the encoder.")

    def merged_at(self, n_blocks: int, patches: int) -> list[int]:
        """How many of a view's rows each block groups away; for those that need "token_blocks", as the next three.

        Raises `InvalidValue` where there are not the right number of blocks."""
        raise Unsupported(f"{type(self).__name__} does not act in the blocks of the encoder.")

    def group(self, block: Block) -> tuple[Tensor, int] | None:
        """Which rows of a block go on as one: [B, n] the new row of each, and how many new rows there are; or None."""
        raise Unsupported(f"{type(self).__name__} does not act in the blocks of the encoder.")

    def merge(self, x: Tensor, size: Tensor, group: Tensor, n: int) -> Tensor:
        """[B, n, D], the rows that `group()` asked for, of x [B, rows, D], which stand for `size` [B, rows] patches."""
        raise Unsupported(f"{type(self).__name__} does not act in the blocks of the encoder.")

    def bias(self, size: Tensor) -> Tensor | None:
        """[B, n] what is added to the attention logits of rows that stand for `size` [B, n] patches, or None."""
        return None

    def select(self, tokens: VisualTokens) -> Selection:
        """Choose among the tokens of B pictures, before the language model."""
        raise Unsupported(f"{type(self).__name__} does not act before the language model.")

    def schedule(self, n_layers: int) -> dict[int, float | int | None]:
        """Layer index -> what `keep` of the sample's visual tokens remains after that decoder layer; None where the
        score itself decides, and those remain whose score is above 0."""
        raise Unsupported(f"{type(self).__name__} does not act in the language model.")

    def score(self, seen: Attention | Activations) -> Tensor:
        """[B, L] importance of each key at a layer of the schedule; only the entries of visual tokens are used. `seen`
        is what the compressor needs of the layer: "attention" or "ffn"."""
        raise Unsupported(f"{type(self).__name__} does not act in the language model.")

    def sparse_layers(self, n_layers: int) -> range:
        """The decoder layers in which text behind the prompt goes through some neurons of the FFN alone."""
        raise Unsupported(f"{type(self).__name__} does not act in decoding.")

    def neurons(self, activations: Activations) -> Tensor:
        """[B, K] long, ascending: those neurons, for one of these layers."""
        raise Unsupported(f"{type(self).__name__} does not act in decoding.")

    def remaining(self, n: int, keep: float | int, images: int) -> int:
        """How many of a sample's `n` visual tokens, those of `images` pictures, a value of `schedule()` means."""
        return min(n, keep * images if isinstance(keep, int) else math.floor(n * keep + 1e-9))

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
