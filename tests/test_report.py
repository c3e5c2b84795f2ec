"""`vtok report`: its numbers against counting by hand, one folder against several, a page that needs nothing else."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from contract import picture, tiny
from typer.testing import CliRunner

from vtok import cli, zoo
from vtok.errors import InvalidValue
from vtok.eval.pages import choosing
from vtok.eval.results import evidence, results
from vtok.eval.results.sweep import Cell
from vtok.eval.tasks.task import Item, Question

pytest.importorskip("matplotlib")
report = pytest.importorskip("vtok.eval.pages.report")

ITEMS, CATEGORIES = 30, {"scenes": ("colour", "reading", "trend"), "needle": ("code", "gap"), "existence": ("random",)}
CELLS = {
    Cell("dense", 1.0): 0.9,
    Cell("downsample", 0.5): 0.6,
    Cell("random", 0.5): 0.5,
    Cell("divprune", 0.5): 0.85,
    Cell("fastv", 0.5): 0.7,
    Cell("divprune", 0.1): 0.5,
    Cell("random", 0.1): 0.3,
}
REFUSED = [{"method": "fastv", "budget": 0.1, "reason": "A budget of 0.1 cannot be met."}]


def put(path, task="scenes", model="some-model", seed=1, cells=CELLS, shift=0.0):
    """A finished run with made-up answers: right ones are "yes"."""
    path.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(seed), []
    for cell, share in cells.items():
        lines = []
        for item in range(ITEMS):
            draws = [rng.random() < share + shift for _ in CATEGORIES[task]]
            answers = [[c, "yes", "yes" if ok else "<b>no</b>"] for c, ok in zip(CATEGORIES[task], draws)]
            line = {"item": item, "seconds": 0.1, "answers": answers, "right": [said == "yes" for *_, said in answers]}
            if cell.method != "dense":
                line |= {"mean_keep": cell.budget, "flops": cell.budget + 0.1, "selection_seconds": 0.001}
            lines.append(json.dumps(line))
        (path / cell.file).write_text("\n".join(lines) + "\n")
        rows.append({"method": cell.method, "budget": cell.budget})
    machine = {"machine": "a CPU x 2", "load": "0.1", "commit": "abc", "command": "vtok eval", "threads": "1"}
    about = {"model": model, "weights": "0123", "dtype": "float32", "items": ITEMS, "task": task, "instruction": ""}
    about |= {"machine": machine, "test_set": {"version": 1, "seed": 2}}
    (path / "sweep.json").write_text(json.dumps({"about": about, "cells": rows, "refused": REFUSED}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return put(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Three tasks of one model: one of them it cannot do, and one method lacks another."""
    path = tmp_path_factory.mktemp("several")
    put(path / "scenes")
    put(path / "needle", "needle", seed=2, cells={c: p for c, p in CELLS.items() if c != Cell("fastv", 0.5)})
    put(path / "existence", "existence", seed=3, shift=-0.4)  # 50 % right, which is chance
    return path


def right(folder, cell):
    """[items, categories] by hand."""
    lines = [json.loads(line) for line in (folder / cell.file).read_text().splitlines()]
    return np.array([[said == truth for _, truth, said in line["answers"]] for line in lines])


def plain(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("</head>", 1)[1].split("<script>")[0]))


def test_numbers_on_the_page(folder, tmp_path):
    files = report.write(folder, tmp_path / "r.html", 0)
    assert files[0].name == "r.html" and all(file.stat().st_size for file in files)
    page = files[0].read_text()
    dense = right(folder, Cell("dense", 1.0))
    best = right(folder, Cell("divprune", 0.5))
    words = plain(page)
    assert f"{100 * dense.mean():.1f}" in words
    for cell in CELLS:
        assert cell.method in words and f"{100 * right(folder, cell).mean():.1f}" in words
    change = 100 * (best.mean() - dense.mean())
    assert f"{change:+.1f}".replace("-", "−") in words or f"{change:+.1f}" in words
    for n in range(len(CATEGORIES)):  # retention of a category
        assert f" {100 * best[:, n].sum() / dense[:, n].sum():.0f} " in words
    assert "fastv at 10 %" in words and "cannot be met" in words
    for fact in ("some-model", "0123", "abc", "float32"):
        assert fact in words


def test_the_page_needs_nothing_else(folder, tmp_path):
    page = report.write(folder, tmp_path / "r.html", 0)[0].read_text()
    for reference in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page):
        assert reference.startswith(("#", "data:")), reference
    assert "@import" not in page and "<b>no</b>" not in page


def test_the_filter_by_hand(folder):
    (one,) = results.load(folder)[0].tasks
    found = results.filtered(one, 0.5)
    dense, small = right(folder, Cell("dense", 1.0)), right(folder, Cell("downsample", 0.5))
    hard, easy = dense & ~small, dense & small
    assert (found["hard"], found["easy"]) == (hard.sum(), easy.sum())
    for method in ("divprune", "fastv", "random"):
        hits = right(folder, Cell(method, 0.5))
        for name, chosen in (("hard", hard), ("easy", easy)):
            assert found["methods"][method][name][0] == pytest.approx(hits[chosen].mean())
    assert results.filtered(one, 0.1) is None  # no smaller picture was tried there


def test_front():
    points = {"a": (0.1, 0.5), "b": (0.2, 0.4), "c": (0.3, 0.8), "d": (0.305, 0.9), "e": (0.9, 0.85)}
    assert results.front(points) == ["a", "d"]  # d costs hardly more than c, and is better
    assert results.front(points, same=0.0) == ["a", "c", "d"]


def test_the_headline_is_the_smallest_budget_worth_having(folder):
    (one,) = results.load(folder)[0].tasks
    row = results.headline(one)
    assert (row["method"], row["budget"]) == ("divprune", 0.5)  # a tenth keeps too little


def test_how_rough_times_are(folder, tmp_path):
    """Told by what dropped nothing; not by a method that acts in decoding, is unknown here, or changed an answer."""
    (one,) = results.load(folder)[0].tasks
    assert results.drift(one) is None
    place = shutil.copytree(folder, tmp_path / "run")
    summary = json.loads((place / "sweep.json").read_text())
    dense = [json.loads(line) for line in (place / "dense@1.jsonl").read_text().splitlines()]
    times = {"random": 0.09, "divprune": 0.12, "core_neurons": 0.3, "fastv": 0.4, "elsewhere": 0.5}
    for name, seconds in times.items():
        lines = [line | {"seconds": seconds, "mean_keep": 1, "flops": 1, "selection_seconds": 0} for line in dense]
        if name == "fastv":
            lines[0] |= {"answers": [[*answer[:2], "maybe"] for answer in lines[0]["answers"]]}
        (place / f"{name}@1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary["cells"].append({"method": name, "budget": 1.0})
    (place / "sweep.json").write_text(json.dumps(summary))
    (two,) = results.load(place)[0].tasks
    assert results.drift(two) == pytest.approx((0.9, 1.2))
    out = tmp_path / "page.html"
    assert CliRunner().invoke(cli.app, ["report", str(place), "--out", str(out), "--gallery", "0"]).exit_code == 0
    assert "What dropped nothing took 0.90 to 1.20 of the dense model’s time" in plain(out.read_text())


def one_line(*arguments):
    result = CliRunner().invoke(cli.app, ["report", *map(str, arguments)])
    assert result.exit_code == 2
    assert len(result.stderr.strip().split("\n")) == 1, result.stderr
    return result.stderr


def test_folders_that_are_none(folder, tmp_path):
    assert "no sweep.json" in one_line(tmp_path)
    (tmp_path / "about.json").write_text("{}")
    assert "not finished" in one_line(tmp_path)
    (tmp_path / "sweep.json").write_text("[]")
    assert "not one that" in one_line(tmp_path)
    summary = json.loads((folder / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps(summary))
    assert "lacks dense@1.jsonl" in one_line(tmp_path)
    for cell in CELLS:
        text = (folder / cell.file).read_text()
        (tmp_path / cell.file).write_text(text if cell.method != "fastv" else text[: len(text) // 2])
    assert "not complete (fastv@0.5.jsonl lacks items)" in one_line(tmp_path)


def test_command(folder, tmp_path):
    out = tmp_path / "deep" / "page.html"
    result = CliRunner().invoke(cli.app, ["report", str(folder), "--out", str(out), "--gallery", "0"])
    assert result.exit_code == 0, result.output
    assert out.is_file() and str(out) in result.output.replace("\n", "")


def test_the_overview_against_counting_by_hand(several):
    (model,) = results.load(several)
    assert [run.about["task"] for run in model.tasks] == ["existence", "needle", "scenes"]
    assert [run.about["task"] for run in model.telling] == ["needle", "scenes"]  # the third is at chance
    row = model.rows[Cell("divprune", 0.5)]
    kept = {}
    for task in ("needle", "scenes"):
        best, dense = (right(several / task, Cell(*cell)) for cell in (("divprune", 0.5), ("dense", 1.0)))
        kept[task] = best.sum() / dense.sum()
        assert row["tasks"][task] == pytest.approx(kept[task])
    assert row["retention"] == pytest.approx(sum(kept.values()) / 2)
    assert row["mean_keep"] == pytest.approx(0.5) and row["flops"] == pytest.approx(0.6)
    assert row["interval"][0] < row["retention"] < row["interval"][1]
    assert "retention" not in model.rows[Cell("fastv", 0.5)]  # it did not run on needle
    assert results.overall(model)["method"] == "divprune" and results.overall(model)["budget"] == 0.5


def test_the_interval_of_a_mean_against_redrawing_by_hand(several):
    (model,) = results.load(several)
    row, rng, means = model.rows[Cell("random", 0.5)], np.random.default_rng(7), []
    runs = [
        [right(several / t, Cell(*c)).sum(1) for c in (("random", 0.5), ("dense", 1.0))] for t in ("needle", "scenes")
    ]
    for _ in range(4000):
        shares = []
        for ours, dense in runs:
            picks = rng.integers(ITEMS, size=ITEMS)
            shares.append(sum(ours[i] for i in picks) / sum(dense[i] for i in picks))
        means.append(sum(shares) / 2)
    assert row["interval"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)


def test_ties(tmp_path):
    """Two methods of equal answers are tied, a much worse one is not."""
    cells = {Cell("dense", 1.0): 0.95, Cell("divprune", 0.5): 0.9, Cell("random", 0.5): 0.3}
    for task, seed in (("scenes", 1), ("needle", 2)):
        place = put(tmp_path / task, task, seed=seed, cells=cells)
        shutil.copy(place / "divprune@0.5.jsonl", place / "fastv@0.5.jsonl")
        summary = json.loads((place / "sweep.json").read_text())
        summary["cells"].append({"method": "fastv", "budget": 0.5})
        (place / "sweep.json").write_text(json.dumps(summary))
    (model,) = results.load(tmp_path)
    best = model.best(0.5)
    assert (best["method"], results.tied_overall(model, best)) == ("divprune", ["fastv"])
    assert results.paired(best, model.rows[Cell("fastv", 0.5)])["difference"] == 0


def test_one_folder_is_a_list_of_one(folder, several, tmp_path):
    """The tab of a task is the same, alone or among others."""
    tab = lambda page: re.search(r'<article class=tab id="some-model-scenes">.*?</article>', page, re.DOTALL).group()
    one = report.write(folder, tmp_path / "one.html", 0)
    many = report.write(several, tmp_path / "many.html", 0)
    words = [re.sub(r"<figure>.*?</figure>", "", tab(files[0].read_text()), flags=re.DOTALL) for files in (one, many)]
    assert words[0] == words[1]
    assert "some-model-overview" not in one[0].read_text()
    page = many[0].read_text()
    assert page.count("<article") == 3 and page.index("some-model-overview") < page.index("some-model-needle")
    assert "some-model-existence" not in page  # chance
    overview = plain(page).split("Where the numbers come from")[0]
    row = results.load(several)[0].rows[Cell("divprune", 0.5)]
    assert f"{100 * row['retention']:.1f}" in overview and "On existence the dense model is not above" in overview
    assert [file.name for file in many] == ["many.html", "many-tokens.png", "many-flops.png"]


def test_several_models(several, tmp_path):
    shutil.copytree(several, tmp_path / "a")
    put(tmp_path / "b" / "scenes", model="other/model", seed=5)
    found = results.load(tmp_path)
    assert [(model.name, len(model.tasks)) for model in found] == [("some-model", 3), ("other/model", 1)]
    files = report.write(tmp_path, tmp_path / "r.html", 0)
    page = files[0].read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for reference in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page):
        assert reference.startswith(("#", "data:")), reference
        assert not reference.startswith("#") or reference[1:] in ids
    assert all(file.parent == tmp_path and file.stat().st_size for file in files)
    put(tmp_path / "c" / "scenes", seed=6)
    with pytest.raises(InvalidValue, match="scenes of some-model twice"):
        results.load(tmp_path)


def test_clips_are_strips():
    """Pictures over a clip's frames: the dense model and each method, frames side by side."""
    from vtok.eval.pages import gallery as report_gallery

    model, processor = tiny("qwen2_5_vl")
    frames = tuple(picture(84, 84, seed) for seed in range(4))
    item = Item(0, "video", frames, (Question("moved", "Which moves?", "ball"),), fps=4.0)
    drawn = report_gallery.panels(model, processor, item, ["divprune", "downsample"], 0.5)
    assert drawn.width > 400 and len(drawn.getcolors(1 << 24)) > 100


# --- docs/choosing.md

CARDS = Path(zoo.path("vtok-tiny-llava-next")).parent


def test_the_page_on_choosing_is_what_the_committed_results_say():
    written = CARDS.parent / "docs" / "choosing.md"
    if not written.is_file():
        pytest.skip("not a checkout")
    assert written.read_text() == choosing.page(CARDS)


def test_the_committed_answers_are_those_of_the_cards():
    archive = CARDS.parent / "docs" / "sweep.tar.xz"
    if not archive.is_file():
        pytest.skip("not a checkout")
    with tarfile.open(archive) as answers:
        inside = {
            tuple(name.split("/")[1:3]): json.load(answers.extractfile(name))
            for name in answers.getnames()
            if name.endswith("/sweep.json")
        }
    cards = {(file.parts[-3], file.stem): json.loads(file.read_text()) for file in CARDS.glob("*/sweep/*.json")}
    assert inside == cards and len(cards) > 10


def summed(folder, target):
    """The summary of a folder of answers, as it is committed."""
    (run,) = results.load(folder)[0].tasks
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"about": run.about, "cells": list(run.rows.values()), "refused": run.refused}))


def test_choices_by_hand(several, tmp_path):
    for task in ("scenes", "needle", "existence"):
        summed(several / task, tmp_path / "some-model" / "sweep" / f"{task}.json")
    found = evidence.read(tmp_path)
    assert [(e.task, e.telling) for e in found] == [("existence", False), ("needle", True), ("scenes", True)]
    choice = choosing.choose(found, 0.5)
    shares = [
        right(several / t, Cell("divprune", 0.5)).mean() / right(several / t, Cell("dense", 1.0)).mean()
        for t in ("needle", "scenes")
    ]
    assert choice.method == "divprune" and choice.kept.share == pytest.approx(np.mean(shares))
    assert "fastv" not in choice.tied  # it did not run on all
    assert choosing.choose(found, 0.5, lambda name: name == "random").method == "random"
    assert choosing.choose(found, 0.3) is None
    text = choosing.page(tmp_path)
    assert "| not measured |" in text and "vLLM" in text


def test_those_tied_are_paired(tmp_path):
    """Intervals to dense that overlap, but one method is right wherever the other is and on some items more."""
    cells = {Cell("dense", 1.0): 0.95, Cell("divprune", 0.5): 0.7, Cell("random", 0.5): 0.65}
    place = put(tmp_path / "run", cells=cells)
    lines = [json.loads(line) for line in (place / "divprune@0.5.jsonl").read_text().splitlines()]
    for n, name in ((6, "fastv"), (1, "tome")):
        worse = [
            line | {"right": [False] * len(line["right"])} if any(line["right"]) and i < n else line
            for i, line in enumerate(lines)
        ]
        (place / f"{name}@0.5.jsonl").write_text("".join(json.dumps(line) + "\n" for line in worse))
    summary = json.loads((place / "sweep.json").read_text())
    summary["cells"] += [{"method": name, "budget": 0.5} for name in ("fastv", "tome")]
    (place / "sweep.json").write_text(json.dumps(summary))
    summed(place, tmp_path / "cards" / "some-model" / "sweep" / "scenes.json")
    (e,) = evidence.read(tmp_path / "cards")
    assert e.kept("fastv", 0.5).high > e.kept("divprune", 0.5).low
    lost = right(place, Cell("divprune", 0.5))[:6].sum() / right(place, Cell("dense", 1.0)).sum()
    assert e.lead("divprune", "fastv", 0.5).share == pytest.approx(lost)
    choice = choosing.choose([e], 0.5)
    assert choice.method == "divprune" and "tome" in choice.tied and "fastv" not in choice.tied


def test_a_task_with_no_right_answer_decides_nothing(several, tmp_path):
    cards = tmp_path / "cards"
    summed(several / "scenes", cards / "some-model" / "sweep" / "scenes.json")
    summed(put(tmp_path / "never", "needle", shift=-1.0), cards / "some-model" / "sweep" / "needle.json")
    text = choosing.page(cards)
    assert "answers 0.0 % (0.0 to 0.0). It is not above chance" in " ".join(text.split())
    assert text.partition("## The numbers")[2].count("| `divprune` |") == 1  # the table of the other


def test_intervals_of_means():
    a, b = evidence.Kept(0.8, 0.7, 0.9), evidence.Kept(0.6, 0.4, 0.8)
    mean = evidence.mean([a, b])
    assert mean.share == pytest.approx(0.7)
    assert mean.high - mean.share == pytest.approx((0.1**2 + 0.2**2) ** 0.5 / 2)


def test_one_layout_of_summaries(folder, tmp_path):
    """A single file of a model, a file a task, and folders of `vtok eval` are read alike."""
    summed(folder, tmp_path / "x" / "sweep.json")
    summed(folder, tmp_path / "y" / "sweep" / "scenes.json")
    summed(folder, tmp_path / "z" / "scenes" / "sweep.json")
    for name in "xyz":
        assert len(results.summaries(tmp_path / name)) == 1
    assert len(results.summaries(tmp_path)) == 3
    assert "no summaries" in one_line(tmp_path / "x" / "nowhere", "--choosing", tmp_path / "c.md")
