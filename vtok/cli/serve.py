"""`vtok serve`: vLLM's server, on fewer visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.cli import options
from vtok.errors import InvalidValue


def serve(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A bundled name, a local folder or a repository of the hub.")],
    compressor: Annotated[
        str | None, typer.Option(metavar="NAME", help="Options behind a colon: visionzip:importance=received.")
    ] = None,
    keep: options.Keep = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead: the choice in a file that patch.save wrote.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Say whether it can be served so, and stop.")] = False,
) -> None:
    """Serve a model with vLLM on fewer visual tokens, over OpenAI's API. All other options are those of vllm serve.

    \b
    Examples:
      vtok serve llava-hf/llava-1.5-7b-hf --compressor divprune --port 8000
      vtok serve Qwen/Qwen2.5-VL-3B-Instruct --config vtok.json
    """
    from vtok.models import place

    setting, source = _setting(compressor, keep, config), place(model)
    from vtok.serving import launch

    launch.check(source, setting)
    launch.check_installed()
    words = launch.arguments(source, setting, ctx.args)
    if "--served-model-name" not in ctx.args and source != model:
        words += ["--served-model-name", model]
    if check:
        options.say(f"{model} can be served with {config or compressor}.")
        return
    launch.run(words)


def _setting(compressor: str | None, keep: str | None, config: Path | None) -> dict[str, Any]:
    """What is asked for, in the form of a file that patch.save wrote."""
    if (compressor is None) == (config is None):
        raise InvalidValue("Give --compressor or --config, one of them.")
    from vtok import config as configs
    from vtok.methods import each, number

    if config is not None:
        if keep is not None:
            raise InvalidValue(f"--keep goes with --compressor: {config} says how much to keep.")
        return configs.describe(configs.load(config))
    told = [{"name": name, **values} for name, values in each(compressor)]
    if keep is not None:
        told = [part | {"keep": number(keep)} for part in told]
    return configs.describe(configs.load({"compressors": told}))
