"""Methods as a user writes them, `visionzip:importance=received`: read, told what a model needs, tried, explained.

A list is separated by commas, and so are the options of one method: `fastv:layer=2,keep=0.5,divprune` are two. A plus
sign composes methods of several stages: `aim_merge:keep=0.5+aim_prune`. A value is read by the type of the option
(`vtok.options`): numbers, true and false, none, `[1, 2]` for tuples, and words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING
from math import prod
from typing import Any

from vtok import adapter as adapters
from vtok import config, options
from vtok.compressor import Compressor, build, find, load_all
from vtok.errors import InvalidValue, VtokError
from vtok.patching import patch

COMMA = re.compile(r",(?![^\[]*\])")  # none within a tuple
PLUS = re.compile(r"\+(?=[a-z_]\w*(?:[:+]|$))")  # none within a number or a file's name


def split(text: str) -> list[str]:
    """The methods of a list, each with its options behind it. Raises `InvalidValue` and `UnknownName` for those that
    cannot be: a name, an option or a value that there is not."""
    pieces = [piece.strip() for piece in COMMA.split(text) if piece.strip()]
    found: list[str] = []
    for piece in pieces:
        if "=" in piece and ":" not in piece.partition("=")[0]:
            if not found:
                raise InvalidValue(f"{piece!r} is an option without a method: NAME:{piece}.")
            found[-1] += f"{',' if ':' in PLUS.split(found[-1])[-1] else ':'}{piece}"
        else:
            found.append(piece)
    for method in found:
        each(method)
    return found


def each(method: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of each part of a method, which has several where it is composed. Raises as `split` does."""
    return [read(part) for part in PLUS.split(method)]


def read(method: str) -> tuple[str, dict[str, Any]]:
    """Name and options of one method that is not composed. Raises as `split` does."""
    name, _, rest = method.partition(":")
    cls, values = find(name), {}
    for piece in COMMA.split(rest) if rest else ():
        option, equals, value = (part.strip() for part in piece.partition("="))
        if not equals:
            raise InvalidValue(f"{method!r}: an option is NAME=VALUE, not {piece!r}.")
        declared = options.named(cls, option, name)
        try:
            values[option] = declared.parse(value)
        except InvalidValue as error:
            raise InvalidValue(f"{name}: {error}") from None
    if values:
        build(name, **values)  # says what is wrong with them together
    return name, values


def spelt(compressors: Sequence[Compressor], keep: bool = True) -> str:
    """These compressors, one a stage, as `each` reads them. keep: also how much they keep, whatever it is."""
    parts = []
    for part, told in zip(compressors, config.describe(compressors)["compressors"]):
        values = {key: value for key, value in told.items() if key not in ("name", "keep")}
        if keep and "keep" in options.of(type(part)):
            values["keep"] = part.keep
        parts.append(part.name + "".join(f"{',' if i else ':'}{k}={_text(values[k])}" for i, k in enumerate(values)))
    return "+".join(parts)


def _text(value: Any) -> str:
    """A value as `options.Option.parse` reads it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def number(text: str) -> float | int:
    """A keep: a count where it is written as one, else a fraction. Raises `InvalidValue`."""
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise InvalidValue(f"keep is a fraction such as 0.25 or a count such as 64, not {text!r}.") from None


# ---- on a model ------------------------------------------------------------------------------------------------------
def call(
    model: Any, method: str, keep: float | int | None = None, budget: float | None = None
) -> tuple[str | list[Compressor], dict[str, Any]]:
    """What to call `vtok.patch` with, a name and options, or compressors where the method is composed: the options that
    the method was given, those without which this model cannot run it (as importance="received" where the encoder has
    no CLS), or without which it has no `budget`, and `keep` where it has one.

    In a composition the budget is met by the one part that was given no `keep`: it gets what the others leave of it.
    Raises `InvalidValue` where they leave more than all, or there is no such part."""
    vlm, adapter = adapters.find(model)
    has = adapter.available(vlm.config)
    told = []
    for name, given in each(method):
        cls = find(name)
        values = {} if budget is None else dict(cls.budgeted)
        for need in sorted((cls.needs - has) & cls.optional.keys()):
            values |= cls.optional[need]
        if keep is not None and has_keep(name):
            values["keep"] = keep
        told.append((name, values | given))
    whole = {} if budget is None else {"budget": budget}
    if len(told) == 1:
        return told[0][0], whole | told[0][1]
    built = [build(name, **values) for name, values in told]
    # of visual tokens: a share of the cache is none of theirs
    given = [part.of_pictures and isinstance(values.get("keep"), float) for part, (_, values) in zip(built, told)]
    if budget is None or not any(given):
        return built, whole
    return _shared(method, built, given, budget, len(adapter.layers(adapter.core(vlm)))), {}


def _shared(
    method: str, built: Sequence[Compressor], given: Sequence[bool], budget: float, layers: int
) -> list[Compressor]:
    """The compressors with that one told what to keep to which none was `given`, so that all keep the budget."""
    free = [i for i, (part, told) in enumerate(zip(built, given)) if part.of_pictures and not told]
    if len(free) != 1:
        raise InvalidValue(f"A budget is for one part of {method}: give each but one its own keep.")
    left = budget / prod(part.keep for part, told in zip(built, given) if told)
    if left > 1 + 1e-9:
        raise InvalidValue(f"{method} cannot keep {budget:g}: its other parts leave {budget / left:g}.")
    return [part.with_budget(min(left, 1.0), layers) if i in free else part for i, part in enumerate(built)]


def has_keep(method: str) -> bool:
    return any("keep" in options.of(find(name)) for name, _ in each(method))


def facts(method: str, known: dict[str, Any]) -> dict[str, Any]:
    """ "stage" and "slow" of a method, of all its parts. known: compressors of `vtok.available()`."""
    parts = [known[name] for name, _ in each(method)]
    return {"stage": "+".join(part["stage"] for part in parts), "slow": any(part["slow"] for part in parts)}


def refusal(model: Any, method: str, **how: Any) -> str | None:
    """Why the model cannot be patched with a method at this `keep` or `budget`, or None where it can."""
    try:
        what, told = call(model, method, **how)
        patch(model, what, **told).remove()
    except VtokError as error:
        return str(error)
    return None


def supported(model: Any, wanted: Sequence[str] | None = None, **how: Any) -> list[str]:
    """Those of the methods that this very model can be patched with. If left out: of all that need no training and drop
    visual tokens, or columns of the cache where the model sees no pictures."""
    if wanted is None:
        pictures = bool(adapters.find(model)[1].encoders)
        wanted = [name for name, cls in load_all().items() if not cls.trained and cls.of_pictures == pictures]
    return [method for method in wanted if refusal(model, method, **how) is None]


# ---- what there is -------------------------------------------------------------------------------------------------
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
                "of_pictures": cls.of_pictures,
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
            for name, cls in load_all().items()
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
    cls, found = find(name), available()
    about = found["compressors"][name]
    summary, _, rest = options.told(cls, options.of(cls))[0].partition("\n\n")
    prose = {"summary": summary.replace("\n", " "), "remarks": " ".join(rest.split())}
    families = {family: fit(about, family) for family in found["adapters"]}
    return about | prose | {"options": _meanings(cls), "fits": families}


def _meanings(cls: type[Compressor]) -> dict[str, tuple[Any, str]]:
    """Name -> default and meaning of each option. What a class of several stages does not tell, its parts know."""
    own = options.of(cls)
    meanings = {name: option.text for name, option in own.items()}
    if not cls.trained and not all(meanings.values()):
        for part in cls().parts():
            for name, option in options.of(type(part)).items():
                meanings[name] = meanings.get(name) or option.text
    if not meanings.get("keep"):
        meanings["keep"] = "how much stays, as the paper means it: a fraction in (0, 1], or a count a picture."
    default = lambda option: "required" if option.default is MISSING else option.default
    return {name: (default(option), meanings[name]) for name, option in own.items()}
