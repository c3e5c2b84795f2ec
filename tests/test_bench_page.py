"""`vtok bench --page`: the page says what the files hold, and the committed one is current."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vtok import cli
from vtok.eval.bench import page as bench_page
from vtok.eval.bench import rl

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.skipif(not DOCS.is_dir(), reason="not in a checkout")
def test_the_committed_page_is_current(tmp_path):
    shutil.copytree(DOCS / "speed", tmp_path / "speed")
    assert bench_page.write(tmp_path / "speed").read_text() == (DOCS / "speed.md").read_text()


@pytest.mark.skipif(not DOCS.is_dir(), reason="not in a checkout")
def test_numbers_and_the_empty_gpu_table(tmp_path):
    folder = tmp_path / "speed"
    shutil.copytree(DOCS / "speed", folder)
    run = json.loads((folder / "smollm2.json").read_text())
    row = run["results"][-1]["variants"]["divprune 0.25"]
    page = bench_page.write(folder).read_text()
    line = next(line for line in page.splitlines()[::-1] if line.startswith("| `divprune 0.25`"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == f"{1e3 * row['prefill_seconds']['median']:.0f}" and cells[4] == f"{row['speedup']:.2f}"
    assert "Not measured: no GPU has been at hand" in page
    run["machine"] |= {"device": "cuda", "machine": "a card"}
    (folder / "card.json").write_text(json.dumps(run))
    page = bench_page.write(folder).read_text()
    assert "Not measured" not in page and "a card" in page


def test_an_empty_folder_is_one_line(tmp_path):
    result = CliRunner().invoke(cli.app, ["bench", "--page", str(tmp_path)])
    assert result.exit_code == 2 and "holds no results of vtok bench --out" in result.output


def test_a_step_of_grpo(tmp_path):
    """Counted by hand, judged by its bars, and on the page."""
    pytest.importorskip("trl")
    step = rl.Step(answers=2, tokens=3, rounds=1, decoder="toy")
    out = tmp_path / "speed" / "rl.json"
    assert rl.run([256, 576], ["divprune"], [0.25], step, out, threads=1)  # no bar at these sizes
    run = json.loads(out.read_text())
    row = run["rl"][0]["variants"]["divprune 0.25"]

    def operations(n):  # of a decoder of width 64, FFN 172, 4 layers, causal attention
        return 4 * (n * 2 * (4 * 64 * 64 + 3 * 64 * 172) + 4 * 64 * n * (n + 1) / 2)

    total = lambda n: operations(n) + 4 * operations(n + 3) + operations(n + 2) - operations(n)
    assert row["ideal_share"] == pytest.approx(total(64 + 40) / total(256 + 40), rel=0.01)
    assert all(row["seconds"][phase]["median"] > 0 for phase in rl.PHASES)
    page = bench_page.write(out.parent).read_text()
    assert "### 256 visual tokens" in page and "| `divprune 0.25`" in page

    judged = lambda share: [{"visual_tokens": 1024, "variants": {"divprune 0.25": row | {"share": share}}}]
    assert [met for met, _ in rl.bars(judged(0.30)) + rl.bars(judged(0.33))] == [True, False]


def test_cards_of_a_fleet():
    """The committed numbers by hand: H100, dense and compressed."""
    from vtok.eval.bench import fleet

    run = json.loads((DOCS / "speed" / "serve-2880.json").read_text())["serve"]
    rows = {(row[0], row[1]): row[2:] for row in fleet.rows_of(2880, run["results"])}
    one = {name: levels["1"] for name, levels in run["results"].items()}
    shares = {name: (row["first"] / one["dense"]["first"], row["kv"] / one["dense"]["kv"]) for name, row in one.items()}
    for variant, (prefill, cache) in shares.items():
        tokens = 2880 + 64
        reads = prefill * (2 * 6.74e9 * tokens + 32 * 4 * 4096 * tokens * tokens / 2) / (989e12 / 2)
        held = cache * (tokens + 128) * 32 * 2 * 4096 * 2
        room = 80e9 * 0.9 - 6.74e9 * 2
        n = room // held
        writes = 128 * (6.74e9 * 2 + n * held) / (3.35e12 * 0.6) / n
        sees = 2 * 304e6 * 2885 / (989e12 / 2)
        phases = [f"{1e3 * x:.0f}" for x in (sees, reads, writes)]
        rate = 1 / (sees + reads + writes)
        assert rows["H100 SXM", variant] == [*phases, f"{n:.0f}", f"{rate:.1f}", str(-int(-100 // rate))]
