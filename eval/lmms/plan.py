"""Which compressors a run of lmms-eval asks for, read from `--model_args` or a file.

compressor=globalcom2,keep=0.25                      one, with its options
compressor=aim_merge+aim_prune,keep=0.5,start=0.4    several, one a stage; an option goes to the one that has it
compressor=downsample+fastv,downsample.keep=0.5,fastv.keep=0.5    NAME.option where several have it
compressor=aim,budget=0.25                           the mean share over decoder layers instead of keep
compressor=none                                      the dense model
keep=0.5                                             the family's default compressor, as `vtok.patch` takes it
config=FILE                                          YAML or JSON: a list of mappings such as
                                                     {compressor: fastv, keep: 0.5}, a schedule of `vtok search`, or
                                                     what `Patch.save` wrote
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from vtok import compressor as compressors
from vtok import config as configs
from vtok.compressor import Compressor
from vtok.errors import InvalidValue, UnknownName, meant
from vtok.eval.results.sweep import fingerprint as weights_of
from vtok.patching import Patch, patch

DENSE = "none"


@dataclass(frozen=True)
class Plan:
    """What `vtok.patch` is to be called with.

    methods: compressors, one a stage; () for the dense model, None for the family's default.
    options: `keep` for the default, or `budget`.
    """

    methods: tuple[Compressor, ...] | None
    options: Mapping[str, Any]

    def apply(self, model: Any) -> Patch | None:
        """Patch the model; None where it is to stay dense. Raises as `vtok.patch` does."""
        if self.methods == ():
            return None
        return patch(model, self.methods, **self.options)


def plan(
    compressor: str | None = None,
    keep: float | int | None = None,
    budget: float | None = None,
    config: str | Path | None = None,
    **options: Any,
) -> Plan:
    """The plan that these arguments ask for. Raises `InvalidValue` and `UnknownName`, saying what there is."""
    shared = {name: value for name, value in (("keep", keep), ("budget", budget)) if value is not None}
    if config is not None:
        if given := sorted({**shared, **options} | ({"compressor": compressor} if compressor else {})):
            raise InvalidValue(f"config={config} says it all; leave out {', '.join(given)}.")
        return read(config)
    if compressor is None:
        if options:
            raise InvalidValue(f"There is no argument {', '.join(sorted(options))}, or it needs a compressor=NAME.")
        return Plan(None, shared)
    if compressor == DENSE:
        if given := sorted({**shared, **options}):
            raise InvalidValue(f"compressor=none is the dense model; leave out {', '.join(given)}.")
        return Plan((), {})
    names = compressor.split("+")
    whole = {} if budget is None else {"budget": budget}
    own = options if keep is None else {"keep": keep, **options}
    given = _assign(names, own)
    return Plan(tuple(compressors.build(name, **given[name]) for name in names), whole)


def _assign(names: list[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each compressor: NAME.option, or the bare option where one compressor alone has it."""
    known = compressors.load_all()
    for name in names:
        if name not in known:
            there = ", ".join([DENSE, *known])
            raise UnknownName(f"No compressor is named {name!r}. There are: {there}.{meant(name, known)}")
    has = {name: [f.name for f in fields(known[name]) if f.init] for name in names}
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        owner, dot, option = key.rpartition(".")
        owners = [owner] if dot else [name for name in names if key in has[name]]
        if dot and owner not in given:
            raise InvalidValue(f"{key}: {owner!r} is none of the compressors of this run, {' and '.join(names)}.")
        if len(owners) > 1:
            ways = " or ".join(f"{name}.{key}" for name in owners)
            raise InvalidValue(f"{' and '.join(owners)} have an option {key}: say {ways}.")
        if not owners or option not in has[owners[0]]:
            theirs = "; ".join(f"{name} has {', '.join(has[name])}" for name in names)
            raise InvalidValue(f"There is no argument {key}, nor such an option: {theirs}.")
        given[owners[0]][option] = _value(value)
    return given


def _value(value: Any) -> Any:
    """A value of lmms-eval's argument string: lists as JSON, and none, which it leaves as words."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    if value.lower() == "none":
        return None
    if value.startswith("["):
        try:
            return tuple(json.loads(value))
        except ValueError as error:
            raise InvalidValue(f"{value!r} is no list in JSON: {error}.") from error
    return value


def read(file: str | Path) -> Plan:
    """The plan in a file. Raises `InvalidValue` if it is missing or holds something else."""
    try:
        held = yaml.safe_load(Path(file).read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidValue(f"config={file} cannot be read: {error}.") from error
    if isinstance(held, dict) and "rates" in held:
        return Plan((compressors.build("schedule", file=str(file)),), {})
    if isinstance(held, dict) and "compressors" in held:
        return Plan(tuple(configs.load(held)), {})
    if not isinstance(held, list) or not held or not all(isinstance(e, dict) and "compressor" in e for e in held):
        raise InvalidValue(
            f"config={file} is neither a list of mappings, each with a compressor and its options, nor what "
            "`Patch.save` or `vtok search` wrote."
        )
    built = []
    for entry in held:
        options = {key: _value(value) for key, value in entry.items() if key not in ("compressor", "budget")}
        built.append(compressors.build(entry["compressor"], **options))
    budgets = {entry["budget"] for entry in held if "budget" in entry}
    if budgets and len(held) > 1:
        raise InvalidValue(f"config={file}: a budget can be solved for one compressor; give each its own keep.")
    return Plan(tuple(built), {"budget": budgets.pop()} if budgets else {})


def fingerprint(parts: tuple[Compressor, ...]) -> list[str]:
    """All that these compressors' choices depend on: their options, what is in files that they name, their weights."""
    seen = [repr(part) for part in parts]
    for part in parts:
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, str | Path) and Path(value).is_file():
                seen.append(hashlib.sha256(Path(value).read_bytes()).hexdigest())
            elif isinstance(value, nn.Module):
                seen.append(weights_of(value))
    return seen
