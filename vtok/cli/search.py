"""`vtok search`: find a schedule for a model on validation questions of the task `scenes`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vtok.cli import options
from vtok.cli.group import Group, resumable
from vtok.cli.options import say
from vtok.errors import InvalidValue, MissingExtra
from vtok.search import schedules
from vtok.search.gsearch import STEP, TOLERANCE
from vtok.search.psigmoid import EVALUATIONS

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="""Find how many visual tokens each decoder layer needs. The same command again goes on after a kill.

    \b
    Example:
      vtok search gsearch --out found --questions 64
    """,
)

Out = Annotated[Path, typer.Option(help="Folder for schedule.json, trace.json and search.png.")]
Questions = Annotated[int, typer.Option(metavar="N", min=1, help="Validation questions that a schedule is judged by.")]
Metric = Annotated[
    Literal["accuracy", "logprob"], typer.Option(help="Right greedy answers, or nats, which are smoother.")
]
FirstFull = Annotated[int, typer.Option(metavar="N", help="Layers that see all tokens.")]
Compare = Annotated[
    int, typer.Option(metavar="N", min=0, help="Test scenes on which to compare with others at equal mean keep.")
]


@dataclass(frozen=True)
class Session:
    """What both searches need: the model, its metric with a memory, and where to write."""

    model: Any
    processor: Any
    evaluations: Any
    instruction: str
    out: Path
    n_layers: int

    def track(self, what: str) -> Callable[[Any], Any]:
        """Wraps an iteration in a progress bar on standard error."""
        from rich.console import Console
        from rich.progress import track

        return lambda items: track(list(items), what, console=Console(stderr=True), transient=True)


def _open(
    ctx: typer.Context, method: str, out: Path, loads: tuple[Any, ...], questions: int, metric: str, **settings: Any
) -> Session:
    """loads: model, device, dtype and threads. settings: of the search."""
    with options.loaded(*loads) as (network, processor, status):
        status("asking the model")
    from vtok import adapter
    from vtok.eval.bench.machine import describe
    from vtok.eval.results import searched
    from vtok.eval.results.sweep import fingerprint
    from vtok.eval.tasks import scenes
    from vtok.search import questions as work
    from vtok.search.evaluations import Evaluations

    dtype = str(network.dtype).removeprefix("torch.")
    vlm, family = adapter.find(network)
    identity = {"search": method, "model": Path(loads[0]).name, "weights": fingerprint(network), "dtype": dtype}
    identity |= {"questions": questions, "split": "val", "scenes": scenes.VERSION, "seed_of_scenes": searched.SEED}
    instruction = scenes.TASK.instruction_of(loads[0])
    asked = searched.validation(questions, instruction)
    evaluations = Evaluations(
        work.metric_of(metric, network, processor, asked, scenes.TASK.score),
        out / "trace.json",
        identity | {"instruction": instruction, "metric": metric} | settings,
        describe(network.device.type, dtype),
    )
    if known := len(evaluations.known):
        say(f"going on after {known} evaluations in {out / 'trace.json'}")
    resumable(ctx)
    return Session(network, processor, evaluations, instruction, out, len(family.layers(family.core(vlm))))


def _close(session: Session, rates: schedules.Rates, compare: int, floor: float | None, **result: Any) -> None:
    """Write and show what was found."""
    evaluations, out = session.evaluations, session.out
    settings = evaluations.log["settings"]
    score, metric = evaluations.known[rates], settings["metric"]
    if metric == "accuracy" and not any(evaluations.known.values()):
        raise InvalidValue("No candidate answers a question right. Take more --questions, or --metric logprob.")
    whole = evaluations.known.get((1.0,) * len(rates))
    result = {"rates": list(rates), "mean_keep": schedules.mean(rates), "score": score, "full_score": whole} | result
    schedules.write(out / "schedule.json", rates, score=score, full_score=whole, settings=settings)
    say(f"rates: {' '.join(f'{r:.3f}' for r in rates)}")
    against = "" if whole is None else f" (all tokens: {whole:.4f})"
    say(
        f"mean keep {result['mean_keep']:.3f}, {metric} {score:.4f}{against}, {len(evaluations.known)} evaluations; "
        f'vtok.patch(model, "schedule", file="{out / "schedule.json"}")'
    )
    others = _compare(session, rates, compare, result) if compare else {}
    evaluations.finish(result)
    from vtok.search.plot import draw

    title = f"{settings['search']} on {settings['model']}, {settings['questions']} questions"
    try:
        draw(out / "search.png", evaluations.asked, rates, others, metric, floor, title)
    except MissingExtra:
        say('No picture was written, since matplotlib is missing: pip install "vtok[viz]".')
    say(f"wrote {out}")


def _compare(session: Session, rates: schedules.Rates, count: int, result: dict[str, Any]) -> dict[str, Any]:
    """Judge the schedule and others of its mean keep on test scenes, and note it in `result`; the others' rates."""
    from vtok.eval.results import searched
    from vtok.search import questions as work

    methods = work.rivals(rates)
    result["compared"] = searched.judged(
        session.model, session.processor, methods, count, session.instruction, session.track("comparing")
    )
    for row in result["compared"]:
        if "refused" in row:
            say(f"{row['method']:12} not run: {row['refused']}")
            continue
        low, high = row["to_found"]["interval"]
        say(
            f"{row['method']:12} {row['accuracy']:.3f}  n {row['n']}  mean keep {row['mean_keep']:.3f}  "
            f"to found {row['to_found']['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
    built = {name: method for name, method in methods.items() if name != "found" and not isinstance(method, str)}
    return {name: _rates_of(method, len(rates)) for name, method in built.items()}


def _rates_of(method: Any, n_layers: int) -> schedules.Rates:
    """The share of tokens that an in-LLM compressor leaves at each layer."""
    after, rates = method.schedule(n_layers), [1.0]
    for layer in range(n_layers - 1):
        rates.append(float(after.get(layer, rates[-1])))
    return tuple(rates)


@app.command(short_help="The smallest schedule within a tolerance (G-Search).")
def gsearch(
    ctx: typer.Context,
    out: Out,
    model: options.Model = options.MODEL,
    questions: Questions = 256,
    metric: Metric = "accuracy",
    tolerance: Annotated[float, typer.Option(help="What may be lost, as a fraction of the full score.")] = TOLERANCE,
    step: Annotated[float, typer.Option(help="Distance of candidate rates, 1 / an integer.")] = STEP,
    first_full: FirstFull = schedules.FULL,
    group: Annotated[int, typer.Option(metavar="N", min=1, help="Layers that get one rate.")] = 1,
    max_evals: Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after so many evaluations.")] = None,
    compare: Compare = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """The smallest schedule that costs no more than a tolerance (G-Search).

    \b
    Example:
      vtok search gsearch --out found --questions 64 --metric logprob
    """
    from vtok.search.gsearch import gsearch as search

    settings = {"tolerance": tolerance, "step": step, "first_full": first_full, "group": group}
    session = _open(ctx, "gsearch", out, (model, device, dtype, threads), questions, metric, **settings)
    rates = search(
        session.evaluations, session.n_layers, max_evals=max_evals, progress=session.track("layers"), **settings
    )
    whole = session.evaluations.known[(1.0,) * session.n_layers]
    _close(session, rates, compare, whole - tolerance * abs(whole))


@app.command(short_help="The best S-shaped schedule (P-Sigmoid).")
def psigmoid(
    ctx: typer.Context,
    out: Out,
    budget: Annotated[float, typer.Option(help="Mean over layers of the share of visual tokens kept.")],
    model: options.Model = options.MODEL,
    questions: Questions = 256,
    metric: Metric = "accuracy",
    a: Annotated[float | None, typer.Option(help="Amplitude.  [default: searched]")] = None,
    k: Annotated[float | None, typer.Option(help="Steepness per layer.  [default: searched]")] = None,
    evaluations: Annotated[int, typer.Option(metavar="N", min=1, help="Candidates in all.")] = EVALUATIONS,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the Bayesian optimisation.")] = 0,
    first_full: FirstFull = schedules.FULL,
    compare: Compare = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """The best S-shaped schedule of a given mean keep (P-Sigmoid).

    \b
    Example:
      vtok search psigmoid --out found --budget 0.25 --questions 64
    """
    from vtok.search.psigmoid import psigmoid as search

    if not 0 < budget <= 1:
        raise InvalidValue(f"--budget is a fraction in (0, 1], not {budget}.")
    for name, value, high in (("--a", a, 10), ("--k", k, 100)):
        if value is not None and not 0 < value <= high:
            raise InvalidValue(f"{name} is a number above 0 and up to {high}, not {value}.")
    settings = {"a": a, "k": k, "first_full": first_full, "seed": seed, "evaluations": evaluations}
    loads = (model, device, dtype, threads)
    session = _open(ctx, "psigmoid", out, loads, questions, metric, budget=budget, **settings)
    progress = session.track("candidates")
    best, tried = search(session.evaluations, session.n_layers, budget, progress=progress, **settings)
    found = {key: value for key, value in asdict(best).items() if key not in ("rates", "score")}
    listed = [{key: value for key, value in asdict(one).items() if key != "rates"} for one in tried]
    _close(session, best.rates, compare, None, **found, candidates=listed)
