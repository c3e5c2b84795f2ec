"""`vtok report`: its numbers against counting by hand, one folder against several, a page that needs nothing else."""

import ast
import io
import json
import math
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from contract import picture, tiny
from rich.console import Console
from typer.testing import CliRunner

from vtok import cli, zoo
from vtok.compressor import load_all
from vtok.errors import InvalidValue
from vtok.eval.pages import card_tables, choosing, drawings, page
from vtok.eval.results import results, statistics, verdicts
from vtok.eval.results.cells import Cell, baselines, smaller_picture
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


def put(path, task="scenes", model="some-model", seed=1, cells=CELLS, shift=0.0, items=ITEMS, kinds=None, commit="abc"):
    """A finished run with made-up answers: right ones are "yes". kinds: share of right ones, times a cell's."""
    path.mkdir(parents=True, exist_ok=True)
    rng, kinds = np.random.default_rng(seed), kinds or dict.fromkeys(CATEGORIES[task], 1.0)
    for cell, share in cells.items():
        lines = []
        for item in range(items):
            draws = [rng.random() < share * part + shift for part in kinds.values()]
            answers = [[c, "yes", "yes" if ok else "<b>no</b>"] for c, ok in zip(kinds, draws)]
            line = {"item": item, "seconds": 0.1, "answers": answers, "right": [said == "yes" for *_, said in answers]}
            if cell.method != "dense":
                line |= {"mean_keep": cell.budget, "flops": cell.budget + 0.1, "selection_seconds": 0.001}
            lines.append(json.dumps(line))
        (path / cell.file).write_text("\n".join(lines) + "\n")
    machine = {"machine": "a CPU x 2", "load": "0.1", "commit": commit, "command": "vtok eval", "threads": "1"}
    about = {"model": model, "weights": "0123", "dtype": "float32", "items": items, "task": task, "instruction": ""}
    about |= {"machine": machine, "test_set": {"version": 1, "seed": 2}}
    (path / "sweep.json").write_text(json.dumps({"about": about}))
    return sum_up(path)


def sum_up(place):
    """Write sweep.json anew from the answers that lie beside it, as `vtok eval` does."""
    about = json.loads((place / "sweep.json").read_text())["about"]
    files = sorted(place.glob("*.jsonl"), key=lambda file: not file.name.startswith("dense"))
    cells = [Cell(file.stem.partition("@")[0], float(file.stem.partition("@")[2])) for file in files]
    lines = {c: dict(enumerate(map(json.loads, f.read_text().splitlines()))) for c, f in zip(cells, files)}
    refused = {Cell(row["method"], row["budget"]): row["reason"] for row in REFUSED}
    (place / "sweep.json").write_text(json.dumps(results.summarise(about, lines, {}, refused)))
    return place


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
    found = verdicts.filtered(one, 0.5)
    dense, small = right(folder, Cell("dense", 1.0)), right(folder, Cell("downsample", 0.5))
    hard, easy = dense & ~small, dense & small
    assert (found.hard, found.easy) == (hard.sum(), easy.sum())
    for method in ("divprune", "fastv", "random"):
        hits = right(folder, Cell(method, 0.5))
        for number, chosen in zip(found.methods[method], (hard, easy)):
            assert number.at == pytest.approx(hits[chosen].mean())
            assert number.span[0] <= number.at <= number.span[1]
    assert verdicts.filtered(one, 0.1) is None  # no smaller picture was tried there


def test_front():
    points = {"a": (0.1, 0.5), "b": (0.2, 0.4), "c": (0.3, 0.8), "d": (0.305, 0.9), "e": (0.9, 0.85)}
    assert verdicts.front(points) == ["a", "d"]  # d costs hardly more than c, and is better
    assert verdicts.front(points, same=0.0) == ["a", "c", "d"]


def test_the_headline_is_the_smallest_budget_worth_having(folder):
    (one,) = results.load(folder)[0].tasks
    row = verdicts.headline(one)
    assert (row.method, row.budget) == ("divprune", 0.5)  # a tenth keeps too little


def test_how_rough_times_are(folder, tmp_path):
    """Told by what dropped nothing; not by a method that acts in decoding, is unknown here, or changed an answer."""
    (one,) = results.load(folder)[0].tasks
    assert verdicts.drift(one) is None
    place = shutil.copytree(folder, tmp_path / "run")
    dense = [json.loads(line) for line in (place / "dense@1.jsonl").read_text().splitlines()]
    times = {"random": 0.09, "divprune": 0.12, "core_neurons": 0.3, "fastv": 0.4, "elsewhere": 0.5}
    for name, seconds in times.items():
        lines = [line | {"seconds": seconds, "mean_keep": 1, "flops": 1, "selection_seconds": 0} for line in dense]
        if name == "fastv":
            lines[0] |= {"answers": [[*answer[:2], "maybe"] for answer in lines[0]["answers"]]}
        (place / f"{name}@1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sum_up(place)
    (two,) = results.load(place)[0].tasks
    assert verdicts.drift(two) == pytest.approx((0.9, 1.2))
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
    assert "no summary that" in one_line(tmp_path)
    summary = json.loads((folder / "sweep.json").read_text())
    for row in summary["cells"]:
        row["items"] = row.pop("right")  # as an earlier version wrote it
    (tmp_path / "sweep.json").write_text(json.dumps(summary))
    assert "no summary that" in one_line(tmp_path)
    summary = json.loads((folder / "sweep.json").read_text())
    summary["cells"][1]["right"] = summary["cells"][1]["right"][:20]
    (tmp_path / "sweep.json").write_text(json.dumps(summary))
    assert "not complete" in one_line(tmp_path)
    summary["cells"] = summary["cells"][:1]
    (tmp_path / "sweep.json").write_text(json.dumps(summary))
    assert "not complete" in one_line(tmp_path)


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
        (run,) = (run for run in model.tasks if run.about["task"] == task)
        assert row.tasks[run].at == pytest.approx(kept[task])
    assert row.kept.at == pytest.approx(sum(kept.values()) / 2)
    assert row.mean_keep == pytest.approx(0.5) and row.flops == pytest.approx(0.6)
    assert row.kept.span[0] < row.kept.at < row.kept.span[1]
    assert model.rows[Cell("fastv", 0.5)].kept is None  # it did not run on needle
    assert verdicts.overall(model).method == "divprune" and verdicts.overall(model).budget == 0.5


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
    assert row.kept.span == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)


def test_ties(tmp_path):
    """Two methods of equal answers are tied, a much worse one is not."""
    cells = {Cell("dense", 1.0): 0.95, Cell("divprune", 0.5): 0.9, Cell("random", 0.5): 0.3}
    for task, seed in (("scenes", 1), ("needle", 2)):
        place = put(tmp_path / task, task, seed=seed, cells=cells)
        shutil.copy(place / "divprune@0.5.jsonl", place / "fastv@0.5.jsonl")
        sum_up(place)
    (model,) = results.load(tmp_path)
    best = model.best(0.5)
    assert (best.method, verdicts.tied(model.at(0.5), best)) == ("divprune", ["fastv"])
    assert (best.kept - model.rows[Cell("fastv", 0.5)].kept).at == 0


def test_one_folder_is_a_list_of_one(folder, several, tmp_path):
    """The tab of a task is the same, alone or among others."""
    tab = lambda page: re.search(r'<article class=tab id="some-model-scenes">.*?</article>', page, re.DOTALL).group()
    one = report.write(folder, tmp_path / "one.html", 0)
    many = report.write(several, tmp_path / "many.html", 0)
    words = [re.sub(r"<figure>.*?</figure>", "", tab(files[0].read_text()), flags=re.DOTALL) for files in (one, many)]
    assert words[0] == words[1].replace("scenes/sweep.json", "sweep.json")  # but for the file
    assert "some-model-overview" not in one[0].read_text()
    page = many[0].read_text()
    assert page.count("<article") == 3 and page.index("some-model-overview") < page.index("some-model-needle")
    assert "some-model-existence" not in page  # chance
    overview = plain(page).split("Where the numbers come from")[0]
    row = results.load(several)[0].rows[Cell("divprune", 0.5)]
    assert f"{100 * row.kept.at:.1f}" in overview and "On existence the dense model is not above" in overview
    assert [file.name for file in many] == ["many.html", "many-tokens.png", "many-flops.png"]


def test_several_models(several, tmp_path):
    shutil.copytree(several, tmp_path / "a")
    put(tmp_path / "b" / "scenes", model="other/model", seed=5)
    found = results.load(tmp_path)
    assert [(model.model, len(model.tasks)) for model in found] == [("other/model", 1), ("some-model", 3)]
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


# --- paired tests


def test_mcnemar_and_holm_by_hand():
    by_hand = lambda b, w: min(1.0, 2 * sum(math.comb(b + w, k) for k in range(min(b, w) + 1)) / 2 ** (b + w))
    for better, worse in ((0, 0), (3, 0), (5, 5), (12, 30), (36, 11), (1, 9)):
        assert statistics.mcnemar(better, worse) == pytest.approx(by_hand(better, worse))
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.random(9) ** 4
        # the least level at which Holm's step-down procedure rejects each
        levels = np.linspace(0, 1, 2001)
        least = np.ones(9)
        for level in levels[::-1]:
            for step, i in enumerate(np.argsort(p)):
                if p[i] > level / (9 - step):
                    break
                least[i] = level
        assert statistics.holm(p) == pytest.approx(least, abs=1e-3)
    assert statistics.holm([]) == []


def test_paired_tests_against_counting_by_hand(several, tmp_path):
    (found,) = results.load(several)
    tests = {(one.method, one.budget): one for one in verdicts.paired(found, "random")}
    assert set(tests) == {("downsample", 0.5), ("divprune", 0.5), ("fastv", 0.5), ("divprune", 0.1)}
    one = tests["divprune", 0.5]
    by_hand = [
        [right(several / task, Cell(name, 0.5)) for name in ("divprune", "random")] for task in ("needle", "scenes")
    ]
    assert one.better == sum(int((a & ~b).sum()) for a, b in by_hand)
    assert one.worse == sum(int((b & ~a).sum()) for a, b in by_hand)
    assert one.tasks == ("needle", "scenes") and one.questions == 150  # existence tells nothing
    assert one.verdict == 1 and one.p == pytest.approx(
        4 * statistics.mcnemar(one.better, one.worse)
    )  # the surest of four
    gain = (one.better - one.worse) / one.questions
    low, high = one.difference.span
    gaps = np.concatenate([(a.astype(float) - b).mean(1) for a, b in by_hand])
    assert one.difference.at == pytest.approx(gain) and low < gain < high
    assert high - low == pytest.approx(2 * 1.96 * gaps.std() / len(gaps) ** 0.5, rel=0.3)
    assert tests["fastv", 0.5].tasks == ("scenes",) and tests["fastv", 0.5].questions == 90
    assert (page.words.default_of("some-model"), page.words.default_of("vtok-tiny-internvl")) == ("divprune",) * 2
    put(tmp_path / "b" / "scenes", model="b")
    shutil.copytree(several / "scenes", tmp_path / "a" / "scenes")
    both = results.load(tmp_path)
    with pytest.raises(InvalidValue, match="one model"):
        verdicts.paired(results.Several([r for model in both for r in model.tasks]), "random")


def test_a_difference_that_one_of_both_does_not_see_is_none():
    number = lambda low: statistics.Number(0.1, np.linspace(low, 0.2, 1000))
    verdict = lambda p, low: verdicts.Paired("a", 0.5, ("scenes",), 100, 20, 10, number(low), p).verdict
    assert [verdict(0.01, 0.02), verdict(0.06, 0.02), verdict(0.01, -0.1)] == [1, 0, 0]
    assert verdicts.Paired("a", 0.5, ("scenes",), 9, 5, 0, statistics.Number(0.5), 0.01).verdict == 0


def test_pages_say_who_is_not_better_than_the_default(tmp_path):
    """With the counts that the test is made of."""
    kinds = dict.fromkeys(("colour", "shape", "count", "digit"), 1.0)
    cells = {Cell("dense", 1.0): 1.0, Cell("divprune", 0.25): 0.5, Cell("random", 0.25): 0.45, Cell("fastv", 0.25): 1.0}
    place = put(tmp_path / "run", kinds=kinds, cells=cells, items=20)
    text = " ".join(choosing.page(place).split())
    assert "Better than `divprune`: at 25 % `fastv`. At no budget: `random`." in text
    mine, default = (right(place, Cell(name, 0.25)) for name in ("fastv", "divprune"))
    assert not (default & ~mine).any() and f"| `fastv` | **+{(mine & ~default).sum()} -0**, p < 0.001 | 25 % |" in text
    put(place / "x" / "needle", "needle"), put(place / "x" / "scenes")
    shutil.copytree(place / "x", tmp_path / "several")
    words = plain(report.write(tmp_path / "several", tmp_path / "r.html", 0)[0].read_text())
    assert "Against the default, question by question Each method against divprune" in words


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
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "sweep.json", target)


def test_one_number_has_one_interval():
    """On every page, and whether it is read from the answers or from the cards."""
    docs = CARDS.parent / "docs"
    if not docs.is_dir():
        pytest.skip("not a checkout")
    models = {model.model: model for model in results.load(CARDS)}
    low, high = models["vtok-tiny-internvl"].rows[Cell("divprune", 0.25)].kept.span
    said = f"{100 * low:.1f} to {100 * high:.1f}"
    pages = (docs / "choosing.md", docs / "report.html", CARDS / "vtok-tiny-internvl" / "README.md")
    assert [said in page.read_text() for page in pages] == [True] * 3
    for model in models.values():
        for found in model.tasks:
            for row in found.rows.values():
                assert row.facts["interval"] == pytest.approx(row.accuracy.span), "sum the answers up anew"
                assert row.facts["accuracy"] == row.accuracy.at


def test_choices_by_hand(several, tmp_path):
    for task in ("scenes", "needle", "existence"):
        summed(several / task, tmp_path / "some-model" / "sweep" / f"{task}.json")
    (found,) = results.load(tmp_path)
    assert [(r.about["task"], r.telling) for r in found.tasks] == [
        ("existence", False),
        ("needle", True),
        ("scenes", True),
    ]
    choice = choosing.choose(found, 0.5)
    shares = [
        right(several / t, Cell("divprune", 0.5)).mean() / right(several / t, Cell("dense", 1.0)).mean()
        for t in ("needle", "scenes")
    ]
    assert choice.best.method == "divprune" and choice.best.kept.at == pytest.approx(np.mean(shares))
    assert "fastv" not in choice.tied  # it did not run on all
    assert choosing.choose(found, 0.5, lambda name: name == "random").best.method == "random"
    assert choosing.choose(found, 0.3) is None
    text = choosing.page(tmp_path)
    assert "| not measured |" in text and "vLLM" in text
    assert "some-model, which is not bundled" in " ".join(text.split()) and "toy" not in text


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
    summed(sum_up(place), tmp_path / "cards" / "some-model" / "sweep" / "scenes.json")
    (found,) = results.load(tmp_path / "cards")
    good, bad = (found.tasks[0].rows[Cell(name, 0.5)].kept for name in ("divprune", "fastv"))
    assert bad.span[1] > good.span[0]
    lost = right(place, Cell("divprune", 0.5))[:6].sum() / right(place, Cell("dense", 1.0)).sum()
    assert (good - bad).at == pytest.approx(lost)
    choice = choosing.choose(found, 0.5)
    assert choice.best.method == "divprune" and "tome" in choice.tied and "fastv" not in choice.tied


def test_a_task_with_no_right_answer_decides_nothing(several, tmp_path):
    cards = tmp_path / "cards"
    summed(several / "scenes", cards / "some-model" / "sweep" / "scenes.json")
    summed(put(tmp_path / "never", "needle", shift=-1.0), cards / "some-model" / "sweep" / "needle.json")
    text = choosing.page(cards)
    assert "| `some-model` | `needle` | 30 | 60 | 0.0 (0.0 to 0.0) | 0 of 2 | no: at chance |" in text
    assert "(`needle`) | no recommendation" in text
    (found,) = results.load(cards)
    assert found.rows[Cell("divprune", 0.5)].kept.at == found.tasks[1].rows[Cell("divprune", 0.5)].kept.at


def test_a_budget_at_which_no_baseline_ran_gives_no_verdict(tmp_path):
    place = put(tmp_path / "run", cells=CELLS | {Cell("divprune", 0.3): 0.6})
    summed(place, tmp_path / "cards" / "some-model" / "sweep" / "scenes.json")
    (found,) = results.load(tmp_path / "cards")
    assert "divprune" not in verdicts.hopeless(found.tasks)
    assert choosing.page(tmp_path / "cards")


def test_intervals_of_means():
    """Of two test sets, whose items are redrawn apart: the squares of half-widths add up."""
    rng = np.random.default_rng(0)
    hits = rng.random((2, 200)) < 0.7
    draws = [statistics.redrawn(row[None].astype(float), np.ones((1, 200)), seed)[0] for seed, row in enumerate(hits)]
    one, other = (statistics.Number(row.mean(), drawn) for row, drawn in zip(hits, draws))
    mean = statistics.mean([one, other])
    half = lambda number: (number.span[1] - number.span[0]) / 2
    assert mean.at == pytest.approx(hits.mean())
    assert half(mean) == pytest.approx((half(one) ** 2 + half(other) ** 2) ** 0.5 / 2, rel=0.1)
    assert half(one) == pytest.approx(1.96 * hits[0].std() / 200**0.5, rel=0.1)
    assert (one - one).span == (0, 0)  # paired


def test_one_layout_of_summaries(folder, tmp_path):
    """A single file of a model, a file a task, and folders of `vtok eval` are read alike."""
    summed(folder, tmp_path / "x" / "sweep.json")
    summed(folder, tmp_path / "y" / "sweep" / "scenes.json")
    summed(folder, tmp_path / "z" / "scenes" / "sweep.json")
    for name in "xyz":
        assert len(results.read(tmp_path / name)) == 1
    assert len(results.read(tmp_path)) == 3
    assert "no sweep.json" in one_line(tmp_path / "x" / "nowhere", "--choosing", tmp_path / "c.md")


# --- no verdicts from nothing

FLAWLESS = {Cell("dense", 1.0): 1.0, Cell("random", 0.25): 1.0, Cell("divprune", 0.25): 0.3, Cell("fastv", 0.25): 0.1}
VERDICTS = ("keeps 100.0", "best of", "behind it beyond", "cannot be told", "worth their cost", "No better than")


@pytest.mark.parametrize(("items", "kinds", "enough"), [(4, 1, False), (9, 4, False), (10, 2, False), (10, 3, True)])
def test_few_questions_give_no_verdict(tmp_path, items, kinds, enough):
    """Not on the page, in docs/choosing.md, on a card, or in the terminal."""
    place = put(tmp_path / "run", items=items, kinds=dict.fromkeys(("colour", "shape", "count", "digit")[:kinds], 1.0))
    put(place, items=items, kinds=dict.fromkeys(("colour", "shape", "count", "digit")[:kinds], 1.0), cells=FLAWLESS)
    for file in place.glob("*.jsonl"):
        if Cell(file.stem.partition("@")[0], float(file.stem.partition("@")[2])) not in FLAWLESS:
            file.unlink()
    sum_up(place)
    (found,) = results.load(place)
    (one,) = found.tasks
    assert one.enough == one.telling == one.advises == enough
    assert (verdicts.headline(one) is not None) == (verdicts.overall(found) is not None) == enough
    assert (one.dense.accuracy.span is not None) == (one.dense.facts["interval"] is not None) == enough
    words = plain(report.write(place, tmp_path / "r.html", 0)[0].read_text())
    text = choosing.page(place)
    told = [any(verdict in page for verdict in VERDICTS) for page in (words, text)]
    assert told == [enough, True]  # the second always explains its words
    assert ("Too few questions for a verdict" in words) == ("**No recommendation**" in text) == (not enough)
    assert ("Take `random`" in text) == enough
    summed(place, tmp_path / "card" / "sweep" / "scenes.json")
    line = next(line for line in card_tables.compressed(tmp_path / "card").splitlines() if line.startswith("| `random"))
    assert (" to " in line) == enough
    terminal = Console(width=100, record=True, file=io.StringIO())
    terminal.print(results.table(json.loads((place / "sweep.json").read_text())))
    assert ("too few" in terminal.export_text()) == (not enough)


def test_where_most_kinds_are_at_chance_nothing_is_recommended(tmp_path):
    """Reading pages: headings and fields are read, all else is not, so that the mean of all says little."""
    kinds = {"field": 1.0, "heading": 1.0, "code": 0.0, "cell": 0.0, "total": 0.0}
    place = put(tmp_path / "documents", "documents", kinds=kinds)
    (found,) = results.load(tmp_path)
    (one,) = found.tasks
    assert one.telling and not one.advises and one.answered == ["field", "heading"]
    assert verdicts.headline(one) is None
    words = plain(report.write(place, tmp_path / "r.html", 0)[0].read_text())
    assert "does 2 of 5 kinds of question, so that no method is recommended" in words
    assert "all others are behind" not in words and "cannot be told from" not in words
    text = choosing.page(tmp_path)
    assert "(`documents`) | no recommendation: the dense model answers 2 of 5 kinds |" in text
    put(tmp_path / "documents", "documents", kinds=kinds | {"code": 1.0})
    (found,) = results.load(tmp_path)
    assert found.tasks[0].advises and "| no recommendation" not in choosing.page(tmp_path)


def test_pages_say_what_they_are_written_from(tmp_path):
    put(tmp_path / "a" / "scenes", commit="abc")
    put(tmp_path / "b" / "scenes", model="other", seed=4, commit="def+")
    told = "From 2 files (*/*/sweep.json), whose 180 questions about 60 items were answered at commit def "
    told += "with local changes and abc."
    assert told in " ".join(choosing.page(tmp_path).replace("`", "").split())
    words = plain(report.write(tmp_path, tmp_path / "r.html", 0)[0].read_text())
    assert told in words
    for text in (words, choosing.page(tmp_path)):
        assert "committed" not in text and "model_cards" not in text
    assert "`vtok report model_cards --choosing" in choosing.page(CARDS)


# --- what the page shows


def test_the_page_opens_across_models(several, tmp_path):
    """With all side by side, and what each model, task and method is in a line."""
    shutil.copytree(several, tmp_path / "a")
    for task in ("scenes", "needle"):
        put(tmp_path / "b" / task, task, model="vtok-tiny-internvl", seed=5)
    found = results.load(tmp_path)
    text = report.write(tmp_path, tmp_path / "r.html", 0)[0].read_text()
    assert re.findall(r'<article class=tab id="([^"]+)">', text)[0] == page.ACROSS
    across = text.split("<article")[1]
    line = re.findall(r'<tr data-m="divprune".*?</tr>', across, re.DOTALL)[0]  # of the first table, at a half
    for model in found:
        assert f"<th scope=col><button>{model.model}</button></th>" in across
        assert f">{100 * model.rows[Cell('divprune', 0.5)].kept.at:.0f}</td>" in line
    assert line.count("<td") == len(found)  # and no mean over them
    words = plain(text)
    assert "toy of 4.9 million parameters on drawn scenes" in words.split("Accuracy against cost")[0]
    assert "A toy of 4.9 million parameters, bundled with vtok, of the family internvl." in words
    assert "Not bundled with vtok" in words and "A detail of a few pixels in a large busy picture" in words
    assert "Greedy max-min diversity" in words and "2503.02175" in words


def test_points_that_would_lie_on_each_other_lie_side_by_side():
    point = lambda method, share, cost=0.25: drawings.Point(method, 0.25, cost, share, share - 0.05, share + 0.05)
    points = [point("a", 0.9), point("b", 0.9), point("c", 0.88), point("d", 0.5), point("e", 0.9, 0.5)]
    for kind in drawings.COSTS:
        places = drawings.moved(points, kind, {"a", "b", "c", "d", "e"})
        assert len({round(x, 6) for x in places[:3]}) == 3 and places[3] == pytest.approx(0.25)
        assert max(abs(x - p.cost) for x, p in zip(places, points)) < 0.02
        plain = drawings.moved(points, kind)  # without bars only equal ones are in each other's way
        assert plain[2] == pytest.approx(0.25) and plain[0] != plain[1]


# --- who knows what


def test_evaluation_knows_no_method_by_name():
    """What it must know of one the class says."""
    assert (
        baselines() == ["downsample", "frames", "pool", "random", "sampled_frames", "uniform", "own_limit"]
        and smaller_picture() == "downsample"
    )
    known = set(load_all())
    for module in (results, choosing):
        for file in Path(module.__file__).parent.glob("*.py"):
            strings = {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)}
            assert not known & {text for text in strings if isinstance(text, str)}, file


def test_the_command_says_where_models_run(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("vtok.eval.pages.report.write", lambda *given: seen.append(given[2:]) or [])
    for words in (["--device", "cpu", "--dtype", "bfloat16", "--gallery", "1"], ["--gallery", "0"]):
        assert CliRunner().invoke(cli.app, ["report", str(tmp_path), *words]).exit_code == 0
    assert seen == [(1, "cpu", "bfloat16"), (0, "cpu", None)]
    refused = CliRunner().invoke(cli.app, ["report", str(tmp_path), "--device", "abacus"])
    assert refused.exit_code == 2 and "no device 'abacus'" in refused.output
