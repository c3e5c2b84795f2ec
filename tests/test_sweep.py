"""`vtok eval`: resumable cells, paired summaries, and a run that compresses nothing is no result."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from contract import tiny
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import vtok
from vtok import cli, methods, zoo
from vtok.errors import InvalidValue, UnknownName
from vtok.eval.results import cells, results, sweep
from vtok.eval.results.cells import Cell
from vtok.eval.tasks.answers import answer, say
from vtok.eval.tasks.task import tasks
from vtok.prompts import ask, encode

NAME, TASK = "vtok-tiny-llava-next", tasks()["scenes"]


@pytest.fixture(scope="module")
def loaded():
    return zoo.load(NAME)


def lines(hits, texts="ab"):
    """Fake lines: one item per row of `hits`, one question per entry."""
    right, wrong = texts
    return {
        i: {
            "answers": [["colour", right, right if hit else wrong] for hit in row],
            "right": [bool(hit) for hit in row],
            "seconds": 1.0,
            "mean_keep": 0.25,
            "flops": 0.3,
            "selection_seconds": 0.0,
        }
        for i, row in enumerate(hits)
    }


def test_a_killed_run_goes_on_where_it_was(loaded, tmp_path, monkeypatch):
    model, processor = loaded
    run = lambda out: sweep.run(model, processor, NAME, TASK, ["uniform"], [0.25], 3, out)
    whole = run(tmp_path / "whole")
    out = tmp_path / "killed"
    asked = []
    say = sweep.say

    def dying(*args):
        asked.append(args)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return say(*args)

    monkeypatch.setattr(sweep, "say", dying)
    with pytest.raises(KeyboardInterrupt):
        run(out)
    file = out / Cell("uniform", 0.25).file
    file.write_text(file.read_text() + '{"item": 1, "answ')  # the kill fell into a write
    again = run(out)
    assert len(asked) == 5 + 2  # 3 items dense, 1 and a half compressed; then the missing two
    for summed in (whole["cells"], again["cells"]):
        for row in summed:
            row.pop("seconds"), row.pop("selection_seconds", None)
    assert again["cells"] == whole["cells"]
    assert json.loads((out / "sweep.json").read_text())["cells"][1]["method"] == "uniform"
    assert run(out) and len(asked) == 7  # nothing is done twice


def test_a_template_that_begins_the_sequence_leaves_none_to_add(loaded):
    """As with hub checkpoints whose tokenizer adds the token of its own."""
    processor = copy.deepcopy(loaded[1])
    tok, item = processor.tokenizer, next(iter(TASK.held_out(1)))
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tok.bos_token_id)]
    )
    assert tok("USER: a")["input_ids"][0] == tok.bos_token_id
    asked = [ask(text, *item.images) for text in ("a", "a b")]
    begins = processor.chat_template
    assert begins != begins.removeprefix("{{ '<s>' }}")
    for template in (begins, begins.removeprefix("{{ '<s>' }}")):
        processor.chat_template = template
        ids = encode(processor, asked)["input_ids"]
        assert (ids == tok.bos_token_id).sum(1).tolist() == [1, 1]


def test_results_of_other_weights_are_not_mixed(loaded, tmp_path):
    model, processor = loaded
    sweep.run(model, processor, NAME, TASK, ["uniform"], [0.25], 1, tmp_path)
    other, _ = zoo.load(NAME)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(InvalidValue, match="take another folder"):
        sweep.run(other, processor, NAME, TASK, ["uniform"], [0.25], 1, tmp_path)


def test_what_cannot_be_patched_is_listed_and_a_no_op_is_refused(loaded, tmp_path, monkeypatch):
    model, processor = loaded
    summary = sweep.run(model, processor, NAME, TASK, ["fastv"], [0.1], 1, tmp_path)
    assert [row["method"] for row in summary["cells"]] == ["dense"]
    assert summary["refused"][0]["method"] == "fastv" and "cannot be met" in summary["refused"][0]["reason"]
    monkeypatch.setattr(vtok.Uniform, "with_budget", lambda self, *_: vtok.Uniform(keep=10**6))
    summary = sweep.run(model, processor, NAME, TASK, ["uniform"], [0.25], 1, tmp_path)
    assert [row["method"] for row in summary["cells"]] == ["dense"]
    assert summary["refused"][0]["reason"].startswith("It leaves 1 of the 1 items whole")
    assert not vtok.patching._PATCHES.get(model.model)


def test_a_method_that_says_it_drops_tokens_and_changes_nothing_is_an_error(tmp_path, monkeypatch):
    words = ["eval", "--methods", "uniform,random", "--budgets", "0.25", "--tasks", "scenes", "--items", "2", "--out"]
    monkeypatch.setattr(vtok.Uniform, "with_budget", lambda self, *_: vtok.Uniform(keep=10**6))
    monkeypatch.setattr(vtok.engine.trace.Trace, "mean_keep", 0.25)
    result = CliRunner().invoke(cli.app, [*words, str(tmp_path)])
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and "scenes: uniform at 0.25: It says that it drops tokens, but no answer" in said
    summary = json.loads((tmp_path / "scenes" / "sweep.json").read_text())
    assert [row["method"] for row in summary["cells"]] == ["dense", "random"]
    assert [(row["method"], row["fault"]) for row in summary["refused"]] == [("uniform", True)]
    # Equal answers alone are none: the log-probabilities may differ.
    file = tmp_path / "scenes" / "uniform@0.25.jsonl"
    first, second = map(json.loads, file.read_text().splitlines())
    second["logprobs"][-1] -= 1e-6
    file.write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    assert CliRunner().invoke(cli.app, [*words, str(tmp_path)]).exit_code == 0


def test_how_sure_an_answer_is(loaded):
    """The log-probability of its tokens and of the end, against one forward over prompt and answer."""
    model, processor = loaded
    item = next(iter(TASK.held_out(1)))
    said = say(model, processor, item)
    assert [one.text for one in said] == answer(model, processor, item)
    question = item.questions[0]
    inputs = encode(processor, [ask(question.text, *item.images)])
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        logits = model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0]
    new = ids[0, inputs["input_ids"].shape[1] :]
    expected = logits[-len(new) - 1 : -1].log_softmax(-1)[range(len(new)), new].sum().item()
    assert said[0].logprob == pytest.approx(expected, abs=1e-4) and expected < 0
    assert len({len(one.text) for one in said}) > 1  # shorter ones end before the batch does


def test_a_summary_is_of_all_calls(loaded, tmp_path, monkeypatch):
    """Of the same folder, whatever each asked; with the command of each that asked."""
    model, processor = loaded
    run = lambda names, count=2: sweep.run(model, processor, NAME, TASK, names, [0.25], count, tmp_path)
    for names in (["uniform", "evs"], ["random"], ["uniform"]):
        monkeypatch.setattr(sys, "argv", ["vtok", "eval", *names])
        summary = run(names)
    assert [row["method"] for row in summary["cells"]] == ["dense", "random", "uniform"]
    assert [row["method"] for row in summary["refused"]] == ["evs"]
    commands = [made["command"] for made in [*summary["about"]["earlier"], summary["about"]["machine"]]]
    assert [command.split()[-2:] for command in commands] == [["uniform", "evs"], ["eval", "random"]]
    assert [row["method"] for row in run(["uniform"], 3)["cells"]] == ["dense", "uniform"]  # random lacks the third


def test_a_cell_that_leaves_some_items_whole_is_above_its_budget(tmp_path, monkeypatch):
    """InternVL shows small charts in one view of 64 tokens; GlobalCom2 compresses them too."""
    monkeypatch.setattr(vtok.Uniform, "with_budget", lambda self, *_: vtok.Uniform(keep=64))
    name = "vtok-tiny-internvl"
    summary = sweep.run(*zoo.load(name), name, tasks()["charts"], ["globalcom2", "uniform"], [0.5], 3, tmp_path)
    assert [row["method"] for row in summary["cells"]] == ["dense", "globalcom2"]
    (row,) = summary["refused"]
    assert row["method"] == "uniform" and row["reason"].startswith("It leaves 1 of the 3 items whole")


def test_a_cell_that_cannot_go_so_low_is_above_its_budget(tmp_path):
    """Of four frames one stays, whole."""
    name = "vtok-tiny-qwen2.5-vl"
    named = ["frames", "sampled_frames:keep=0.5+divprune"]
    summary = sweep.run(*zoo.load(name), name, tasks()["video"], named, [0.25, 0.1], 2, tmp_path)
    found = {(row["method"], row["budget"]): row.get("mean_keep") for row in summary["cells"]}
    assert found[named[0], 0.25] == 0.25 and found[named[1], 0.1] == pytest.approx(0.1, abs=0.01)
    (row,) = summary["refused"]
    assert (row["method"], row["budget"]) == ("frames", 0.1) and "keeps 0.250 of the tokens on average" in row["reason"]


def test_a_budget_of_a_composition():
    """It is for the part that was given no keep, which gets what the others leave."""
    model = tiny("qwen2_5_vl")[0]
    of = lambda method, budget: methods.call(model, method, budget=budget)
    (frames, prune), told = of("sampled_frames:keep=0.5+divprune", 0.25)
    assert (frames.keep, prune.keep, told) == (0.5, 0.5, {})
    assert of("sampled_frames:keep=0.5+divprune", 0.5)[0][1].is_identity
    later = of("divprune:keep=0.5+fastv:layer=1", 0.4)[0][1]
    assert later == vtok.FastV(layer=1).with_budget(0.8, len(model.model.language_model.layers))
    assert of("divprune+core_neurons", 0.25)[1] == {"budget": 0.25}  # as before: one of them drops visual tokens
    parts, told = of("divprune+snapkv:keep=0.5", 0.25)  # a share of the cache is none of the visual tokens
    with vtok.patch(model, parts, **told) as patch:
        assert [part.keep for part in patch.compressors] == [0.25, 0.5]
    parts, told = of("sampled_frames:keep=0.5+divprune+snapkv:keep=0.5", 0.25)
    assert [part.keep for part in parts] == [0.5, 0.5, 0.5] and not told
    assert "leave 0.25" in Cell("sampled_frames:keep=0.25+divprune", 0.5).refusal(model)
    assert "each but one" in Cell("sampled_frames:keep=0.5+divprune:keep=0.5", 0.25).refusal(model)


def test_names_and_budgets():
    with pytest.raises(UnknownName, match="no-such"):
        cells.cells(["no-such"], [0.5])
    with pytest.raises(InvalidValue, match="fraction"):
        cells.cells(None, [1.5])
    chosen = cells.cells(None, [0.5, 0.1])
    assert chosen[0] == Cell("dense", 1.0) and len(chosen) == 1 + 2 * (len(cells.training_free()) + 1)
    assert cells.training_free()[:3] == ["downsample", "frames", "pool"]


def test_summary_against_counting_by_hand():
    rng = np.random.default_rng(3)
    dense, method, rival, weak = (rng.random((40, 5)) < p for p in (0.9, 0.7, 0.6, 0.2))
    answers = {
        Cell("dense", 1.0): lines(dense),
        Cell("uniform", 0.25): lines(method),
        Cell("pool", 0.25): lines(rival),
        Cell("random", 0.25): lines(weak),
        Cell("random", 0.5): lines(dense),  # another budget is no rival
    }
    summary = results.summarise({"items": 40, "task": "scenes"}, answers, {}, {})
    found = results.of(summary)
    assert list(found.rows) == list(answers)
    row = found.rows[Cell("uniform", 0.25)]
    assert row.accuracy.at == pytest.approx(method.mean())
    assert found.by_kind(Cell("uniform", 0.25)) == {"colour": pytest.approx(method.mean())}
    assert row.facts["agreement"] == pytest.approx((method == dense).mean())
    assert row.to_dense.at == pytest.approx(method.mean() - dense.mean())
    assert row.kept.at == pytest.approx(method.mean() / dense.mean())
    other = found.rival(row)
    assert other.method == "pool"
    assert (row.accuracy - other.accuracy).at == pytest.approx(method.mean() - rival.mean())
    low, high = row.to_dense.span
    assert low < row.to_dense.at < high < 0
    # the interval of paired differences, from the normal approximation
    spread = 1.96 * (method.sum(1) / 5 - dense.sum(1) / 5.0).std() / 40**0.5
    assert high - low == pytest.approx(2 * spread, rel=0.2)
    same = found.rows[Cell("random", 0.5)].to_dense
    assert same.at == 0 and same.span == (0, 0)
    assert found.questions == [(i, "colour") for i in range(40) for _ in range(5)]


def test_a_broken_compressor_shows(loaded, tmp_path, monkeypatch):
    """Keeping the wrong tokens costs more than the interval of its difference to the same method done right."""
    model, processor = loaded
    count = 10
    right = sweep.run(model, processor, NAME, TASK, ["globalcom2"], [0.25], count, tmp_path / "right")["cells"][1]
    select = vtok.GlobalCom2.select

    def wrong(self, tokens):
        selection = select(self, tokens)
        return vtok.types.Selection(selection.keep.roll(selection.keep.shape[1] // 2, 1), selection.n_kept)

    monkeypatch.setattr(vtok.GlobalCom2, "select", wrong)
    broken = sweep.run(model, processor, NAME, TASK, ["globalcom2"], [0.25], count, tmp_path / "wrong")["cells"][1]
    assert broken["interval"][1] < right["accuracy"]


def test_as_many_items_as_hold_so_many_questions(tmp_path):
    held = [len(item.questions) for item in TASK.held_out(5)]
    assert TASK.items_of(sum(held[:3])) == 3
    assert TASK.items_of(sum(held[:3]) + 1) == 4
    assert TASK.items_of(10**6) == TASK.count
    words = ["eval", "--methods", "uniform", "--budgets", "0.25", "--tasks", "scenes", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.app, [*words, "--questions", str(held[0] + 1)])
    assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "scenes" / "sweep.json").read_text())["about"]
    assert about["items"] == 2
    result = CliRunner().invoke(cli.app, [*words, "--questions", "9", "--items", "2"])
    assert result.exit_code != 0 and "give one of them" in " ".join(result.output.split())


def test_several_models_have_a_folder_each(tmp_path):
    copied = tmp_path / "other-model"
    shutil.copytree(zoo.path(NAME), copied)
    words = ["eval", "--methods", "uniform", "--budgets", "0.25", "--tasks", "scenes", "--items", "1", "--model"]
    result = CliRunner().invoke(cli.app, [*words, f"{NAME},{copied}", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    found = {file.parent.relative_to(tmp_path / "out").as_posix() for file in tmp_path.glob("out/**/sweep.json")}
    assert found == {f"{NAME}/scenes", "other-model/scenes"}
    result = CliRunner().invoke(cli.app, [*words, f"{NAME},there/{NAME}", "--out", str(tmp_path / "clash")])
    assert result.exit_code != 0 and "one folder" in " ".join(result.output.split())


def test_two_processes_give_what_one_gives(tmp_path):
    """Through accelerate, and over what a killed process of another pair left."""
    words = ["eval", "--methods", "uniform", "--budgets", "0.25", "--tasks", "scenes", "--items", "3", "--out"]
    result = CliRunner().invoke(cli.app, [*words, str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    two = tmp_path / "two" / "scenes"
    shutil.copytree(tmp_path / "one" / "scenes", two)
    first, second, third = (two / "uniform@0.25.jsonl").read_text().splitlines(keepends=True)
    (two / "uniform@0.25.jsonl").write_text(second)
    (two / "uniform@0.25.1.jsonl").write_text(first + third[:20])
    (two / "dense@1.jsonl").unlink()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "vtok.cli"]
    done = subprocess.run([*launch, *words, str(tmp_path / "two")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in two.iterdir()) == sorted(
        file.name for file in (tmp_path / "one" / "scenes").iterdir()
    )
    for name in ("dense@1.jsonl", "uniform@0.25.jsonl"):
        one, other = (
            [json.loads(line) for line in (folder / "scenes" / name).read_text().splitlines()]
            for folder in (tmp_path / "one", tmp_path / "two")
        )
        for line in (*one, *other):
            line.pop("seconds"), line.pop("selection_seconds", None)
        assert one == other
    assert done.stdout.count("wrote ") == 1
    typed = " ".join(["torchrun --nproc_per_node 2 -m vtok.cli", *words, str(tmp_path / "two")])
    assert json.loads((two / "sweep.json").read_text())["about"]["machine"]["command"] == typed
    again = CliRunner().invoke(cli.app, [*words, str(tmp_path / "two")])  # finds nothing to do, and changes nothing
    assert again.exit_code == 0, again.output
    assert json.loads((two / "sweep.json").read_text())["about"]["machine"]["command"] == typed


def test_methods_get_the_options_that_a_model_needs(tmp_path):
    """Those for encoders without CLS, and those without which there is no budget."""
    model, clip = tiny("qwen2_5_vl")[0], zoo.load(NAME)[0]
    of = lambda network, method: Cell(method, 0.25).options(network)
    assert of(model, "visionzip") == of(model, "tcc") == {"importance": "received"}
    assert of(clip, "visionzip") == of(clip, "divprune") == {}
    assert of(clip, "tome") == {"carry": True} and of(clip, "fastv:layer=2") == {"layer": 2}
    assert Cell("visionzip", 0.25).refusal(model) is None
    assert "crops" in Cell("globalcom2", 0.25).refusal(model)
    told = ("tcc:contextual=0.2", {"importance": "received"})
    assert cells.calls([told, told, ("fastv", {})]) == ["tcc(importance='received')"]
