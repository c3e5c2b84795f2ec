"""The tables of a model card that tell what compression costs the model, from the JSON files in its folder.

sweep.json of `vtok eval`, bench.json of `vtok bench`, psigmoid.json and gsearch.json (trace.json of `vtok search`),
tokenflex.json of examples/train_tokenflex.py. A file that is not there is a section that is not there.
"""

from __future__ import annotations

import json
from pathlib import Path

from vtok.eval.sweep import BASELINES


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def table(head: list[str], rows: list[list]) -> str:
    """Markdown; all columns but the first to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def compressed(folder: Path) -> str:
    """All sections, each ending in an empty line."""
    return _methods(folder) + _searches(folder) + _tokenflex(folder)


def _methods(folder: Path) -> str:
    """What `vtok eval` measured, from sweep.json of the folder; nothing where there is none."""
    file = folder / "sweep.json"
    if not file.is_file():
        return ""
    sweep = json.loads(file.read_text())
    times = _selection_times(folder / "bench.json")
    dense = next(row for row in sweep["cells"] if row["method"] == "dense")
    rows = [row for row in sweep["cells"] if row is not dense]
    parts = [
        f"### {100 * budget:g} % of the tokens\n\n{_at_budget([row for row in rows if row['budget'] == budget], times)}"
        for budget in sorted({row["budget"] for row in rows}, reverse=True)
    ]
    if sweep["refused"]:
        reasons = [f"- `{i['method']}` at {100 * i['budget']:g} %: {i['reason']}" for i in sweep["refused"]]
        parts.append("Not run:\n\n" + "\n".join(reasons))
    told = _told(folder / "bench.json")
    count, baselines = sweep["about"]["items"], ", ".join(f"`{b}`" for b in BASELINES)
    tables = "\n\n".join(parts)
    return f"""## Compressed

Every training-free method of vtok at the same budget: the mean over decoder layers of kept over all visual
tokens is at most that (*mean keep* is what it was). {dense["n"]:,} questions on the first {count} held-out scenes; the
dense model has {percent(dense["accuracy"])} % on them. *To dense* and *to best baseline* (of {baselines}, at this
budget) are paired differences in points with 95 % intervals (bootstrap over scenes). FLOPs: of encoder and
prefill, as a fraction of the dense ones, by formula. Methods inside the decoder pay for the first layers, which see
all tokens, and rank by layers so early that they have hardly read the question: eight layers tell against them.{told}

{tables}

Reproduce: `vtok eval --out DIR --model {folder.name} --tasks scenes --items {count}`; it writes DIR/scenes/sweep.json.

"""


def _selection_times(file: Path) -> dict[int, dict[str, float]]:
    """Visual tokens -> method -> milliseconds of its selection at a quarter of the tokens, from what `vtok bench --out`
    wrote; empty without."""
    if not file.is_file():
        return {}
    return {
        result["visual_tokens"]: {
            row["method"]: 1e3 * row["selection_seconds"]["median"]
            for row in result["variants"].values()
            if row["method"] and row["keep"] == 0.25
        }
        for result in json.loads(file.read_text())["results"]
    }


def _told(file: Path) -> str:
    if not file.is_file():
        return ""
    about = json.loads(file.read_text())["machine"]
    return f"""
*Select at N*: milliseconds of the selection alone at keep=0.25, on the demo's picture of N visual tokens
({about["threads"]} threads of {about["machine"]}, `{about["command"]}`). At larger sizes: docs/speed.md."""


def _at_budget(rows: list[dict], times: dict[int, dict[str, float]]) -> str:
    head = [
        "method",
        "mean keep",
        "exact match %",
        "95 % interval",
        "to dense",
        "to best baseline",
        "as dense %",
        "FLOPs",
    ]
    lines = [
        [
            f"`{row['method']}`",
            f"{row['mean_keep']:.3f}",
            f"**{percent(row['accuracy'])}**",
            "{} to {}".format(*map(percent, row["interval"])),
            _range(row["to_dense"]),
            _range(row["to_baseline"]) if "to_baseline" in row else "",
            percent(row["agreement"]),
            f"{row['flops']:.2f}",
            *(f"{of[row['method']]:.1f}" if row["method"] in of else "" for of in times.values()),
        ]
        for row in sorted(rows, key=lambda row: -row["accuracy"])
    ]
    drawn = table(head, lines)
    baselines = [row for row in rows if row["method"] in BASELINES]
    if not baselines:
        return drawn
    best = max(baselines, key=lambda row: row["accuracy"])["method"]
    weak = [f"`{row['method']}`" for row in rows if row not in baselines and row["to_baseline"]["interval"][0] <= 0]
    return f"{drawn}\n\nNo better than `{best}`, within the interval: {', '.join(weak) or 'none'}."


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
