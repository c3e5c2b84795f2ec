"""Methods as a user writes them, `visionzip:importance=received`: read, told what a model needs, tried, explained.

A list is separated by commas, and so are the options of one method: `fastv:layer=2,keep=0.5,divprune` are two. A value
is read by the type of the option: numbers, true and false, none, `[1, 2]` for lists, and words.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vtok import adapter as adapters
from vtok.compressor import Compressor, build, load_all
from vtok.errors import InvalidValue, UnknownName, VtokError, meant
from vtok.patching import available, patch


def split(text: str) -> list[str]:
    """The methods of a list, each with its options behind it. Raises `InvalidValue` and `UnknownName` for those that
    cannot be: a name, an option or a value that there is not."""
    pieces = [piece.strip() for piece in re.split(r",(?![^\[]*\])", text) if piece.strip()]
    found: list[str] = []
    for piece in pieces:
        if "=" in piece and ":" not in piece.partition("=")[0]:
            if not found:
                raise InvalidValue(f"{piece!r} is an option without a method: NAME:{piece}.")
            found[-1] += f"{',' if ':' in found[-1] else ':'}{piece}"
        else:
            found.append(piece)
    for method in found:
        read(method)
    return found


def read(method: str) -> tuple[str, dict[str, Any]]:
    """Name and options of one method. Raises as `split` does."""
    name, _, rest = method.partition(":")
    known = load_all()
    if name not in known:
        raise UnknownName(f"No compressor is named {name!r}. There are: {', '.join(known)}.{meant(name, known)}")
    options = {}
    for piece in re.split(r",(?![^\[]*\])", rest) if rest else ():
        option, equals, value = (part.strip() for part in piece.partition("="))
        if not equals:
            raise InvalidValue(f"{method!r}: an option is NAME=VALUE, not {piece!r}.")
        options[option] = typed(name, option, value)
    if options:
        build(name, **options)  # says what is wrong with them, one by one or together
    return name, options


def typed(name: str, option: str, value: str) -> Any:
    """A value of a compressor's option, read by the option's type. Raises `InvalidValue`, which lists what there is."""
    cls = load_all()[name]
    own = [field.name for field in fields(cls) if field.init]
    if option not in own:
        raise InvalidValue(f"{name} has no option {option!r}. It has: {', '.join(own)}.{meant(option, own)}")
    hint = get_type_hints(cls)[option]
    words = [str(word) for part in _parts_of(hint) if get_origin(part) is Literal for word in get_args(part)]
    for kind in _kinds(hint):
        with suppress(ValueError):
            read_as = _as(kind, value)
            if not (words and kind is str and value not in words):
                return read_as
    accepted = [_WORDS[kind] for kind in _kinds(hint) if not (words and kind is str)] + words
    raise InvalidValue(f"{name}: {option} is {' or '.join(accepted)}, not {value!r}.{meant(value, words)}")


_WORDS = {  # the types that a text can be read as, the narrowest first
    type(None): "none",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a list such as [1, 2]",
    str: "a word",
}


def _parts_of(hint: Any) -> list[Any]:
    """The members of a union, of unions in it too, or what is none."""
    if get_origin(hint) in (Union, types.UnionType):
        return [part for member in get_args(hint) for part in _parts_of(member)]
    return [hint]


def _kinds(hint: Any) -> list[type]:
    """Those of `_WORDS` that an annotation allows."""
    flat = set()
    for part in _parts_of(hint):
        kind = get_origin(part) or part
        flat |= {type(word) for word in get_args(part)} if kind is Literal else {kind}
        if isinstance(kind, type) and issubclass(kind, Sequence) and kind is not str:
            flat.add(tuple)
    return [kind for kind in _WORDS if kind in flat]


def _as(kind: type, value: str) -> Any:
    if kind is type(None):
        if value.lower() != "none":
            raise ValueError
        return None
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError
        return value.lower() == "true"
    if kind is tuple:
        held = json.loads(value)
        if not isinstance(held, list):
            raise ValueError
        return tuple(held)
    return kind(value)


def number(text: str) -> float | int:
    """A keep: a count where it is written as one, else a fraction. Raises `InvalidValue`."""
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise InvalidValue(f"keep is a fraction such as 0.25 or a count such as 64, not {text!r}.") from None


# ---- on a model ------------------------------------------------------------------------------------------------------
def call(
    model: Any, method: str, keep: float | int | None = None, budget: float | None = None
) -> tuple[str, dict[str, Any]]:
    """What to call `vtok.patch` with, a name and options: those that the method was given, those without which this
    model cannot run it (as importance="received" where the encoder has no CLS), and `keep` where it has one."""
    name, given = read(method)
    cls = load_all()[name]
    vlm, adapter = adapters.find(model)
    lacking = sorted((cls.needs - adapter.available(vlm.config)) & cls.optional.keys())
    options = {key: value for need in lacking for key, value in cls.optional[need].items()}
    if keep is not None and has_keep(method):
        options["keep"] = keep
    if budget is not None:
        options["budget"] = budget
    return name, options | given


def has_keep(method: str) -> bool:
    return "keep" in {field.name for field in fields(load_all()[read(method)[0]]) if field.init}


def refusal(model: Any, method: str, **how: Any) -> str | None:
    """Why the model cannot be patched with a method at this `keep` or `budget`, or None where it can."""
    try:
        name, options = call(model, method, **how)
        patch(model, name, **options).remove()
    except VtokError as error:
        return str(error)
    return None


def supported(model: Any, wanted: Sequence[str] | None = None, **how: Any) -> list[str]:
    """Those of the methods that this very model can be patched with; of all that need no training if left out."""
    if wanted is None:
        wanted = [name for name, cls in load_all().items() if not cls.trained]
    return [method for method in wanted if refusal(model, method, **how) is None]


# ---- explained -------------------------------------------------------------------------------------------------------
def fit(about: dict[str, Any], family: str) -> str:
    """Whether a method goes with a family: "yes", "option" (its hint says which), or "no" and what is missing. about:
    of `vtok.available()`."""
    missing = about["lacking"].get(family)
    if not missing:
        return "yes"
    needed = [need for need in missing if need not in about["optional"]]
    return f"no {', '.join(needed)}" if needed else "option"


def exceptions(facts: dict[str, Any]) -> list[tuple[str, str, list[str], str]]:
    """What does not go together, or only with an option: (method, "no" or "option", families, reason or option). facts:
    of `vtok.available()`."""
    found = []
    for method, about in facts["compressors"].items():
        by: dict[str, list[str]] = {}
        for family in facts["adapters"]:
            by.setdefault(fit(about, family), []).append(family)
        for fits, families in by.items():
            kind, _, missing = fits.partition(" ")
            if kind != "yes":
                hints = (about["hints"][need] for need in about["optional"])
                found.append((method, kind, families, f"needs {missing}" if missing else " ".join(hints)))
    return found


def explain(name: str) -> dict[str, Any]:
    """What there is to know of one method: summary and remarks (paragraphs of its docstring), options as {name:
    (default, meaning)}, and what `vtok.available()` says. Raises `UnknownName`."""
    read(name)
    cls = load_all()[name]
    facts = available()
    about = facts["compressors"][name]
    summary, options, remarks = _told(cls)
    families = {family: fit(about, family) for family in facts["adapters"]}
    return about | {"summary": summary, "options": options, "remarks": remarks, "fits": families}


def _parts(cls: type[Compressor]) -> list[type[Compressor]]:
    return [cls] if cls.trained else [type(part) for part in cls().parts()]


def _told(cls: type[Compressor]) -> tuple[str, dict[str, tuple[Any, str]], str]:
    """A docstring as summary, options and remarks. Its options are written as `name, other: meaning`, at the beginning
    of a line or behind a full stop, and go on in indented lines."""
    own = {field.name: field for field in fields(cls) if field.init}
    names = "|".join(sorted(map(re.escape, own), key=len, reverse=True))
    begins = re.compile(rf"(?:^|(?<=\. ))((?:{names})(?:, (?:{names}))*): ")
    meanings: dict[str, str] = {}
    prose: list[str] = []
    current: tuple[str, ...] = ()
    for line in inspect.cleandoc(cls.__doc__ or "").split("\n"):
        if current and not line.startswith("    "):
            current = ()
        parts = begins.split(line.strip())
        if parts[0] or not line.strip():
            if current:
                for name in current:
                    meanings[name] += f" {parts[0].strip()}"
            else:
                prose.append(parts[0])
        for listed, text in zip(parts[1::2], parts[2::2]):
            current = tuple(listed.split(", "))
            meanings |= dict.fromkeys(current, text.strip())
    if own.keys() - meanings and len(parts := _parts(cls)) > 1:  # of several stages: its parts know
        for part in parts:
            meanings = {name: text for name, (_, text) in _told(part)[1].items() if text} | meanings
    meanings.setdefault("keep", "how much stays, as the paper means it: a fraction in (0, 1], or a count a picture.")
    default = lambda field: field.default if field.default is not MISSING else "required"
    options = {name: (default(field), meanings.get(name, "")) for name, field in own.items()}
    summary, _, rest = "\n".join(prose).strip().partition("\n\n")
    return summary.replace("\n", " "), options, " ".join(rest.split())
