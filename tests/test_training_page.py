"""The recipes of the page of trainings: what they measure, and that the page says what was measured."""

import json
from pathlib import Path

import pytest
import torch
from contract import language_model
from torch import nn

from vtok.eval.tasks import task as offline

pytest.importorskip("trl")
from recipes import alignment, lemo, optimizers, pairs

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "training.md"


def test_pairs_are_of_the_trained_categories_and_no_wrong_answer_is_right(monkeypatch):
    asked = list(pairs.questions("train", 3))
    categories = [q.category for _, q in asked]
    assert categories == categories[:4] * 3 and {*categories} == {"count", "digit", "reading", "adversarial"}
    said = [q.answer if number % 2 else "nothing" for number, (_, q) in enumerate(asked)]
    monkeypatch.setattr(pairs, "own_answers", lambda *_, **__: said)
    rows = pairs.pairs(None, None, "train", 12)
    says = lambda row, column: row[column][0]["content"]
    for (_, q), row, own in zip(asked, rows, said, strict=True):
        assert says(row, "chosen") == q.answer and row["own"] is (own == "nothing")
        assert q.answer not in (says(row, "rejected"), says(row, "rejected_2"))
        assert (says(row, "rejected") == "nothing") is row["own"]


def test_held_out_questions_are_those_of_the_categories():
    (scenes, items), (existence, _) = alignment.held_out("pictures", "trained", 4)
    assert scenes.name == "scenes" and {*scenes.categories} == {"count", "digit", "reading"}
    assert len(items) == 4 and existence.categories == ("adversarial",)
    all_of = offline.get("scenes").test_item(0).questions
    assert [q.text for q in items[0].questions] == [q.text for q in all_of if q.category in scenes.categories]


def test_records_are_sorted_and_every_wrong_answer_is_the_models_own(monkeypatch):
    questions = [pairs.records("train", pairs.SEED, i).questions[0] for i in range(48)]
    for q in questions:
        given, answer = q.text.removeprefix("Sort by name: ").removesuffix(".").split(", "), q.answer.split(", ")
        assert given != answer and {*given} == {*answer} and len(answer) == pairs.RECORDS
        assert answer == sorted(answer) and pairs.SORTING.score(q.answer, f"{q.answer}.")
    assert pairs.records("test", pairs.SEED, 0).questions != pairs.records("train", pairs.SEED, 0).questions
    said = [q.answer if i % 3 else f"{i}" for i, q in enumerate(questions)]
    heard = iter([said[:24], said[24:]])
    monkeypatch.setattr(pairs, "own_answers", lambda *_, **__: next(heard))
    rows = pairs.sorted_wrong(None, None, "train", 10)
    assert [row["rejected"][0]["content"] for row in rows] == [f"{i}" for i in range(0, 30, 3)]
    assert [row["chosen"][0]["content"] for row in rows] == [q.answer for q in questions[:30:3]]


def cells_of(text):
    """Of a table of the page its rows, by loss and learning rate."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return {(line[0], line[1]): dict(zip(lines[0], line)) for line in lines[2:]}


def test_the_table_of_losses():
    run = lambda right, margin: {
        "hits": {"trained": ["".join(map(str, right)), "2222"], "other": ["1111", "1111"]},
        "margin": margin,
        "kl": [0.5, 1.5],
    }
    rounds = {"1 LOGO 0.1 0": run([2, 2, 2, 2], [1, 1]), "1 before 0 0": run([1, 1, 1, 1], [0, 0])}
    rounds |= {"1 DPO 0.1 0": run([2, 1, 1, 1], [1, -1]), "1 DPO 0.01 0": run([0, 0, 0, 0], [-1, -1])}
    rounds |= {"1 DPO 0.1 1": run([2, 2, 2, 1], [3, 1]), "0.5 DPO 0.1 0": run([0, 0, 0, 0], [0, 0])}
    rows = cells_of(alignment.of_keep({"asked": {"beta": 1.0}, "rounds": rounds}, 1.0))
    assert [*rows] == [("before", ""), ("DPO", "0.1"), ("DPO", "0.01"), ("LOGO", "0.1")]
    dpo, logo = rows["DPO", "0.1"], rows["LOGO", "0.1"]
    assert dpo["trained, %"] == "75.0" and dpo["of seeds"] == "62, 88" and dpo["less DPO"] == ""
    assert dpo["in order, %"] == "75" and dpo["margin"].startswith("1.00 (")
    assert rows["DPO", "0.01"]["less DPO"].startswith("-75.0 (")  # DPO is at the rate of its lower loss
    assert logo["less DPO"].startswith("25.0 (") and logo["less before"] == "0.0 (0.0 to 0.0)"
    assert logo["KL"] == "1.00 (0.50 to 1.50)" and logo["other, %"] == "100.0"


def test_the_table_of_a_language_model_has_prose():
    run = lambda prose: {"hits": {"trained": ["01", "11"]}, "margin": [1.0, 2.0], "kl": [0.0, 0.0], "prose": prose}
    rounds = {"1 before 0 0": run([3.0, 3.5]), "1 DPO 0.1 0": run([3.1, 3.6])}
    rows = cells_of(alignment.of_keep({"asked": {"beta": 1.0}, "rounds": rounds}, 1.0))
    assert rows["before", ""]["prose, nats"] == "3.250" and rows["DPO", "0.1"]["prose, nats"] == "3.350"
    assert rows["DPO", "0.1"]["less before"] == "0.100 (0.100 to 0.100)"


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
    for name in ("alignment.json", "records.json"):
        losses = json.loads((DOCS / "training" / name).read_text())
        for keep in {float(name.split()[0]) for name in losses["rounds"]}:
            assert alignment.of_keep(losses, keep) in text
    kinds = json.loads((DOCS / "training" / "optimizers.json").read_text())
    for kind in {name.split()[0] for name in kinds["rounds"]}:
        assert optimizers.of_kind(kinds, kind) in text


# ---- LeMo ------------------------------------------------------------------------------------------------------------
def test_the_recipe_of_lemo_measures_and_goes_on(tmp_path, monkeypatch, capsys):
    letters = lambda text, add_special_tokens: {"input_ids": [ord(c) % 100 for c in text]}
    load = lambda *_: (language_model(100, layers=4, scale=1.0), letters)
    monkeypatch.setattr(lemo.models, "load", load)
    few = lemo.Asked(lengths=(256, 512), repeats=1, steps=3, tokens=256, held=2, lr=1e-2)
    monkeypatch.setattr(lemo, "Asked", lambda: few)
    out = tmp_path / "lemo.json"
    lemo.run(out)
    rounds = json.loads(out.read_text())["rounds"]
    kept = {length: {way: row["bytes"] for way, row in rounds[f"{length} tokens"].items()} for length in few.lengths}
    for some in kept.values():
        assert some["dense"] > some["attention, half"] > some["attention, a quarter"] > some["checkpointing"]
        assert some["layer, half"] > some["layer, a quarter"] and some["attention, half"] > some["layer, half"]
    assert all(kept[512][way] > kept[256][way] for way in lemo.WAYS)
    trained = {way: rounds[f"trained, {way}"] for way in lemo.WAYS if way != "checkpointing"}
    assert all(row["before"] == trained["dense"]["before"] for row in trained.values())  # judged dense
    assert sum(trained["dense"]["after"]) < sum(trained["dense"]["before"])
    assert len({tuple(row["after"]) for row in trained.values()}) == len(trained)
    del rounds["trained, layer, half"]
    out.write_text(json.dumps(json.loads(out.read_text()) | {"rounds": rounds}))
    seen = []
    monkeypatch.setattr(lemo.models, "load", lambda *_: seen.append(1) or load())
    lemo.run(out)
    assert len(seen) == 1 and json.loads(out.read_text())["rounds"]["trained, layer, half"] == trained["layer, half"]
    capsys.readouterr()
    lemo.print_table(out)
    lines = capsys.readouterr().out.splitlines()
    before, after = (sum(trained["dense"][when]) / few.held for when in ("before", "after"))
    assert lines[0].startswith(f"{before:.3f} before") and lines[4].rstrip(" |").endswith(f"{after:.3f}")


def test_the_page_has_the_table_of_lemo(capsys):
    lemo.print_table(DOCS / "training" / "lemo.json")
    assert capsys.readouterr().out.split("\n\n", 1)[1].strip() in (DOCS / "alignment.md").read_text()
