"""How `vtok bench` shows what it measured: a table in 80 columns, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from vtok.eval.bench.measure import IDENTITY
from vtok.runs import DENSE


def table(result: dict[str, Any]) -> Table:
    """One picture's numbers in 80 columns."""
    counts = f"{result['batch']} x ({result['visual_tokens']} visual + {result['text_tokens']} text) tokens"
    title = f"{result['family']}, {counts}, {result['parameters'] / 1e6:.3g} M parameters, {result['rounds']} rounds"
    dense = result["variants"][DENSE]
    phases = f"encoder {ms(dense['encoder_seconds'])} ms, projector {ms(dense['projector_seconds'])} ms"
    drawn = Table(
        title=f"{title}\n{phases}",
        box=None,
        padding=(0, 1, 0, 0),
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    drawn.add_column("keep", no_wrap=True)
    for name in ("prefill", "min-max", "speed", "ideal", "reached", "select", "token", "KV", "peak"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_row("", "ms", "ms", "x", "x", "%", "ms", "ms", "MB", "MB", style="dim")
    for name, row in result["variants"].items():
        _, prefill, spread, *rest = cells(name, row)
        drawn.add_row(name, prefill, spread.replace(" to ", "-"), *rest)
    return drawn


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """The numbers of a variant: mean keep, prefill, its least to most, speed-up, ideal, reached, selection, token,
    cache and peak; in ms, percent and MB."""
    prefill, peak = row["prefill_seconds"], row["peak_bytes"]
    return [
        f"{row['mean_keep']:.3f}",
        f"{1e3 * prefill['median']:.0f}",
        f"{1e3 * prefill['min']:.0f} to {1e3 * prefill['max']:.0f}",
        f"{row['speedup']:.2f}",
        f"{row['ideal_speedup']:.2f}",
        "" if name in (DENSE, IDENTITY) else f"{100 * row['reached']:.0f}",
        ms(row["selection_seconds"]),
        "" if row["decode_seconds"] is None else ms(row["decode_seconds"]),
        f"{row['kv_bytes'] / 1e6:.1f}",
        "" if peak is None else f"{peak / 1e6:.0f}",
    ]


def ms(times: dict[str, Any]) -> str:
    return f"{1e3 * times['median']:.1f}"


def plot(result: dict[str, Any], caption: str, file: Path) -> None:
    """Prefill time against kept tokens, all methods, with the line that the FLOPs promise. Raises `MissingExtra`."""
    from vtok import draw

    draw.check()
    from matplotlib.figure import Figure

    rows = result["variants"]
    dense = rows[DENSE]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    n, per_flop = result["visual_tokens"], dense["prefill_seconds"]["median"] / dense["flops"]
    ideal = [(kept, 1e3 * per_flop * flops) for kept, flops in result["flops_at"]]
    label = "ideal: dense time x FLOP ratio,\nas many tokens in all layers"
    axes.plot(*zip(*ideal), color="black", linewidth=1, linestyle="--", label=label, zorder=1)
    names = list(dict.fromkeys(row["method"] for row in rows.values() if row["method"]))
    # a diamond for those of several stages, and of others
    markers = {"pixels": "^", "blocks": "^", "pre_llm": "o", "llm": "s"}
    for i, name in enumerate(names):
        mine = [row for row in rows.values() if row["method"] == name]
        x = [row["mean_keep"] * n + 0.004 * n * (i - len(names) / 2) for row in mine]  # side by side, to be seen
        times = [row["prefill_seconds"] for row in mine]
        y = [1e3 * t["median"] for t in times]
        errors = [[1e3 * (t["median"] - t["min"]) for t in times], [1e3 * (t["max"] - t["median"]) for t in times]]
        axes.errorbar(
            x,
            y,
            errors,
            label=name,
            color=f"C{i % 10}",
            marker=markers.get(mine[0]["stage"], "D"),
            markerfacecolor="white" if i >= 10 else None,
            markersize=5,
            linestyle="none",
            linewidth=0.8,
        )
    axes.plot([n], [1e3 * dense["prefill_seconds"]["median"]], "k*", markersize=10, label=DENSE)
    axes.set(
        xlabel="visual tokens kept (mean over decoder layers; equal counts side by side)",
        ylabel="prefill, ms (median, least to most)",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.set_title(caption, fontsize=8, loc="left")
    axes.legend(fontsize=7, ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
