"""`vtok report`: its numbers against counting by hand, and a page that needs nothing else."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from vtok import cli
from vtok.eval.sweep import Cell

pytest.importorskip("matplotlib")
report = pytest.importorskip("vtok.eval.report")

ITEMS, CATEGORIES = 30, ("colour", "reading", "trend")
CELLS = {
    Cell("dense", 1.0): 0.9,
    Cell("downsample", 0.5): 0.6,
    Cell("random", 0.5): 0.5,
    Cell("divprune", 0.5): 0.85,
    Cell("fastv", 0.5): 0.7,
    Cell("divprune", 0.1): 0.5,
    Cell("random", 0.1): 0.3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run with made-up answers: right ones are "yes"."""
    path, rng = tmp_path_factory.mktemp("sweep"), np.random.default_rng(1)
    rows = []
    for cell, share in CELLS.items():
        lines = []
        for item in range(ITEMS):
            answers = [[c, "yes", "yes" if rng.random() < share else "<b>no</b>"] for c in CATEGORIES]
            line = {"item": item, "seconds": 0.1, "answers": answers, "right": [said == "yes" for *_, said in answers]}
            if cell.method != "dense":
                line |= {"mean_keep": cell.budget, "flops": cell.budget + 0.1, "selection_seconds": 0.001}
            lines.append(json.dumps(line))
        (path / cell.file).write_text("\n".join(lines) + "\n")
        rows.append({"method": cell.method, "budget": cell.budget})
    machine = {"machine": "a CPU x 2", "load": "0.1", "commit": "abc", "command": "vtok eval", "threads": "1"}
    about = {
        "model": "some-model",
        "weights": "0123",
        "dtype": "float32",
        "items": ITEMS,
        "task": "scenes",
        "instruction": "",
        "machine": machine,
    }
    about["test_set"] = {"version": 1, "seed": 2}
    refused = [{"method": "fastv", "budget": 0.1, "reason": "A budget of 0.1 cannot be met."}]
    (path / "sweep.json").write_text(json.dumps({"about": about, "cells": rows, "refused": refused}))
    return path


def right(folder, cell):
    """[items, categories] by hand."""
    lines = [json.loads(line) for line in (folder / cell.file).read_text().splitlines()]
    return np.array([[said == truth for _, truth, said in line["answers"]] for line in lines])


def plain(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("</style>", 1)[1].split("<script>")[0]))


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
    results = report.load(folder)
    found = report.filtered(results, 0.5)
    dense, small = right(folder, Cell("dense", 1.0)), right(folder, Cell("downsample", 0.5))
    hard, easy = dense & ~small, dense & small
    assert (found["hard"], found["easy"]) == (hard.sum(), easy.sum())
    for method in ("divprune", "fastv", "random"):
        hits = right(folder, Cell(method, 0.5))
        for name, chosen in (("hard", hard), ("easy", easy)):
            assert found["methods"][method][name][0] == pytest.approx(hits[chosen].mean())
    assert report.filtered(results, 0.1) is None  # no smaller picture was tried there


def test_front():
    points = {"a": (0.1, 0.5), "b": (0.2, 0.4), "c": (0.3, 0.8), "d": (0.305, 0.9), "e": (0.9, 0.85)}
    assert report.front(points) == ["a", "d"]  # d costs hardly more than c, and is better
    assert report.front(points, same=0.0) == ["a", "c", "d"]


def test_the_headline_is_the_smallest_budget_worth_having(folder):
    results = report.load(folder)
    row = report.headline(results)
    assert (row["method"], row["budget"]) == ("divprune", 0.5)  # a tenth keeps too little


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
