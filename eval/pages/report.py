"""What `vtok report` does: results of `vtok eval` in, one HTML file that needs nothing else and its drawings out.

The numbers are made in eval/results, the drawings in drawings.py, the gallery in gallery.py and the page in page.py.
"""

from __future__ import annotations

from pathlib import Path

from vtok import draw
from vtok.errors import InvalidValue
from vtok.eval.pages import drawings, gallery
from vtok.eval.pages.page import key, page
from vtok.eval.results.results import load
from vtok.eval.results.verdicts import leaders


def write(
    folder: str | Path, out: str | Path, pictures: int = 4, device: str = "cpu", dtype: str | None = None
) -> list[Path]:
    """Write the page and its drawings as PNGs beside it; the files, the page first.

    pictures: at most so many in the gallery of a task; 0 runs no model. device, dtype: of the models that are run, in
    the data type of the results if left out. Raises `InvalidValue` for a folder that is not
    one of `vtok eval`, or an `out` that cannot be written, and `MissingExtra` without matplotlib.
    """
    draw.check()
    models, out = load(folder), Path(out)
    first = leaders(models, drawings.COLOURED)
    colours = {name: drawings.THEME[f"c{i + 1}"][0] for i, name in enumerate(first)}
    figures, shown = {}, {}
    for model in models:
        if len(model.tasks) > 1:
            figures[key(model)] = drawings.of_several(model, colours)
        for results, pictured in zip(model.shown, gallery.draw_all(model, first, pictures, device, dtype)):
            figures[key(model, results)] = drawings.of_task(results, colours)
            shown[key(model, results)] = pictured
    vectors = {
        name: [drawings.svg(figure, f"{name}: accuracy against {kind}") for kind, figure in own.items()]
        for name, own in figures.items()
    }
    beside = {}
    for model in models:  # of each the first tab: its overview, or its only task
        stem = f"{out.stem}-{model.model}" if len(models) > 1 else out.stem
        own = figures[key(model)] if len(model.tasks) > 1 else figures[key(model, model.tasks[0])]
        beside |= {out.with_name(f"{stem.replace('/', '-')}-{kind}.png"): figure for kind, figure in own.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(models, vectors, shown), encoding="utf-8")
        for file, figure in beside.items():
            drawings.png(figure, file)
    except OSError as error:
        raise InvalidValue(f"The report could not be written to {str(out)!r} ({error.strerror}).") from error
    return [out, *beside]
