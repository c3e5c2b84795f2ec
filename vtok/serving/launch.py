"""`vtok serve`: settings are checked before the engine loads, and then vLLM's own server runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from vtok.errors import InvalidValue, MissingExtra, PatchStateError
from vtok.serving.settings import KEY, Settings

GROUP = "vllm.general_plugins"
OVERRIDES = "--hf-overrides"


def check(model: str, setting: dict[str, Any]) -> None:
    """Whether this model can be served so. Loads its config alone. Raises `Unsupported`, `InvalidValue`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidValue(f"The config of {model!r} cannot be read: {reason}") from error
    setattr(config, KEY, setting)
    if (settings := Settings.of(config)) is not None:
        settings.check(config)


def check_installed() -> None:
    """Whether vLLM will run our hook, in this process and in those that it starts: where its list of plug-ins filters
    ours it would serve the dense model, and say nothing. Raises `MissingExtra`, `PatchStateError`."""
    try:
        from vllm import ModelRegistry, envs
        from vllm.plugins import load_general_plugins
    except ImportError as error:
        raise MissingExtra(
            f'vLLM cannot be imported ({error}): pip install "vtok[vllm]", apart from all else.'
        ) from error
    ours = [point.name for point in entry_points(group=GROUP) if point.value.startswith("vtok.serving:")]
    if not ours:
        raise PatchStateError("vLLM does not know of vtok: it has to be installed, not only on the path.")
    if envs.VLLM_PLUGINS is not None and ours[0] not in envs.VLLM_PLUGINS:
        raise PatchStateError(
            f"VLLM_PLUGINS leaves out {ours[0]!r}, so vLLM would serve the dense model: add it there."
        )
    if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        raise PatchStateError("vLLM's frontend in Rust runs no plug-ins of Python: unset VLLM_USE_RUST_FRONTEND.")
    load_general_plugins()
    from vtok.serving.families import FAMILIES

    for family in FAMILIES.values():
        module = getattr(ModelRegistry.models.get(family.architecture), "module_name", "")
        if not module.startswith("vtok.serving"):
            raise PatchStateError(f"Another plug-in of vLLM has taken the place of vtok's {family.architecture}.")


def arguments(model: str, setting: dict[str, Any], rest: Sequence[str]) -> list[str]:
    """Those of `vllm serve`. rest: the user's own, among which there may be other overrides. Raises `InvalidValue`."""
    overrides: dict[str, Any] = {}
    kept, words = [], iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != OVERRIDES:
            kept.append(word)
            continue
        text = value if equals else next(words, "")
        try:
            overrides |= json.loads(text)
        except (ValueError, TypeError):
            raise InvalidValue(f"{OVERRIDES} is a JSON object, not {text!r}.") from None
    if KEY in overrides:
        raise InvalidValue(f'Give "{KEY}" in {OVERRIDES}, to vLLM itself, or --compressor here: not both.')
    return ["serve", model, OVERRIDES, json.dumps(overrides | {KEY: setting}), *kept]


def run(words: Sequence[str]) -> None:
    """vLLM's server, as `vllm serve` runs it; that command itself asks for a distribution named vllm, and wheels for
    CPUs have another name."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vtok")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args = parser.parse_args(list(words))
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
