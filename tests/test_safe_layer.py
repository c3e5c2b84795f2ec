"""vtok probe: its AUC by loops and by the unpatched model's attention, its needed tokens by hand, and what methods do
with the layer that it found."""

import json

import numpy as np
import pytest
import torch
from contract import picture, tiny
from typer.testing import CliRunner

import vtok
from vtok import cli
from vtok.errors import InvalidValue
from vtok.eval.results import probe
from vtok.eval.tasks.task import Question
from vtok.types import Layout, Plane


def test_auc_by_loops():
    torch.manual_seed(0)
    for _ in range(20):
        score, wanted = torch.randint(0, 5, (12,)).float(), torch.rand(12) < 0.4
        wanted[0], wanted[1] = True, False
        pairs = [(a, b) for a in score[wanted].tolist() for b in score[~wanted].tolist()]
        assert probe.auc(score, wanted) == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))


def test_needed_tokens():
    layout = Layout((Plane(2, 2, "thumbnail"), Plane(4, 4)))  # of a picture of 40 x 40: cells of 20 and of 10 pixels
    flat = lambda boxes: probe.needed(layout, (40, 40), boxes).nonzero().flatten().tolist()
    assert flat([(0, 0, 20, 20)]) == [0, 4, 5, 8, 9]
    assert flat([(31, 21, 38, 28)]) == [3, 4 + 11]  # it holds the middle of a small cell and none of a large one
    assert flat([(0, 0, 4, 4), (36, 36, 40, 40)]) == [0, 3, 4, 19]


def test_curves_are_of_the_models_own_attention():
    model, processor = tiny("llava", "eager")
    shown = picture(56, 56)  # 4 x 4 cells of 14 pixels
    boxes = [((0, 0, 0, 28, 14),), ((0, 30, 44, 40, 54),)]
    asked = probe.Asked("made", (shown,), tuple(Question("", text, "", box) for text, box in zip("ab", boxes)))
    found = probe.look(model, processor, asked, probe.methods(["fastv", "schedule"]))
    for q, wanted in enumerate(([0, 1], [14])):
        inputs = probe.encode(processor, [probe.ask(asked.questions[q].text, shown)])
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True).attentions
        visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
        behind = list(range(int(visual[-1]) + 1, inputs["input_ids"].shape[1]))
        mask = torch.zeros(16, dtype=torch.bool).index_fill_(0, torch.tensor(wanted), True)
        for layer in range(3):
            mean = maps[layer][0].mean(0)
            assert found["fastv"][q, layer] == pytest.approx(probe.auc(mean[-1, visual], mask), abs=1e-6)
            summed = mean[behind][:, visual].sum(0)
            assert found["schedule"][q, layer] == pytest.approx(probe.auc(summed, mask), abs=1e-6)


def test_the_earliest_safe_layer():
    assert probe.earliest([0.5, 0.9, 0.6, 0.9, 0.9], 0.85) == 1  # of six layers a tenth is one
    long = [0.9 if i in (4, 10, 11, 12, 13) else 0.5 for i in range(29)]
    assert probe.earliest(long, 0.85) == 10  # layer 4 is alone
    assert probe.earliest([0.5] * 7, 0.85) is None


def written(tmp_path, **safe):
    told = {name: {"auc": [0.4, 0.7, 0.9], "safe": layer} for name, layer in safe.items()}
    file = tmp_path / "probe.json"
    file.write_text(json.dumps({"layers": 4, "safe": 0.85, "methods": told}))
    return file


def test_auto_takes_the_layer_from_the_file(tmp_path):
    file = written(tmp_path, fastv=1, dart=0, core_tokens=1, schedule=1, aim_prune=None)
    assert vtok.FastV(layer="auto", probe=file).layer == 2  # as many layers see all tokens: 0 and 1
    assert vtok.DART(layer="auto", probe=file).layer == 1
    assert vtok.CoreTokens(layer="auto", probe=file).layer == 1  # the layer that decides
    assert vtok.CoreMatching(layer="auto", probe=file).parts()[0].layer == 1
    assert vtok.Schedule(first_full="auto", probe=file).first_full == 2
    model, _ = tiny("llava")
    with vtok.patch(model, "fastv", layer="auto", probe=file) as patch:
        assert "layer=2" in repr(patch)
    with vtok.patch(model, "fastv", layer="auto", probe=file, budget=0.75) as patch:
        assert "layer=2" in repr(patch)
    with pytest.raises(InvalidValue, match="have to see all tokens, so a budget of 0.4 cannot be met"):
        vtok.patch(model, "fastv", layer="auto", probe=file, budget=0.4)


def test_auto_without_a_layer_to_take(tmp_path):
    with pytest.raises(InvalidValue, match="layer='auto' needs the file of a probe: run `vtok probe MODEL"):
        vtok.FastV(layer="auto")
    with pytest.raises(InvalidValue, match="no layer is safe for fastv: its score reaches an AUC of 0.90 at best"):
        vtok.FastV(layer="auto", probe=written(tmp_path, fastv=None))
    with pytest.raises(InvalidValue, match="does not know dart"):
        vtok.DART(layer="auto", probe=written(tmp_path, fastv=1))
    with pytest.raises(InvalidValue, match="cannot be read"):
        vtok.FastV(layer="auto", probe=tmp_path / "absent.json")
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(InvalidValue, match="was not written by `vtok probe`"):
        vtok.FastV(layer="auto", probe=tmp_path / "other.json")
    model, _ = tiny("llava", layers=5)
    with pytest.raises(InvalidValue, match="4 decoder layers, and this one has 5"):
        vtok.patch(model, "fastv", layer="auto", probe=written(tmp_path, fastv=1))


def test_command_line(tmp_path):
    pytest.importorskip("matplotlib")
    picture(128, 64).save(tmp_path / "a.png")
    line = {"image": "a.png", "question": "What is it?", "boxes": [[0, 0, 20, 20]]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line) + "\n")

    def invoke(*words):
        words = ["probe", "vtok-tiny-llava-next", "--out", tmp_path / "out", "--threads", 1, *words]
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    done = invoke("--boxes", tmp_path / "mine.jsonl", "--methods", "fastv,core_tokens:reference=last")
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert told["layers"] == 8 and told["questions"] == {"mine.jsonl": 1}
    assert list(told["methods"]) == ["fastv", "core_tokens:reference=last"]
    assert all(len(one["auc"]) == 7 and 0 <= np.min(one["auc"]) <= 1 for one in told["methods"].values())
    assert (tmp_path / "out" / "probe.png").stat().st_size > 10_000
    (tmp_path / "mine.jsonl").write_text('{"image": "a.png", "question": "What?"}\n')
    for words, complaint in (
        (("--boxes", tmp_path / "mine.jsonl"), "Line 1 of"),
        (("--methods", "divprune"), "divprune ranks no tokens inside the decoder"),
        (("--safe", 0.2), "above 0.5"),
        (("--tasks", "needle_text"), "shows a words"),
    ):
        done = invoke(*words)
        assert done.exit_code == 2 and complaint in done.output, done.output
