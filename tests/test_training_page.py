"""The recipes of the page of trainings: what they measure, and that the page says what was measured."""

import json
from pathlib import Path

import pytest
import torch
from contract import picture, tiny
from torch import nn

from vtok.eval.tasks import task as offline

pytest.importorskip("trl")
from recipes import alignment, optimizers

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "training.md"


def test_a_tower_looks_at_a_picture_once():
    (model, processor), seen = tiny("qwen2_5_vl", layers=2), []
    tower, look = model.model.visual, processor.image_processor
    parts = [look(picture(56, 84 + 28 * i, i), return_tensors="pt") for i in range(2)]
    first, second = (part["pixel_values"] for part in parts)
    grids = torch.cat([part["image_grid_thw"] for part in parts])
    both = torch.cat([first, second, first]), grids[[0, 1, 0]]
    with torch.no_grad():
        wanted = tower(both[0], grid_thw=both[1]).pooler_output
    forward = tower.forward
    tower.forward = lambda pixels, grid_thw: seen.append(len(grid_thw)) or forward(pixels, grid_thw=grid_thw)
    alignment.see_once(tower)
    with torch.inference_mode():
        tower(first, grid_thw=grids[:1])
    found = tower(*both).pooler_output
    torch.testing.assert_close(found, wanted)
    (found * nn.Parameter(torch.ones(()))).sum().backward()  # what was seen in inference can be trained behind
    assert seen == [1, 1]


def test_pairs_are_of_the_trained_categories_and_no_wrong_answer_is_right(monkeypatch):
    asked = list(alignment.questions("train", 3))
    categories = [q.category for _, q in asked]
    assert categories == categories[:4] * 3 and {*categories} == {"count", "digit", "reading", "adversarial"}
    said = [q.answer if number % 2 else "nothing" for number, (_, q) in enumerate(asked)]
    monkeypatch.setattr(alignment, "own_answers", lambda *_, **__: said)
    rows = alignment.pairs(None, None, "train", 3)
    says = lambda row, column: row[column][0]["content"]
    for (_, q), row, own in zip(asked, rows, said, strict=True):
        assert says(row, "chosen") == q.answer and row["own"] is (own == "nothing")
        assert q.answer not in (says(row, "rejected"), says(row, "rejected_2"))
        assert (says(row, "rejected") == "nothing") is row["own"]


def test_held_out_questions_are_those_of_the_categories():
    (item, *_), task = alignment.held_out("scenes", ("count", "digit"), 4), offline.get("scenes")
    assert {q.category for q in item.questions} <= {"count", "digit"}
    assert [q.text for q in item.questions] == [
        q.text for q in task.test_item(0).questions if q.category in ("count", "digit")
    ]


def test_the_table_of_losses():
    run = lambda right, margin: {
        "hits": {"trained": ["".join(map(str, right)), "2222"], "other": ["1111", "1111"]},
        "margin": margin,
        "kl": [0.5, 1.5],
    }
    rounds = {"1 before 0": run([1, 1, 1, 1], [0, 0]), "1 DPO 0": run([2, 1, 1, 1], [1, -1])}
    rounds |= {"1 DPO 1": run([2, 2, 2, 1], [3, 1]), "1 DPO 2": run([0, 0, 0, 0], [0, 0])}  # of a seed that LOGO lacks
    rounds |= {f"1 LOGO {seed}": run([2, 2, 2, 2], [1, 1]) for seed in (0, 1)}
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in alignment.of_keep({"rounds": rounds | {"0.5 DPO 0": run([0, 0, 0, 0], [0, 0])}}, 1.0).splitlines()
    ]
    rows = {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}
    assert [*rows] == ["before", "DPO", "LOGO"]
    assert rows["DPO"]["trained, %"] == "75.0" and rows["DPO"]["of seeds"] == "62, 88"
    assert rows["DPO"]["in order, %"] == "75" and rows["DPO"]["margin"].startswith("1.00 (")
    assert rows["LOGO"]["less DPO"].startswith("25.0 (") and rows["LOGO"]["less before"] == "0.0 (0.0 to 0.0)"
    assert rows["LOGO"]["KL"] == "1.00 (0.50 to 1.50)"


@pytest.mark.parametrize("name", ["muon", "lion_k", "mezo"])
def test_an_optimiser_of_the_page_trains_all_weights(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x, use_cache):
            return type("Out", (), {"loss": (self.net(x) - 1).square().mean()})

    batch = {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}
    torch.manual_seed(0)
    start = [p.detach().clone() for p in model.parameters()]
    found = optimizers.trained(optimizers.Setting(Line, [batch] * 3, [batch], 4), name, 1e-3)
    assert all(not p.equal(old) for p, old in zip(model.parameters(), start))
    assert len(found["losses"]) == len(found["seconds"]) == 3 and found["weights"] == sum(map(torch.numel, start))
    assert found["before"] == pytest.approx(found["losses"][0], abs=0.05) and found["after"] != found["before"]
    assert (found["state"] == 0) is (name == "mezo")


def test_the_best_learning_rate_is_that_of_the_least_loss():
    row = lambda after: {"after": after}
    rounds = {"text lion 0.1": row(2.0), "text lion 0.2": row(1.0), "text lion 0.3": row(float("nan"))}
    found = optimizers.best({"rounds": rounds | {"pictures lion 0.4": row(0.0)}}, "text")
    assert found == {"lion": ("0.2", row(1.0))}


def test_the_page_has_the_tables_that_the_commands_print():
    text = PAGE.read_text()
    losses = json.loads((DOCS / "training" / "alignment.json").read_text())
    for keep in {float(name.split()[0]) for name in losses["rounds"]}:
        assert alignment.of_keep(losses, keep) in text
    kinds = json.loads((DOCS / "training" / "optimizers.json").read_text())
    for kind in {name.split()[0] for name in kinds["rounds"]}:
        assert optimizers.of_kind(kinds, kind) in text
