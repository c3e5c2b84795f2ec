"""`vtok bench`: is the compute saved on paper also saved on the clock?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vtok.cli import options
from vtok.cli.group import Group

app = typer.Typer(cls=Group, invoke_without_command=True)

Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of weights and inputs.")]
Visual = Annotated[str, typer.Option(metavar="N,...", help="Pictures of so many visual tokens.  [default: all]")]


@app.callback()
def bench(
    ctx: typer.Context,
    workload: Annotated[
        str, typer.Option(help="small, smollm2, llava-next-7b, qwen2.5-vl-3b, or a bundled model.")
    ] = "small",
    visual: Visual = "",
    methods: options.EveryMethod = None,
    config: options.Config = None,
    keep: Annotated[str, typer.Option(metavar="SHARE,...", help="Fractions to keep.")] = "0.5,0.25,0.1",
    out: Annotated[Path | None, typer.Option(help="JSON file to write, with a plot of each picture beside it.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with code 1 if a bar is missed.")] = False,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Samples at once.")] = 1,
    tokens: Annotated[
        int, typer.Option("--tokens", "--decode", metavar="N", min=0, help="Tokens to decode after a prefill.")
    ] = 8,
    repetitions: Annotated[int, typer.Option(metavar="N", min=1, help="Timed runs of each variant, at most.")] = 9,
    seconds: Annotated[float, typer.Option(help="Stop after so long a picture, but not before 3 runs.")] = 300.0,
    device: options.Device = None,
    dtype: Dtype = "float32",
    threads: options.Threads = None,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="For a busy machine: CPU time instead of wall; use with --threads 1.")
    ] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Each kernel alone over sizes instead.")] = False,
    page: Annotated[
        Path | None, typer.Option(help="Measure nothing: make a page of this folder's JSON files, FOLDER.md beside it.")
    ] = None,
) -> None:
    """Measure every phase against the FLOP ratio, the cost of the patch itself, memory and decoding.

    \b
    Examples:
      vtok bench --workload smollm2 --methods divprune,fastv --keep 0.25
      vtok bench --workload llava-next-7b --device cuda --dtype bfloat16
      vtok bench --kernels --out kernels.json
    """
    if ctx.invoked_subcommand is not None:
        return
    if page is not None:
        from vtok.eval.bench import page as bench_page

        typer.echo(f"wrote {bench_page.write(page)}")
        return
    chosen, keeps = options.chosen(methods or None, config), options.numbers(keep, float, "--keep")
    pictures = options.numbers(visual, int, "--visual") or None
    device = options.device_of(device)
    if kernels:
        from vtok.eval.bench import kernels as alone

        met = alone.run(out, repetitions, threads, device, dtype)
    else:
        from vtok.eval.bench import bench as work
        from vtok.eval.bench.measure import How

        options.drawing(required=out is not None)
        how = How(batch, device, dtype, tokens, repetitions, seconds, cpu_time)
        met = work.run(workload, pictures, out, keeps, chosen, how, threads)
    if check and not met:
        raise typer.Exit(1)


@app.command()
def rl(
    visual: Annotated[str, typer.Option(metavar="N,...", help="Pictures of so many visual tokens.")] = "256,1024",
    methods: Annotated[str, typer.Option(metavar="NAME,...", help="Compressors.")] = "divprune,fastv",
    keep: Annotated[str, typer.Option(metavar="SHARE,...", help="Fractions to keep.")] = "0.5,0.25",
    answers: Annotated[int, typer.Option(min=1, help="Answers to the prompt.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 16,
    repetitions: Annotated[int, typer.Option(metavar="N", min=1, help="Timed steps of each variant.")] = 5,
    memory: Annotated[float, typer.Option(help="GiB that the largest step is to fit in.")] = 16.0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with code 1 if a bar is missed.")] = False,
    device: options.Device = None,
    dtype: Dtype = "float32",
    threads: options.Threads = None,
) -> None:
    """One step of GRPO, phase by phase, dense and on compressed tokens: time, memory, the largest clip that fits.

    \b
    Example:
      vtok bench rl --visual 1024 --methods divprune --keep 0.25
    """
    from vtok.eval.bench import rl as work

    step = work.Step(answers, tokens, repetitions, options.device_of(device), dtype, memory)
    names, keeps = methods.split(","), options.numbers(keep, float, "--keep")
    met = work.run(options.numbers(visual, int, "--visual"), names, keeps, step, out, threads)
    if check and not met:
        raise typer.Exit(1)


@app.command()
def cache(
    model: options.Model = "smollm2",
    methods: options.EveryMethod = None,
    budgets: Annotated[str, typer.Option(metavar="SHARE,...", help="Shares of the prompt's columns.")] = "0.5,0.3",
    prompts: Annotated[str, typer.Option(metavar="N,...", help="Prompts of so many tokens.")] = "1024,4096",
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens that follow, and are scored.")] = 64,
    passages: Annotated[int, typer.Option(metavar="N", min=1, help="Of each kind of text and length.")] = 10,
    out: Annotated[Path | None, typer.Option(help="JSON file; the same one again goes on after a kill.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="For a busy machine: CPU time instead of wall; use with --threads 1.")
    ] = False,
) -> None:
    """What a smaller cache costs a language model, in perplexity, and what it saves in time and bytes.

    \b
    Example:
      vtok bench cache --methods snapkv,kvzip --prompts 1024 --out cache.json
    """
    chosen, shares = options.chosen(methods or None, None), options.numbers(budgets, float, "--budgets")
    lengths = options.numbers(prompts, int, "--prompts")
    with options.loaded(model, device, dtype, threads) as (network, tokenizer, status):
        from vtok.eval.bench import cache as work
        from vtok.eval.bench.measure import How
        from vtok.eval.results.cells import training_free

        status("")
        how = How(device=str(network.device), dtype=str(network.dtype).removeprefix("torch."), cpu_time=cpu_time)
        chosen = training_free(pictures=False) if chosen is None else chosen
        asked = work.Asked(model, tuple(chosen), tuple(shares), tuple(lengths), passages, tokens)
        work.run(network, tokenizer, asked, how, out)


@app.command()
def decoding(
    tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="How often each prompt is asked.")] = 1,
    prompts: Annotated[int, typer.Option(min=1, max=4, help="Measured prompts of each kind of text.")] = 2,
    layers: Annotated[int, typer.Option(min=1, max=30, help="Of the draft model: SmolLM2's first ones.")] = 4,
    columns: Annotated[
        int | None, typer.Option(metavar="N", help="Self-speculation behind a cache of so many columns instead.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, or to go on with.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with code 1 if a bar is missed.")] = False,
    threads: options.Threads = 1,
) -> None:
    """Decoders against plain greedy search and transformers' own, on SmolLM2: ordinary and repetitive text, and code.

    \b
    Examples:
      vtok bench decoding --out decoding.json
      vtok bench decoding --columns 16384 --out columns.json
    """
    if columns is not None:
        from vtok.eval.bench import columns as long

        met = long.run(long.Asked(columns, tokens), out, threads)
    else:
        from vtok.eval.bench import decoding as work

        met = work.run(work.Asked(tokens, rounds, prompts, layers), out, threads)
    if check and not met:
        raise typer.Exit(1)


@app.command()
def serve(
    visual: Annotated[
        int, typer.Option(metavar="N", help="576 or 2880 visual tokens a picture; 36 or 180 of a toy.")
    ] = 576,
    compressor: Annotated[str, typer.Option(metavar="NAME", help="A compressor that can be served.")] = "divprune",
    keep: Annotated[float, typer.Option(help="Fraction to keep.")] = 0.25,
    at_once: Annotated[str, typer.Option(metavar="N,...", help="Requests at once.")] = "1,4,16",
    requests: Annotated[int, typer.Option(min=1, help="Requests of each level in a round.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each server.")] = 2,
    memory: Annotated[int, typer.Option(min=1, help="GiB of each server's KV cache.")] = 1,
    split: Annotated[bool, typer.Option("--split", help="One server reads prompts, another answers.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder to make it in, or that has it.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with code 1 if a bar is missed.")] = False,
) -> None:
    """vLLM's server on this machine, dense and compressed: time to first token, requests a second, KV memory.

    \b
    Example:
      vtok bench serve --visual 2880 --keep 0.25
    """
    from tempfile import TemporaryDirectory

    from vtok.eval.bench import serve as at_once_work
    from vtok.eval.bench import split as split_work
    from vtok.serving import launch

    launch.check_installed()
    work = split_work if split else at_once_work
    load = at_once_work.Load(tuple(options.numbers(at_once, int, "--at-once")), requests, tokens, rounds, memory)
    with TemporaryDirectory() as made:
        met = work.run(visual, compressor, keep, load, checkpoint or Path(made), out)
    if check and not met:
        raise typer.Exit(1)
