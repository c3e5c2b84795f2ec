"""The results of several runs of timeseries_grpo.py as one table, one JSON file and one picture.

    python examples/timeseries_table.py out/*-dense out/*-half --to docs/rl/timemaster

Runs of one data set stand side by side, in the order in which they are named. Writes TO.json and TO.png, prints
the table.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

STAGES = ("before", "sft", "grpo")


def read(folder: Path) -> dict:
    """What a table needs of one run; the curve is the mean reward of each step."""
    found = json.loads((folder / "results.json").read_text())
    log = found["grpo"]["log"]
    row = {"run": folder.name, "title": found["title"], "options": found["options"], "train": found["train"]}
    row |= {"majority": found["majority"], "memory_mib": round(found["grpo"]["memory_mib"])}
    for stage in STAGES:
        row[stage] = {key: found[stage][key] for key in ("accuracy", "n", "form", "bare")}
    for stage in STAGES[1:]:
        row[stage]["seconds_a_step"] = round(found[stage]["seconds_a_step"], 3)
    return row | {"reward": [round(step["reward"], 4) for step in log]}


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n."""
    z = 1.96
    middle, half = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def line(row: dict) -> str:
    """A row of the table."""
    share = lambda stage: f"{100 * row[stage]['accuracy']:.1f}"
    low, high = wilson(row["grpo"]["accuracy"], row["grpo"]["n"])
    first, last = np.mean(row["reward"][:10]), np.mean(row["reward"][-10:])
    cells = [row["title"], f"{row['train']} / {row['grpo']['n']}", f"{100 * row['majority']:.1f}", share("sft")]
    cells += [f"**{share('grpo')}** ({100 * low:.0f} to {100 * high:.0f})", f"{first:.2f} to {last:.2f}"]
    cells += [f"{row['sft']['seconds_a_step']:.2f}", f"{row['grpo']['seconds_a_step']:.2f}", str(row["memory_mib"])]
    return f"| {' | '.join(cells)} |"


def draw(rows: list[dict], file: Path) -> None:
    """Reward over the steps of GRPO, a panel a data set, its runs together; held-out accuracy below."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(row["title"].partition(",")[0] for row in rows))
    figure = Figure(figsize=(3.4 * len(sets), 5), layout="constrained")
    panels = figure.subplots(2, len(sets), squeeze=False, sharey="row")
    for column, name in enumerate(sets):
        mine = [row for row in rows if row["title"].partition(",")[0] == name]
        for i, row in enumerate(mine):
            label, values = row["title"].partition(", ")[2], row["reward"]
            smooth = [np.mean(values[max(0, at - 9) : at + 1]) for at in range(len(values))]
            panels[0, column].plot(range(1, len(values) + 1), smooth, label=label)
            places = np.arange(len(STAGES)) + 0.8 * (i + 0.5) / len(mine) - 0.4
            panels[1, column].bar(places, [100 * row[s]["accuracy"] for s in STAGES], 0.8 / len(mine), label=label)
        panels[0, column].set(title=name, xlabel="step of GRPO")
        panels[1, column].set_xticks(range(len(STAGES)), STAGES)
        panels[1, column].axhline(100 * mine[0]["majority"], color="black", linestyle=":", label="majority guess")
    panels[0, 0].set_ylabel("reward, mean of the last 10")
    panels[1, 0].set_ylabel("held-out accuracy, %")
    panels[0, 0].legend(fontsize="small")
    panels[1, 0].legend(fontsize="small", loc="lower left")
    figure.savefig(file, dpi=80)


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    to: Annotated[Path, typer.Option(help="Files to write, without their ending.")],
) -> None:
    rows = [read(folder) for folder in runs]
    to.parent.mkdir(parents=True, exist_ok=True)
    to.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, to.with_suffix(".png"))
    print("| run | trained / tested on | majority | SFT | GRPO (95 %) | reward | s/step SFT | s/step GRPO | MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(map(line, rows)))


if __name__ == "__main__":
    typer.run(main)
