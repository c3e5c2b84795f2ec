"""`keep="auto"`: each picture keeps what its own redundancy asks for; `vtok calibrate` finds the setting."""

import json

import numpy as np
import pytest
import torch
from contract import one_line_error, picture, tiny
from PIL import Image
from typer.testing import CliRunner

import vtok
from vtok import cli
from vtok.calibration import SAMPLE, needed, spectrum
from vtok.errors import InvalidValue, Unsupported
from vtok.eval.results import calibrate
from vtok.eval.results.calibrate import KEEPS, Seen
from vtok.eval.tasks.answers import answer
from vtok.eval.tasks.task import Item, Question
from vtok.prompts import ask, encode
from vtok.stages.pre_llm import place
from vtok.types import Layout, Plane

KEPT = (0.1, 0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def llava():
    return tiny("llava_next", layers=2)


def written(folder, model, **changed):
    file = folder / "calibration.json"
    content = {"method": "divprune", "scale": 1.0, "keeps": KEPT, "loss": 0.02}
    file.write_text(json.dumps(content | {"width": model.config.text_config.hidden_size} | changed))
    return file


def by_hand(x, variance):
    """By numpy's SVD: components until that share of the variance, over the tokens."""
    x = x.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    squares = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    return (1 + int((squares.cumsum() / squares.sum() < variance).sum())) / len(x)


@pytest.mark.parametrize("variance", [0.3, 0.8, 0.95])
def test_needed_against_an_svd(variance):
    torch.manual_seed(0)
    mixed = torch.randn(3, 30, 6) @ torch.randn(3, 6, 40) + 0.1 * torch.randn(3, 30, 40)
    found = needed(spectrum(mixed), variance).tolist()
    assert found == pytest.approx([by_hand(x, variance) for x in mixed])
    assert found[0] < 6.5 / 30 or variance == 0.95


def test_equal_tokens_need_one_and_everything_needs_all():
    assert needed(spectrum(torch.ones(1, 8, 4)), 0.99).tolist() == [1 / 8]
    assert needed(spectrum(torch.zeros(1, 8, 4)), 0.99).tolist() == [1 / 8]
    assert needed(spectrum(torch.randn(1, 1, 4)), 0.5).tolist() == [1.0]
    assert spectrum(torch.randn(1, 3 * SAMPLE, 4)).shape == (1, SAMPLE)


def test_each_picture_keeps_what_a_call_of_its_own_keeps(llava, tmp_path):
    """Two pictures in one prompt, one alone, and a batch: the keep of each is that of its features, and what stays is
    what that keep alone would leave."""
    model, processor = llava
    plain, rich = Image.new("RGB", (128, 96), (200, 10, 10)), picture(96, 128)
    file = written(tmp_path, model)
    inputs = encode(processor, [ask("Why?", plain, rich), ask("Why?", rich)])
    seen = calibrate.Watcher()
    with vtok.patch(model, seen), torch.no_grad():
        model(**inputs, use_cache=True)
    needs = [float(needed(x)) for x in seen.seen]
    keeps = [min(keep for keep in KEPT if keep >= need**0.5) for need in needs]
    assert keeps[0] < keeps[1] == keeps[2]
    with vtok.patch(model, "divprune", keep="auto", calibration=file) as patch, torch.no_grad():
        auto = model(**inputs, use_cache=True).logits
        kept = patch.trace.n_kept
        assert kept == [int(k * n + 1e-9) for k, n in zip(keeps, patch.trace.n_visual)]
        with patch.using(keep=keeps):
            assert torch.equal(model(**inputs, use_cache=True).logits, auto)
        with patch.using(keep=0.5):
            model(**inputs, use_cache=True)
            assert patch.trace.n_kept == [n // 2 for n in patch.trace.n_visual]


def test_it_is_saved_composed_and_replayed(llava, tmp_path):
    model, processor = llava
    inputs = encode(processor, [ask("Why?", Image.new("RGB", (128, 96)), picture(96, 128))])
    auto = vtok.DivPrune(keep="auto", calibration=written(tmp_path, model))
    with vtok.patch(model, [auto, vtok.SnapKV(keep=0.5)]) as patch, torch.no_grad():
        expected = model(**inputs, use_cache=True).logits
        record = patch.trace.kept()
        patch.save(tmp_path / "vtok.json")
        with patch.replaying(record):
            assert torch.equal(model(**inputs, use_cache=True).logits, expected)
    with vtok.patch(model, config=tmp_path / "vtok.json"), torch.no_grad():
        assert torch.equal(model(**inputs, use_cache=True).logits, expected)


def test_what_cannot_be_is_said(llava, tmp_path):
    model, processor = llava
    with pytest.raises(InvalidValue, match="vtok calibrate MODEL --compressor divprune"):
        vtok.patch(model, "divprune", keep="auto")
    with pytest.raises(InvalidValue, match="of divprune, not of uniform"):
        vtok.patch(model, "uniform", keep="auto", calibration=written(tmp_path, model))
    with pytest.raises(InvalidValue, match="keep must be"):
        vtok.patch(model, "fastv", keep="auto")
    with pytest.raises(InvalidValue, match="keep must be"):
        vtok.patch(model, "divprune", keep="automatic")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InvalidValue, match="not written by"):
        vtok.DivPrune(keep="auto", calibration=tmp_path / "other.json")
    wide = vtok.DivPrune(keep="auto", calibration=written(tmp_path, model, width=7))
    with vtok.patch(model, wide), pytest.raises(InvalidValue, match="7 wide"):
        model(**encode(processor, [ask("Why?", picture(96, 128))]), use_cache=True)
    with pytest.raises(Unsupported, match="for_each"):
        place(wide, torch.zeros(1, 4, 8), Layout((Plane(2, 2),)))


# ---- calibrating -----------------------------------------------------------------------------------------------------
def made(components, lost_below, questions=2):
    """An item of one picture that needs so many of 100 components, and loses all below a keep."""
    return Seen((components / 100,), np.array([[int(keep < lost_below)] * questions for keep in KEEPS]))


def test_settings_by_hand():
    """Simple pictures need 1 of 100 components and lose below a tenth; rich ones need 16 and lose below .4."""
    seen = [made(1, 0.1)] * 150 + [made(16, 0.4)] * 50
    by_scale, by_keep = calibrate.settings(seen)
    auto, fixed = calibrate.last_within(by_scale, 0.02), calibrate.last_within(by_keep, 0.02)
    assert 0.75 < auto.scale <= 1.0  # .75 of the root of .16 is .3
    assert (auto.kept, auto.lost) == (pytest.approx((150 * 0.1 + 50 * 0.4) / 200), 0.0)
    assert (fixed.keep, fixed.lost) == (0.4, 0.0)
    assert calibrate.last_within(by_keep, 0.35).keep == 0.1  # a quarter of the questions lost, at most .3 by redrawing
    assert by_keep[-1].lost == 1.0


def test_the_walk_stops_at_the_first_that_loses_too_much():
    at = lambda bound, keep: calibrate.Setting(keep, bound, bound, keep=keep)
    assert calibrate.last_within([at(0.0, 1.0), at(0.05, 0.5), at(0.01, 0.25)], 0.02).keep == 1.0
    assert calibrate.last_within([at(0.0, 1.0), at(0.01, 0.5), at(0.05, 0.25)], 0.02).keep == 0.5


def test_a_bound_knows_what_so_few_items_cannot_show():
    nothing = [np.zeros(3)] * 59
    assert calibrate.bound(nothing) == pytest.approx(0.05, abs=0.001)  # .95 ** 59 = .0485
    some = [np.array([1.0])] * 5 + [np.array([0.0])] * 95
    assert 0.08 < calibrate.bound(some) < 0.1  # .05 and 1.64 standard errors of .0218


def test_an_item_of_several_pictures_is_judged_on_the_careful_side():
    item = Seen((0.01, 0.16), np.zeros((len(KEEPS), 1)))
    assert item.keeps(1.0) == [0.1, 0.4] and KEEPS[item.at(1.0)] == 0.1


def test_losses_with_and_without_a_right_answer():
    item = Item(0, "image", (), tuple(Question("", "?", a) for a in ("red", "red", "red", "", "")))
    dense, said = ["Red.", "blue", "red", "a cat", "a cat"], ["blue", "red", "red", "A cat", "a dog"]
    assert calibrate.losses(item, dense, said) == [1, -1, 0, 0, 1]


def test_what_is_lost_on_items_that_were_held_out(llava, tmp_path):
    """Against keeps by hand: of each picture's own spectrum, and the fixed one; answers that differ are lost."""
    model, processor = llava
    questions = tuple(Question("", text, "") for text in ("Why?", "What is it?", "How many are there?"))
    drawn = [Image.new("RGB", (128, 96), (20 * i, 10, 10)) if i % 2 else picture(96, 128, seed=i) for i in range(10)]
    items = [Item(i, "image", (image,), questions) for i, image in enumerate(drawn)]
    file, steps = written(tmp_path, model), []
    found = json.loads(file.read_text()) | {"fixed": {"keep": 0.25}, "asked": {"options": {}}, "rounds": {"0": "kept"}}
    result = calibrate.held_out(model, processor, found, file, items, lambda: steps.append(1))
    assert json.loads(file.read_text()) == json.loads(json.dumps(result)) and result["rounds"] == {"0": "kept"}
    assert len(steps) == 10 and not vtok.patching._PATCHES.get(model.model)

    def by_hand(keeps):
        lost, kept = [], []
        for item, keep in zip(items, keeps):
            dense = answer(model, processor, item)
            with vtok.patch(model, "divprune", keep=keep) as patch:
                lost.append([a != b for a, b in zip(answer(model, processor, item), dense)])
                kept.append(sum(patch.trace.n_kept) / sum(patch.trace.n_visual))
        return np.array(lost), kept

    seen = calibrate.Watcher()
    with vtok.patch(model, seen), torch.no_grad():
        for item in items:
            model(**encode(processor, [ask("Why?", *item.images)]), use_cache=True)
    own = [min(keep for keep in KEPT if keep >= float(needed(x)) ** 0.5) for x in seen.seen]
    assert len(set(own)) > 1
    for kind, keeps in (("auto", own), ("fixed", [0.25] * 10)):
        lost, kept = by_hand(keeps)
        told = result["held_out"][kind]
        assert (told["items"], told["kept"]) == (10, pytest.approx(np.mean(kept)))
        assert told["lost"] == pytest.approx(lost.mean())
        assert told["interval"][0] <= told["lost"] <= told["interval"][1]
    assert result["held_out"]["fixed"]["lost"] > 0
    few = calibrate.held_out(model, processor, found, file, items[:2], lambda: None)
    assert few["held_out"]["auto"]["interval"] is None  # too few


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_command_on_ones_own_pictures(llava, tmp_path):
    model, processor = llava
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture(96, 128).save(tmp_path / "a.png")
    Image.new("RGB", (128, 96)).save(tmp_path / "b.png")
    lines = [{"image": f"{name}.png", "question": f"Why {i}?"} for name in "ab" for i in range(2)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["calibrate", str(tmp_path / "model"), "--data", str(tmp_path / "mine.jsonl"), "--device", "cpu"]

    def run(*more):
        result = CliRunner().invoke(cli.app, [*words, "--out", str(tmp_path / "c.json"), *more])
        return result.exit_code, result.output

    one_line_error(*run("--loss", "0.02"), "2 items cannot show")
    code, output = run("--loss", "0.9", "--compressor", "uniform")
    assert code == 0, output
    found = json.loads((tmp_path / "c.json").read_text())
    assert (found["method"], found["asked"]["items"], found["questions"]) == ("uniform", 2, 4)
    tried = found["tried"]
    del found["rounds"]["1"]  # killed before the second
    (tmp_path / "c.json").write_text(json.dumps(found))
    assert run("--loss", "0.95", "--compressor", "uniform")[0] == 0
    assert json.loads((tmp_path / "c.json").read_text())["tried"] == tried
    one_line_error(*run("--loss", "0.9"), "of a run that was asked for")
    with vtok.patch(model, "uniform", keep="auto", calibration=tmp_path / "c.json"):
        model(**encode(processor, [ask("Why?", picture(96, 128))]), use_cache=True)
    one_line_error(*run("--compressor", "fastv", "--loss", "0.9"), "before the language model, and fastv")
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, [line | {"question": "?"} for line in lines])))
    one_line_error(*run("--loss", "0.9", "--compressor", "uniform"), "of a run that was asked for")
    (tmp_path / "mine.jsonl").write_text('{"question": "Why?"}')
    one_line_error(*run(), "Line 1 of")
    one_line_error(*run("--loss", "2"), "--loss is a share")
    one_line_error(*run("--compressor", "uniform,random"), "No compressor is named")
