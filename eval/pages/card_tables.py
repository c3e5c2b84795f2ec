"""What the cards of bundled models share: how they begin, and tables of what compression costs.

They are made of sweep.json or sweep/TASK.json of `vtok eval`, bench.json of `vtok bench`, psigmoid.json and
gsearch.json (trace.json of `vtok search`), tokenflex.json of examples/train_tokenflex.py. A file that is not there is a
section that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vtok.eval.pages.words import FEW
from vtok.eval.results.cells import Cell, baselines, calls, tried
from vtok.eval.results.results import Mean, Results, Several, read
from vtok.eval.results.verdicts import at_all, beats, not_run
from vtok.markdown import paragraph, percent, table
from vtok.zoo import DEMO_QUESTION

TEMPLATES = Path(__file__).with_name("templates")


def front(kind: str) -> str:
    """The front matter of a bundled model's card, for the hub. kind: of model, as a tag."""
    data = ModelCardData(
        license="apache-2.0",
        language="en",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=[kind, "vtok", "tiny", "synthetic"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def usage(name: str, said: str) -> str:
    """How to ask a model of the hub about the demo's picture without vtok; `said` is what it answers."""
    return f"""No vtok needed:

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="float32")
processor = AutoProcessor.from_pretrained("{name}")
question = {{"type": "text", "text": "{DEMO_QUESTION}"}}
chat = [{{"role": "user", "content": [{{"type": "image"}}, question]}}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(text=prompt, images=Image.open("demo.png"), return_tensors="pt")
out = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(out, skip_special_tokens=True).strip())  # {said}
```
"""


def card(template: str, folder: Path, **facts: Any) -> str:
    """A card of a model folder, from its template and what that asks for."""
    env = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    helpers = {"front": front, "usage": usage, "percent": percent, "compressed": compressed(folder)}
    return env.get_template(template).render(name=folder.name, megabytes=size, **helpers, **facts)


def compressed(folder: Path) -> str:
    """All sections, each ending in an empty line."""
    return _methods(folder) + _selection(folder / "bench.json") + _searches(folder) + _tokenflex(folder)


def _methods(folder: Path) -> str:
    """What `vtok eval` measured; nothing where there is no summary."""
    found = Several(read(folder))
    if not found.tasks:
        return ""
    parts = [f"### {100 * budget:g} % of the tokens\n\n{_at_budget(found, budget)}" for budget in found.budgets]
    if told := calls((c.method, row.get("options", {})) for results in found.tasks for c, row in results.facts.items()):
        parts.append(f"Run as {', '.join(f'`{call}`' for call in told)}.")
    if refused := _refused(found.tasks):
        parts.append(f"Not run:\n\n{refused}")
    asked = ", ".join(f"{len(results.questions):,} of `{results.about['task']}`" for results in found.tasks)
    rivals = ", ".join(f"`{name}`" for name in tried(found.tasks))
    words = (
        "Exact match in percent of each method at the same budget: the mean over decoder layers of kept over all "
        "visual tokens is at most that, as far as the method can go (*mean keep* is what it was). "
        f"Questions: {asked}. *Of dense*: accuracy as a part of the dense model's, in percent, the mean over the tasks "
        "that the dense model answers better than chance, with its 95 % interval (paired bootstrap over items). "
        f"{FEW} FLOPs: of encoder and prefill, as a fraction of the dense ones, by formula, the mean over tasks. Bold, "
        f"on these tasks alone: better than each of {rivals} at this budget, beyond "
        "the interval of the paired difference to the best of them. Methods inside the decoder pay for the first "
        "layers, which see all tokens, and at a low budget rank by layers so early that they have hardly read the "
        f"question. The best at each budget: docs/choosing.md. {at_all(found.tasks, '`{}`'.format)}"
    )
    commands = dict.fromkeys(f"`{run['command']}`" for results in found.tasks for run in results.runs)
    command = f"Reproduce: {', '.join(commands)}; it writes sweep.json files."
    return "\n\n".join(["## Compressed", paragraph(words), *parts, paragraph(command)]) + "\n\n"


def _refused(found: Sequence[Results]) -> str:
    """What was not run on which tasks, and why; "" where all was."""
    where: dict[tuple[str, tuple[float, ...], str], list[str]] = {}
    for results in found:
        for (method, why), budgets in not_run(results.refused).items():
            where.setdefault((method, tuple(budgets), why), []).append(f"`{results.about['task']}`")
    lines = []
    for (method, budgets, why), tasks in sorted(where.items()):
        on = "" if len(tasks) == len(found) else f" on {', '.join(tasks)}"
        lines.append(f"- `{method}` at {', '.join(f'{100 * budget:g}' for budget in budgets)} %{on}: {why}")
    return "\n".join(lines)


def _at_budget(found: Several, budget: float) -> str:
    dense = ["dense", "1.000", "1.00", "100.0", *(percent(results.dense.accuracy.at) for results in found.tasks)]
    head = ["method", "mean keep", "FLOPs", "of dense", *(f"`{results.about['task']}`" for results in found.tasks)]
    return table(head, [dense, *(_line(found, row) for row in found.at(budget))])


def _line(found: Several, row: Mean) -> list[str]:
    cell = Cell(row.method, row.budget)
    facts = [results.facts[cell] for results in row.tasks]
    keep, flops = (sum(fact[key] for fact in facts) / len(facts) for key in ("mean_keep", "flops"))
    kept = ""
    if row.kept:
        kept = percent(row.kept.at) + (" ({} to {})".format(*map(percent, row.kept.span)) if row.kept.span else "")
    shares = [_accuracy(results, cell) if results in row.tasks else "" for results in found.tasks]
    return [f"`{row.method}`", f"{keep:.3f}", f"{flops:.2f}", kept, *shares]


def _accuracy(results: Results, cell: Cell) -> str:
    row, text = results.rows[cell], percent(results.rows[cell].accuracy.at)
    if cell.method in baselines() or not results.telling:  # where the dense model is at chance there is no better
        return text
    rival = results.rival(row)
    return f"**{text}**" if rival and beats(row, rival) else text


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
