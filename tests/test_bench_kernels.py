"""`vtok bench --kernels`."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vtok import cli, kernels
from vtok.eval.bench import kernels as bench_kernels


def test_exponent():
    sizes = (100, 200, 800)
    assert bench_kernels.exponent(sizes, [3e-7 * n**2 for n in sizes]) == pytest.approx(2)
    assert bench_kernels.exponent(sizes, [5.0] * 3) == pytest.approx(0)


def test_rows_and_file(tmp_path, capsys, monkeypatch):
    threads = torch.get_num_threads()
    bars = lambda bar: {name: (product, bar) for name, (product, _) in bench_kernels.PRODUCT_BARS.items()}
    monkeypatch.setattr(bench_kernels, "PRODUCT_BARS", bars(1e9))  # times of so small sizes say nothing
    assert bench_kernels.run(tmp_path / "a" / "k.json", repetitions=2, sizes=(12, 24))
    result = json.loads((tmp_path / "a" / "k.json").read_text())
    names = [row["kernel"] for row in result["kernels"]]
    assert names == list(bench_kernels.cases(8, "cpu", torch.float32))
    assert {kernel.stem for kernel in Path(kernels.__path__[0]).glob("*_triton.py")} == {
        f"{n}_triton" for n in names[2:]
    }
    assert result["limits"]["operations"] > 0 and result["limits"]["bytes"] > 0
    for row in result["kernels"]:
        assert row["backend"] == "torch" and row["roofline"] > 0
        assert len(row["seconds"]) == 2 and all(0 < t["min"] <= t["median"] <= t["max"] for t in row["seconds"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "times its product at N=24" in printed
    monkeypatch.setattr(bench_kernels, "PRODUCT_BARS", bars(0))
    assert not bench_kernels.run(repetitions=1, sizes=(12, 24))
    assert torch.get_num_threads() == threads


def test_bars_on_a_card():
    """Triton kernels are judged from 2,048 tokens on."""
    times = [{"median": 1.0}]
    held = [name for name, (product, _) in bench_kernels.PRODUCT_BARS.items()]
    names = (bench_kernels.PRODUCT, bench_kernels.WIDE_PRODUCT, *held)
    rows = [{"kernel": name, "backend": "torch", "seconds": times} for name in names]
    rows[-1] = rows[-1] | {"seconds": [{"median": 1.6}]}  # of a product of 1 second
    rows += [
        {"kernel": "merge", "backend": "triton", "seconds": times, "roofline": 0.71},
        {"kernel": "pagerank", "backend": "triton", "seconds": times, "roofline": 0.69},
    ]
    assert [met for met, _ in bench_kernels.bars(rows, 2880)] == [True, True, False, True, False]
    assert len(bench_kernels.bars(rows, 720)) == 3


def test_the_command_passes_its_options_on(monkeypatch):
    got = []
    monkeypatch.setattr(bench_kernels, "run", lambda *options: got.append(options) or False)
    arguments = ["bench", "--kernels", "--check", "--repetitions", "3", "--threads", "1"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 1
    assert got == [(None, 3, 1, "cpu", "float32")]
