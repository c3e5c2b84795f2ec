"""`vtok bench --kernels`."""

import json

import pytest
import torch
from typer.testing import CliRunner

from vtok import cli
from vtok.eval import bench_kernels


def test_exponent():
    sizes = (100, 200, 800)
    assert bench_kernels.exponent(sizes, [3e-7 * n**2 for n in sizes]) == pytest.approx(2)
    assert bench_kernels.exponent(sizes, [5.0] * 3) == pytest.approx(0)


def test_rows_and_file(tmp_path, capsys, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench_kernels, "BAR", 1e9)  # times of so small sizes say nothing
    assert bench_kernels.run(tmp_path / "a" / "k.json", repetitions=2, sizes=(12, 24))
    result = json.loads((tmp_path / "a" / "k.json").read_text())
    names = [row["kernel"] for row in result["kernels"]]
    assert names == list(bench_kernels.works(8, "cpu", torch.float32)) and "farthest_points" in names
    for row in result["kernels"]:
        assert len(row["seconds"]) == 2 and all(0 < t["min"] <= t["median"] <= t["max"] for t in row["seconds"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "times its product at N=24" in printed
    monkeypatch.setattr(bench_kernels, "BAR", 0)
    assert not bench_kernels.run(repetitions=1, sizes=(12, 24))
    assert torch.get_num_threads() == threads


def test_the_command_passes_its_options_on(monkeypatch):
    got = []
    monkeypatch.setattr(bench_kernels, "run", lambda *options: got.append(options) or False)
    arguments = ["bench", "--kernels", "--check", "--repetitions", "3", "--threads", "1"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 1
    assert got == [(None, 3, 1, "cpu", "float32")]
