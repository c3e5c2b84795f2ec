"""The tables of a model card that tell what compression costs the model, from the JSON files in its folder.

sweep.json or sweep/TASK.json of `vtok eval`, bench.json of `vtok bench`, psigmoid.json and gsearch.json (trace.json of
`vtok search`), tokenflex.json of examples/train_tokenflex.py. A file that is not there is a section that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vtok.eval.results.evidence import Evidence, mean, read
from vtok.eval.results.results import at_all, not_run
from vtok.eval.results.sweep import BASELINES, calls
from vtok.markdown import paragraph, percent, table


def compressed(folder: Path) -> str:
    """All sections, each ending in an empty line."""
    return _methods(folder) + _selection(folder / "bench.json") + _searches(folder) + _tokenflex(folder)


def _methods(folder: Path) -> str:
    """What `vtok eval` measured; nothing where there is no summary."""
    found = read(folder)
    if not found:
        return ""
    budgets = sorted({budget for e in found for budget in e.budgets}, reverse=True)
    parts = [f"### {100 * budget:g} % of the tokens\n\n{_at_budget(found, budget)}" for budget in budgets]
    refused = _refused(found)
    if told := calls(row for e in found for row in e.cells.values()):
        parts.append(f"Run as {', '.join(f'`{call}`' for call in told)}.")
    if refused:
        parts.append(f"Not run:\n\n{refused}")
    asked = ", ".join(f"{e.dense['n']:,} of `{e.task}`" for e in found)
    words = (
        "Exact match in percent of every training-free method of vtok at the same budget: the mean over decoder layers "
        "of kept over all visual tokens is at most that, as far as the method can go (*mean keep* is what it was). "
        f"Questions: {asked}. *Of dense*: accuracy as a part of the dense model's, in percent, the mean over the tasks "
        "that the dense model answers better than chance, with its 95 % interval (paired bootstrap over items). FLOPs: "
        "of encoder and prefill, as a fraction of the dense ones, by formula, the mean over tasks. Bold: better than "
        f"each of {', '.join(f'`{b}`' for b in BASELINES)} at this budget, beyond the interval of the paired "
        "difference to the best of them. Methods inside the decoder pay for the first layers, which see all tokens, "
        "and rank by layers so early that they have hardly read the question: eight layers tell against them. "
        f"Intervals of each task: docs/choosing.md. {_whole(found)}"
    )
    command = f"Reproduce: {', '.join(dict.fromkeys(_command(e) for e in found))}; it writes sweep.json files."
    return "\n\n".join(["## Compressed", paragraph(words), *parts, paragraph(command)]) + "\n\n"


def _refused(found: Sequence[Evidence]) -> str:
    """What was not run on which tasks, and why; "" where all was."""
    where: dict[tuple[str, tuple[float, ...], str], list[str]] = {}
    for e in found:
        for (method, why), budgets in not_run(e.refused).items():
            where.setdefault((method, tuple(budgets), why), []).append(f"`{e.task}`")
    lines = []
    for (method, budgets, why), tasks in sorted(where.items()):
        on = "" if len(tasks) == len(found) else f" on {', '.join(tasks)}"
        lines.append(f"- `{method}` at {', '.join(f'{100 * budget:g}' for budget in budgets)} %{on}: {why}")
    return "\n".join(lines)


def _command(e: Evidence) -> str:
    return f"`{e.about['machine']['command']}`"


def _whole(found: Sequence[Evidence]) -> str:
    """What became of the answers where nothing was to be dropped."""
    least: dict[str, float] = {}
    for (method, budget), row in (pair for e in found for pair in e.cells.items()):
        if budget == 1:
            least[f"`{method}`"] = min(least.get(f"`{method}`", 1.0), row["agreement"])
    return at_all(least)


def _at_budget(found: Sequence[Evidence], budget: float) -> str:
    telling = [e for e in found if e.telling]
    lines = []
    for name in dict.fromkeys(name for e in found for name, b in e.cells if b == budget):
        rows = {e.task: e.cells[name, budget] for e in found if (name, budget) in e.cells}
        whole = telling and all(e.task in rows for e in telling)
        kept = mean([e.kept(name, budget) for e in telling]) if whole else None
        average = {key: sum(row[key] for row in rows.values()) / len(rows) for key in ("mean_keep", "flops")}
        told = [f"`{name}`", f"{average['mean_keep']:.3f}", f"{average['flops']:.2f}", kept or ""]
        told += [_accuracy(rows[e.task]) if e.task in rows else "" for e in found]
        lines.append((-kept.share if kept else 0, name, told))
    dense = ["dense", "1.000", "1.00", "100.0", *(percent(e.dense["accuracy"]) for e in found)]
    head = ["method", "mean keep", "FLOPs", "of dense", *(f"`{e.task}`" for e in found)]
    return table(head, [dense, *(told for *_, told in sorted(lines, key=lambda line: line[:2]))])


def _accuracy(row: dict) -> str:
    text = percent(row["accuracy"])
    return f"**{text}**" if row["method"] not in BASELINES and row["to_baseline"]["interval"][0] > 0 else text


def _selection(file: Path) -> str:
    """How long choosing takes, from what `vtok bench --out` wrote; nothing without."""
    if not file.is_file():
        return ""
    result = json.loads(file.read_text())
    about = result["machine"]
    times = {
        each["visual_tokens"]: {
            row["method"]: 1e3 * row["selection_seconds"]["median"]
            for row in each["variants"].values()
            if row["method"] and row["keep"] == 0.25
        }
        for each in result["results"]
    }
    names = sorted({name for of in times.values() for name in of})
    rows = [[f"`{name}`", *(f"{of[name]:.1f}" if name in of else "" for of in times.values())] for name in names]
    words = (
        "Milliseconds of the selection alone at keep=0.25, on pictures of so many visual tokens "
        f"({about['threads']} threads of {about['machine']}, `{about['command']}`). At larger sizes: docs/speed.md."
    )
    drawn = table(["method", *(f"{count} tokens" for count in times)], rows)
    return f"## Selection\n\n{paragraph(words)}\n\n{drawn}\n\n"


def _range(row: dict) -> str:
    """A paired difference in points."""
    low, high = row["interval"]
    return f"{100 * row['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _searches(folder: Path) -> str:
    parts = []
    for name, title in (("gsearch", "G-Search"), ("psigmoid", "P-Sigmoid")):
        file = folder / f"{name}.json"
        if not file.is_file():
            continue
        log = json.loads(file.read_text())
        settings, found = log["settings"], log["result"]
        rows = [
            [
                f"`{row['method']}`",
                f"{row['mean_keep']:.3f}",
                f"**{percent(row['accuracy'])}**",
                "{} to {}".format(*map(percent, row["interval"])),
                _range(row["to_found"]),
            ]
            for row in found["compared"]
            if "refused" not in row
        ]
        rates = " ".join(f"{rate:.3f}" for rate in found["rates"])
        goal = (
            f"tolerance {settings['tolerance']:g}"
            if name == "gsearch"
            else f"budget {settings['budget']:g}, a, k searched"
        )
        parts.append(
            f"### {title}\n\n{len(log['evaluations'])} evaluations of {settings['metric']} on {settings['questions']} "
            f"validation questions, {goal}: mean keep {found['mean_keep']:.3f}, score {found['score']:.4f}.\n"
            f"Rates by layer: {rates}. The schedule: `{name}-schedule.json`; all evaluations: `{name}.json`.\n\n"
            f"{table(['method', 'mean keep', 'exact match %', '95 % interval', 'to found'], rows)}\n\n"
            f"![schedule and convergence]({name}.png)\n\nReproduce: `{log['runs'][0]['command']}`.\n"
        )
    if not parts:
        return ""
    listed = "\n".join(parts)
    return f"""## Schedules

Keep rates for each decoder layer, found for this model on validation questions, then judged on held-out ones against
other methods inside the decoder at the same mean keep. *To found*: paired difference to the schedule found.

{listed}
"""


def _tokenflex(folder: Path) -> str:
    file = folder / "tokenflex.json"
    if not file.is_file():
        return ""
    made = json.loads(file.read_text())
    rows = [
        [
            name,
            f"{row['tokens_per_view']:g}",
            *(
                "{} ({} to {})".format(*map(percent, (row[str(n)]["accuracy"], *row[str(n)]["interval"])))
                for n in made["counts"]
            ),
        ]
        for name, row in made["rows"].items()
    ]
    first = next(iter(made["rows"].values()))
    shares = " : ".join(f"{share:g}" for share in made["shares"])
    return f"""## TokenFLEX

This model with a `tokenflex` projector, trained once for {len(made["counts"])} numbers of tokens a view (of 64), drawn
{shares} in each step, against models trained for one. {made["align"]} steps of alignment and {made["steps"]} of 32
questions each, projector and decoder; tested on {made["scenes"]} held-out scenes, {first[str(made["counts"][0])]["n"]}
questions. Exact match in percent and 95 % intervals:

{table(["trained", "tokens in training", *(f"tested at {n}" for n in made["counts"])], rows)}

Reproduce: `python examples/train_tokenflex.py --out DIR --steps {made["steps"]} --scenes {made["scenes"]}`.

"""
