"""`vtok search`: find a schedule for a bundled model on its validation questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.errors import InvalidValue, MissingExtra
from vtok.search import schedules
from vtok.search.gsearch import STEP, TOLERANCE
from vtok.search.psigmoid import EVALUATIONS

app = typer.Typer(
    no_args_is_help=True,
    help="Find how many visual tokens each decoder layer needs. Call again with the same folder to go on after a kill.",
)

Out = Annotated[Path, typer.Option(help="Folder for schedule.json, trace.json and search.png.")]
Model = Annotated[str, typer.Option(help="A bundled name or a local folder.")]
Questions = Annotated[int, typer.Option(help="Validation questions that a schedule is judged by.")]
Metric = Annotated[str, typer.Option(help="accuracy (exact match of greedy answers) or logprob (nats, smoother).")]
FirstFull = Annotated[int | None, typer.Option(help="Layers that see all tokens; 2, or 1 below 16 layers.")]
Compare = Annotated[int, typer.Option(help="Test scenes on which to compare with others at equal mean keep.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of PyTorch.")]
NAME = "vtok-tiny-llava-next"


@dataclass(frozen=True)
class Session:
    """What both searches need: the model, its metric with a memory, and where to write."""

    model: Any
    processor: Any
    evaluations: Any
    out: Path
    n_layers: int
    say: Callable[..., None]

    def track(self, what: str) -> Callable[[Any], Any]:
        """Wraps an iteration in a progress bar on standard error."""
        from rich.console import Console
        from rich.progress import track

        return lambda items: track(list(items), what, console=Console(stderr=True), transient=True)


def _open(
    method: str, out: Path, model: str, questions: int, metric: str, threads: int | None, **settings: Any
) -> Session:
    from rich.console import Console

    console = Console(soft_wrap=True)
    say = lambda text: console.print(text, highlight=False, markup=False)
    if questions < 1:
        raise InvalidValue(f"--questions must be at least 1, got {questions}.")
    import torch
    from transformers.utils import logging

    from vtok import adapter
    from vtok.demo import load
    from vtok.eval.bench.machine import describe
    from vtok.eval.results import searched
    from vtok.eval.results.sweep import fingerprint
    from vtok.eval.tasks import scenes
    from vtok.search import questions as work
    from vtok.search.evaluations import Evaluations

    logging.disable_progress_bar()
    if metric not in work.METRICS:
        raise InvalidValue(f"--metric is one of {', '.join(work.METRICS)}, not {metric!r}.")
    if threads:
        torch.set_num_threads(threads)
    network, processor = load(model)
    dtype = str(network.dtype).removeprefix("torch.")
    vlm, family = adapter.find(network)
    identity = {"search": method, "model": Path(model).name, "weights": fingerprint(network), "dtype": dtype}
    identity |= {"questions": questions, "split": "val", "scenes": scenes.VERSION, "seed_of_scenes": searched.SEED}
    evaluations = Evaluations(
        work.metric_of(metric, network, processor, searched.validation(questions)),
        out / "trace.json",
        identity | {"metric": metric} | settings,
        describe(network.device.type, dtype),
    )
    if known := len(evaluations.known):
        say(f"going on after {known} evaluations in {out / 'trace.json'}")
    return Session(network, processor, evaluations, out, len(family.layers(family.core(vlm).language_model)), say)


def _close(session: Session, rates: schedules.Rates, compare: int, floor: float | None, **result: Any) -> None:
    """Write and show what was found."""
    evaluations, out, say = session.evaluations, session.out, session.say
    settings = evaluations.log["settings"]
    score, metric = evaluations.known[rates], settings["metric"]
    whole = evaluations.known.get((1.0,) * len(rates))
    result = {"rates": list(rates), "mean_keep": schedules.mean(rates), "score": score, "full_score": whole} | result
    schedules.write(out / "schedule.json", rates, score=score, full_score=whole, settings=settings)
    say(f"rates: {' '.join(f'{r:.3f}' for r in rates)}")
    against = "" if whole is None else f" (all tokens: {whole:.4f})"
    say(
        f"mean keep {result['mean_keep']:.3f}, {metric} {score:.4f}{against}, {len(evaluations.known)} evaluations; "
        f'vtok.patch(model, "schedule", file="{out / "schedule.json"}")'
    )
    others = {}
    if compare:
        from vtok.eval.results import searched
        from vtok.search import questions as work

        methods = work.rivals(rates)
        bar = session.track("comparing")
        result["compared"] = searched.judged(session.model, session.processor, methods, compare, bar)
        for row in result["compared"]:
            if "refused" in row:
                say(f"{row['method']:12} not run: {row['refused']}")
                continue
            low, high = row["to_found"]["interval"]
            say(
                f"{row['method']:12} {row['accuracy']:.3f}  n {row['n']}  mean keep {row['mean_keep']:.3f}  "
                f"to found {row['to_found']['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            )
        for name, method in methods.items():
            if name != "found" and not isinstance(method, str):
                others[name] = _rates_of(method, len(rates))
    evaluations.finish(result)
    from vtok.search.plot import draw

    title = f"{settings['search']} on {settings['model']}, {settings['questions']} questions"
    try:
        draw(out / "search.png", evaluations.asked, rates, others, metric, floor, title)
    except MissingExtra:
        say('No picture was written, since matplotlib is missing: pip install "vtok[viz]".')
    say(f"wrote {out}")


def _rates_of(method: Any, n_layers: int) -> schedules.Rates:
    """The share of tokens that an in-LLM compressor leaves at each layer."""
    after, rates = method.schedule(n_layers), [1.0]
    for layer in range(n_layers - 1):
        rates.append(float(after.get(layer, rates[-1])))
    return tuple(rates)


@app.command()
def gsearch(
    out: Out,
    model: Model = NAME,
    questions: Questions = 256,
    metric: Metric = "accuracy",
    tolerance: Annotated[float, typer.Option(help="What may be lost, as a fraction of the full score.")] = TOLERANCE,
    step: Annotated[float, typer.Option(help="Distance of candidate rates, 1 / an integer.")] = STEP,
    first_full: FirstFull = None,
    group: Annotated[int, typer.Option(help="Layers that get one rate.")] = 1,
    max_evals: Annotated[int | None, typer.Option(help="Stop after so many evaluations.")] = None,
    compare: Compare = 0,
    threads: Threads = None,
) -> None:
    """The smallest schedule that costs no more than a tolerance (G-Search)."""
    from vtok.search.gsearch import gsearch as search

    settings = {"tolerance": tolerance, "step": step, "first_full": first_full, "group": group}
    session = _open("gsearch", out, model, questions, metric, threads, **settings)
    rates = search(
        session.evaluations, session.n_layers, max_evals=max_evals, progress=session.track("layers"), **settings
    )
    whole = session.evaluations.known[(1.0,) * session.n_layers]
    _close(session, rates, compare, whole - tolerance * abs(whole))


@app.command()
def psigmoid(
    out: Out,
    budget: Annotated[float, typer.Option(help="Mean over layers of the share of visual tokens kept.")],
    model: Model = NAME,
    questions: Questions = 256,
    metric: Metric = "accuracy",
    a: Annotated[float | None, typer.Option(help="Amplitude; searched if left out.")] = None,
    k: Annotated[float | None, typer.Option(help="Steepness per layer; searched if left out.")] = None,
    evaluations: Annotated[int, typer.Option(help="Candidates in all.")] = EVALUATIONS,
    seed: Annotated[int, typer.Option(help="Of the Bayesian optimisation.")] = 0,
    first_full: FirstFull = None,
    compare: Compare = 0,
    threads: Threads = None,
) -> None:
    """The best S-shaped schedule of a given mean keep (P-Sigmoid)."""
    from vtok.search.psigmoid import psigmoid as search

    if not 0 < budget <= 1:
        raise InvalidValue(f"--budget is a fraction in (0, 1], not {budget}.")
    for name, value, high in (("--a", a, 10), ("--k", k, 100)):
        if value is not None and not 0 < value <= high:
            raise InvalidValue(f"{name} is a number above 0 and up to {high}, not {value}.")
    settings = {"budget": budget, "a": a, "k": k, "first_full": first_full, "seed": seed, "evaluations": evaluations}
    session = _open("psigmoid", out, model, questions, metric, threads, **settings)
    best, tried = search(
        session.evaluations,
        session.n_layers,
        budget,
        a=a,
        k=k,
        first_full=first_full,
        evaluations=evaluations,
        seed=seed,
        progress=session.track("candidates"),
    )
    found = {key: value for key, value in asdict(best).items() if key not in ("rates", "score")}
    listed = [{key: value for key, value in asdict(one).items() if key != "rates"} for one in tried]
    _close(session, best.rates, compare, None, **found, candidates=listed)
