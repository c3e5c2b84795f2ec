"""The options of a method: what each accepts is declared once, in the type of its field.

    keep: Keep = 0.25
    norm: Literal["l2", "l1"] = "l2"
    layer: Annotated[int, In(">= 1")] = 2

A type checker reads these types as they are. `check` holds values against them, with one wording of errors; `of` lists
the options of a class for people; `parse` reads a value from a command line.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vtok.errors import InvalidValue, meant


@dataclass(frozen=True)
class In:
    """Which numbers a type accepts: "(0, 1]", above 0 and at most 1, or ">= 1". NaN and infinity are never among them.

    ints: whether an int will do where a float is declared. Not where an int means something else, such as a count.
    """

    range: str
    ints: bool = True

    def __contains__(self, value: float) -> bool:
        if self.range.startswith(">"):
            sign, low = self.range.split()
            return value > float(low) or (sign == ">=" and value == float(low))
        low, high = map(float, self.range[1:-1].split(","))
        ends = {low: self.range[0] == "[", high: self.range[-1] == "]"}
        return ends.get(value, low < value < high)

    def __str__(self) -> str:
        return self.range if self.range.startswith(">") else f"in {self.range}"


# A str beside a type says what its values mean.
Fraction = Annotated[float, In("(0, 1]", ints=False), "a fraction"]
Count = Annotated[int, In(">= 1"), "a count"]
Keep = Fraction | Count
Share = Annotated[float, In("(0, 1]")]
Part = Annotated[float, In("[0, 1]")]
Positive = Annotated[float, In("> 0")]
AtLeast0 = Annotated[int, In(">= 0")]
AtLeast1 = Annotated[int, In(">= 1")]
DepthFraction = Annotated[float, In("(0, 1)", ints=False), "a fraction of the depth"]
Depth = Annotated[float, In("[0, 1]", ints=False), "a fraction of the depth"] | Annotated[int, In(">= 0"), "a layer"]
EncoderLayer = (
    Annotated[float, In("[0, 1]", ints=False), "a fraction of the depth"]
    | Annotated[int, "an encoder layer, from the end if negative"]
    | Annotated[None, "the layer that the projector reads"]
)


@dataclass(frozen=True)
class Kind:
    """One of the kinds of value that an option accepts."""

    type: Any
    within: In | None = None
    words: tuple[str, ...] = ()  # of a Literal
    means: str = ""
    item: Kind | None = None  # of a tuple, as long as one likes

    def accepts(self, value: Any) -> bool:
        if self.words:
            return isinstance(value, str) and value in self.words
        if self.type is float:
            ints = self.within is None or self.within.ints
            number = isinstance(value, float | int if ints else float) and not isinstance(value, bool)
            return number and math.isfinite(value) and (self.within is None or value in self.within)
        if self.type is int:
            return isinstance(value, int) and not isinstance(value, bool) and (not self.within or value in self.within)
        if self.item is not None:
            return isinstance(value, tuple) and all(map(self.item.accepts, value))
        return isinstance(value, self.type)

    def read(self, text: str) -> Any:
        """The value that `text` stands for. Raises `ValueError` where it stands for none."""
        if self.type is type(None):
            value: Any = None if text.lower() == "none" else text
        elif self.type is bool:
            value = {"true": True, "false": False}.get(text.lower())
        elif self.item is not None:
            if not (text.startswith("[") and text.endswith("]")):
                raise ValueError(text)
            value = tuple(self.item.read(part.strip()) for part in text[1:-1].split(",") if part.strip())
        else:
            value = self.type(text) if self.type in (int, float) else text
        if not self.accepts(value):
            raise ValueError(text)
        return value

    def __str__(self) -> str:
        if self.words:
            return "one of " + ", ".join(map(repr, self.words))
        if self.item is not None:
            return f"a tuple of {self.means}" if self.means else f"a tuple (each {self.item})"
        strict = self.within is not None and not self.within.ints
        names = {int: "an int", float: "a float" if strict else "a number", bool: "True or False", type(None): "None"}
        name = names.get(self.type) or f"a {self.type.__name__}"
        return name + (f" {self.within}" if self.within else "") + (f" ({self.means})" if self.means else "")


@functools.cache
def kinds(declared: Any) -> tuple[Kind, ...]:
    """What a type accepts. Classes that are not known here accept their instances."""
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin in (typing.Union, types.UnionType):
        return tuple(kind for argument in arguments for kind in kinds(argument))
    if origin is Annotated:
        inner, *notes = arguments
        said = {"within" if isinstance(note, In) else "means": note for note in notes}
        return tuple(dataclasses.replace(kind, **said) for kind in kinds(inner))
    if origin is Literal:
        return (Kind(str, words=arguments),)
    if origin is tuple:
        return (Kind(tuple, item=kinds(arguments[0])[0]),)
    return (Kind({None: type(None), Any: object}.get(declared, origin or declared)),)


def accepted(declared: Any) -> str:
    """In words: "an int >= 1 or None"."""
    *some, last = dict.fromkeys(map(str, kinds(declared)))
    return f"{', '.join(some)} or {last}" if some else last


def check(declared: Any, value: Any, name: str) -> None:
    """Raise `InvalidValue` unless a value is what a type accepts."""
    if not any(kind.accepts(value) for kind in kinds(declared)):
        raise InvalidValue(f"{name} must be {accepted(declared)}, got {value!r}")


@dataclass(frozen=True)
class Option:
    """An option of a class, for people.

    type: as declared. default: `dataclasses.MISSING` where there is none. text: what docstrings say, of the class or of
    one that it derives from.
    """

    name: str
    type: Any
    default: Any
    text: str

    @property
    def accepted(self) -> str:
        return accepted(self.type)

    def parse(self, text: str) -> Any:
        """The value that a string stands for: a number, a word, "true", "none", a tuple as "[1, 0.5, 0.5]". An int is
        read as one where the option takes ints: keep=1 is one token, keep=1.0 all.

        Raises `InvalidValue` where the option does not accept it."""
        first = sorted(kinds(self.type), key=lambda kind: (kind.type is str and not kind.words, kind.type is float))
        for kind in first:
            try:
                return kind.read(text.strip())
            except ValueError:
                continue
        near = meant(text, [word for kind in first for word in kind.words])
        raise InvalidValue(f"{self.name} must be {self.accepted}, got {text!r}{near and f'.{near}'}")


@functools.cache
def of(cls: type) -> dict[str, Option]:
    """Name -> option of a dataclass, in the order of its fields."""
    declared = typing.get_type_hints(cls, include_extras=True)
    own = {field.name: field.default for field in dataclasses.fields(cls) if field.init}
    said: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        said |= told(base, own)[1]
    return {name: Option(name, declared[name], default, said.get(name, "")) for name, default in own.items()}


def check_all(item: Any) -> None:
    """Raise `InvalidValue` unless all options of a dataclass's instance are what their types accept."""
    for name, option in of(type(item)).items():
        check(option.type, getattr(item, name), name)


def named(cls: type, name: str, owner: str) -> Option:
    """An option by its name. Raises `InvalidValue`, with the nearest name, where there is none."""
    known = of(cls)
    if name not in known:
        there = ", ".join(sorted(known))
        raise InvalidValue(f"{owner} has no option {name}.{meant(name, known)} It has: {there}.")
    return known[name]


def told(cls: type, names: Collection[str]) -> tuple[str, dict[str, str]]:
    """The docstring of a class without what it says of options, and name -> that. An option is told of as `name, other:
    meaning`, at the beginning of a line or behind a full stop; that goes on in indented lines."""
    known = "|".join(sorted(names, key=len, reverse=True))
    begins = re.compile(rf"(?:^|(?<=\. ))((?:{known})(?:, (?:{known}))*): ")
    prose: list[str] = []
    meanings: dict[str, str] = {}
    current: list[str] = []
    for line in inspect.cleandoc(cls.__dict__.get("__doc__") or "").split("\n"):
        if not line.startswith("    "):
            current = []
        text, *rest = begins.split(line.strip())
        if not current and (text or not rest):
            prose.append(text)
        for name in current:
            meanings[name] = f"{meanings[name]} {text}".strip()
        for listed, meaning in zip(rest[::2], rest[1::2]):
            current = listed.split(", ")
            meanings |= dict.fromkeys(current, meaning.strip())
    return "\n".join(prose).strip(), meanings
