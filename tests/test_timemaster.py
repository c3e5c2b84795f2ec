"""TimeMaster: series and their pictures, answers, the reward and its judge, and both stages on the bundled model."""

import json
import math
import socket
import threading
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from vtok.errors import InvalidValue, UnknownName
from vtok.eval.tasks import sources
from vtok.rl import timemaster as tm

GOOD = "<think>flat</think><class>Laptop</class>"


def script():
    file = Path(__file__).parents[1] / "examples" / "timeseries_grpo.py"
    spec = spec_from_file_location("timeseries_grpo", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def series(values, labels, name="mine"):
    return tm.Series(np.asarray(values, dtype=float), tuple(labels), name)


# ---- answers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "total", "form", "label"),
    [
        ("<think>x</think><class>Laptop</class>", 1.0, 1, "Laptop"),
        ("<class> desktop </class>", 0.1, 1, "Desktop"),
        ("Laptop", 0.0, 0, None),
        ("<class>Desktop</class><class>Laptop</class>", 0.1, 1, "Desktop"),
        ("<class>a phone</class><CLASS>\nlaptop\n</CLASS>", 1.0, 1, "Laptop"),  # the first that is a class
    ],
)
def test_the_rules_of_the_code(text, total, form, label):
    """What TimeMaster's ctu.compute_score(text, 'Laptop') gives (spec, 5.7)."""
    reward = tm.TimeMasterReward(["Desktop", "Laptop"], rules="code")
    assert reward(None, [text], ["Laptop"]) == pytest.approx([total])
    assert (reward.read(text).well, reward.read(text).label) == (bool(form), label)


@pytest.mark.parametrize(
    ("text", "well"),
    [
        (GOOD, True),
        (" <think> flat </think>\n<class> laptop </class><|im_end|>\n", True),
        ("<class>Laptop</class>", False),
        ("<class>Laptop</class><think>flat</think>", False),
        ("<think> </think><class>Laptop</class>", False),
        ("<think>flat</think><class></class>", False),
        ("<think>flat</think><class>Phone</class>", False),
        (GOOD + GOOD, False),
        (GOOD + "<class>Desktop</class>", False),
        ("<think>a</think><think>b</think><class>Laptop</class>", False),
        ("<think>a<class>Desktop</class></think><class>Laptop</class>", False),
        (GOOD + " or so", False),
        (GOOD + "<extension>it hums</extension>", False),
        ("<think>flat</think><class>Laptop", False),
    ],
)
def test_the_rules_of_the_paper(text, well):
    found = tm.parse(text, ["Desktop", "Laptop"])
    assert (found.well, found.label) == (well, "Laptop" if well else None)


def test_an_extension_that_was_asked_for_is_needed():
    reads = lambda text: tm.parse(text, ["Desktop", "Laptop"], extension=True)
    assert reads(GOOD + "<extension> it hums </extension>").extension == "it hums"
    assert not reads(GOOD).well and not reads(GOOD + "<extension> </extension>").well
    assert not reads("<extension>it hums</extension>" + GOOD).well


def test_answers_to_imitate_are_read_back():
    text = tm.answer("it rises", "Laptop", "it hums", before=" ")
    assert tm.parse(text, ["Desktop", "Laptop"], extension=True) == tm.Answer("Laptop", True, "it rises", "it hums")
    for wrong in (("", "Laptop"), ("a <class>", "Laptop"), ("x", " ")):
        with pytest.raises(InvalidValue, match="part of an answer is empty or holds a tag"):
            tm.answer(*wrong)


def test_the_prompt_names_classes_and_form():
    asked = tm.question("a leaf", ["oak", "maple", "fir"], extension=True)
    assert "a leaf" in asked and "oak, maple or fir?" in asked
    assert [asked.index(f"<{tag}>") for tag in tm.TAGS] == sorted(asked.index(f"<{tag}>") for tag in tm.TAGS)
    assert "extension" not in tm.question("a leaf", ["oak", "fir"])


# ---- the reward ------------------------------------------------------------------------------------------------------
def said(label, extension="it hums"):
    return [{"role": "assistant", "content": tm.answer("flat", label, extension)}]


def test_the_judge_is_asked_only_about_right_answers():
    seen, logged = [], {}

    def judge(answer, row):
        seen.append((answer.label, answer.extension, row))
        return 0.5

    reward = tm.TimeMasterReward(["a", "b"], judge)
    got = reward(
        prompts=[None] * 3,
        completions=[said("a"), said("b"), [{"role": "assistant", "content": "a"}]],
        label=["a"] * 3,
        insight=["x", "y", "z"],
        image=[object()] * 3,
        log_metric=logged.__setitem__,
    )
    assert got == pytest.approx([0.9 + 0.1 + 0.25, 0.1, 0.0]) and all(type(value) is float for value in got)
    assert seen == [("a", "it hums", {"label": "a", "insight": "x"})]  # no pictures
    assert logged["timemaster/accuracy"] == pytest.approx(1 / 3) and reward.__name__ == "timemaster"


def test_weights_are_an_option():
    reward = tm.TimeMasterReward(["a", "b"], weights=tm.Weights(0.5, 0.25))
    assert reward(None, [tm.answer("x", "b")], ["a"]) == [0.25]
    with pytest.raises(InvalidValue, match="Weights"):
        tm.Weights(-1.0)
    with pytest.raises(InvalidValue, match="none of the reward's classes"):
        reward(None, ["x"], ["c"])


@pytest.mark.parametrize(("says", "score"), [(7.0, 1.0), (-2, 0.0), (1, 1.0), (math.inf, 1.0)])
def test_scores_are_clamped_and_not_asked_for_again(says, score):
    calls = []
    judge = tm.Guarded(lambda answer, row: calls.append(1) or says)
    asked = [(tm.Answer("a", True, "t", "e"), {})]
    assert judge(asked) == judge(asked) == [score] and len(calls) == 1


@pytest.mark.parametrize("says", [None, "0.7", math.nan, True, ValueError("rate limit")])
def test_a_judge_without_a_number_counts_0_with_one_warning(says):
    calls = []

    def broken(answer, row):
        calls.append(1)
        if isinstance(says, Exception):
            raise says
        return says

    judge = tm.Guarded(broken, retries=2)
    twice = lambda: [judge([(tm.Answer("a", True, "t", "e"), {})]) for _ in range(2)]
    with pytest.warns(UserWarning, match="counts 0") as warned:
        assert twice() == [[0.0], [0.0]]
    assert len(calls) == 6 and len(warned) == 1  # no score was remembered


def test_a_judge_that_hangs_is_left():
    calls = []
    hang = lambda answer, row: calls.append(1) or threading.Event().wait()
    judge = tm.Guarded(hang, timeout=0.02, retries=1, patience=3)
    asked = [(tm.Answer("a", True, "t", f"e{i}"), {}) for i in range(2)]
    known = tm.Answer("a", True, "t", "known"), {}
    judge.judge = lambda answer, row: 0.3
    assert judge([known]) == [0.3]
    judge.judge = hang
    with pytest.warns(UserWarning, match=r"no answer within 0\.02 s"):
        assert judge([*asked, known]) == [0.0, 0.0, 0.3]  # what is known does not say that the judge is well
    with pytest.raises(tm.JudgeFailed, match="3 answers in a row, each 2 times"):
        judge(asked)
    assert len(calls) == 8


def test_a_judge_that_comes_back_is_trusted_again():
    answers = iter([None, 0.4, None, 0.8])
    judge = tm.Guarded(lambda answer, row: next(answers), retries=1, patience=1)
    assert [judge([(tm.Answer("a", True, "t", text), {})]) for text in "ef"] == [[0.4], [0.8]]


def test_generic_advice_is_capped():
    judge = tm.capped(lambda answer, row: 0.9)
    score = lambda text: judge(tm.Answer("a", True, "t", text), {})
    assert score("Refer the patient to a specialist for further tests.") == 0.4
    assert score("Bursts of 50 ms at 20 Hz fit a lesion of the nerve.") == 0.9


def test_the_judge_without_a_model():
    row = {"insight": "starts in the top, ends in the bottom"}
    score = lambda text: tm.stated(tm.Answer("a", True, "t", text), row)
    assert score("starts in the top, ends in the bottom") == 1
    assert score("ends in the bottom") == 0.5
    assert score("ends in the bottom, ends in the top, starts in the middle") == 0


@pytest.mark.parametrize("gives", [None, [None, 1.0], [1.0], [math.nan, 0.0]])
def test_a_reward_of_ones_own_is_tried_first(gives):
    with pytest.raises(InvalidValue, match="must return a list with a finite number"):
        tm.check_reward(lambda prompts, completions, **columns: gives, "a")
    tm.check_reward(tm.TimeMasterReward(["a", "b"]), "a")


# ---- series ----------------------------------------------------------------------------------------------------------
def test_aeons_sets_without_the_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    train, test = tm.load("GunPoint")
    assert train.values.shape == (50, 1, 150) and test.values.shape == (150, 1, 150)
    assert [train.labels.count(label) for label in train.classes] == [24, 26] and train.classes == ("gun", "point")
    known = {row.tobytes() for part in sources.SPLITS for row in sources.series(part)}
    assert all(row[0].tobytes() in known for row in train.values)
    train, test = tm.load("BasicMotions")
    assert train.values.shape == test.values.shape == (40, 6, 100) and len(train.classes) == 4
    with pytest.raises(UnknownName, match=r"ArrowHead, .*Did you mean 'GunPoint'"):
        tm.load("GunPiont")
    with pytest.raises(InvalidValue, match="one length, but their channels have 7 to 26 points"):
        tm.load("JapaneseVowels")


ROWS = "label,1,2,3\n" + "".join(f"{'ab'[i % 2]},{i},{i + 1},{-i}\n" for i in range(10))


def test_a_csv_file_of_ones_own(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text(ROWS)
    train, test = tm.load(file, share=0.6)
    assert [len(train), len(test)] == [6, 4] and train.labels.count("a") == 3
    rows = sorted(map(tuple, np.concatenate([train.values, test.values])[:, 0].tolist()))
    assert rows == [(i, i + 1, -i) for i in range(10)]  # each once: nothing tested was trained on
    file.write_text("x:0,x:1,kind,y:0,y:1\n1,2,a,3,4\n5,6,b,7,8\n")
    two = tm.read_csv(file, "kind")
    assert two.values.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]] and two.channels == ("x", "y")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ROWS + "a,1,2\n", "line 12 has 3 cells and the first line 4: series must have one length"),
        (ROWS + "a,1,,3\n", "series 10 has no finite value at point 1 of channel 0"),
        (ROWS + "a,1,NaN,3\n", "no finite value at point 1"),
        (ROWS + "a,inf,2,3\n", "no finite value at point 0"),
        (ROWS + "c,1,2,3\n", "the class 'c' has one series"),
        (ROWS + "A,1,2,3\n", "differ in case alone"),
        (ROWS + ",1,2,3\n", "the label '' of series 10 cannot stand in an answer"),
        (ROWS.replace("b,", "a,"), "all series to train on are of the class 'a'"),
        (ROWS.replace("label", "kind"), "one of them 'label'"),
        ("label,1\na,1\nb,2\n", "at least 2 points"),
        ("", "must name the columns"),
    ],
)
def test_a_bad_file_gets_one_sentence(tmp_path, text, reason):
    file = tmp_path / "own.csv"
    file.write_text(text)
    with pytest.raises(InvalidValue, match=reason):
        tm.load(file)


def test_a_class_that_is_never_seen(tmp_path):
    (tmp_path / "train.csv").write_text(ROWS)
    (tmp_path / "test.csv").write_text(ROWS + "c,1,2,3\n")
    with pytest.raises(InvalidValue, match="the class 'c' is tested and never seen in training, which has a, b"):
        tm.load(tmp_path)
    (tmp_path / "test.csv").write_text("label,1,2\na,1,2\n")
    with pytest.raises(InvalidValue, match=r"\(1, 3\), and those to test on \(1, 2\)"):
        tm.load(tmp_path)


# ---- pictures --------------------------------------------------------------------------------------------------------
def ink(image):
    """Height of the blue curve in each column of a picture, pixels from the top; NaN where there is none."""
    pixels = np.asarray(image, dtype=int)
    blue = (pixels[..., 2] - pixels[..., 0]) > 60
    rows = np.arange(len(pixels))[:, None]
    return np.where(blue.any(0), (blue * rows).sum(0) / np.maximum(blue.sum(0), 1), np.nan)


@pytest.mark.parametrize("plot", [tm.small(128, 64), tm.Plot()])
def test_the_curve_is_the_series(plot):
    values = 2 + np.sin(np.linspace(0, 5, 90))
    heights = ink(tm.render(values[None], plot))
    heights = heights[~np.isnan(heights)]
    drawn = np.interp(np.linspace(0, 1, len(heights)), np.linspace(0, 1, 90), values)
    assert len(heights) > 100 and np.corrcoef(drawn, -heights)[0, 1] > 0.995


def test_a_picture_depends_on_its_series_alone():
    import matplotlib

    values = np.random.default_rng(0).normal(size=(2, 30))
    before = tm.render(values)
    with matplotlib.rc_context({"lines.linestyle": ":", "axes.facecolor": "black", "savefig.dpi": 30}):
        state = dict(matplotlib.rcParams)
        after = tm.render(values)
        assert dict(matplotlib.rcParams) == state
    assert before.tobytes() == after.tobytes() and before.mode == "RGB"
    assert tm.render(values, tm.small(160, 96)).size == (160, 96)
    assert before.tobytes() != tm.render(values[::-1]).tobytes()


def test_flat_series_and_one_scale():
    flat = ink(tm.render(np.ones((1, 20)), tm.small(128, 64)))
    assert np.nanmax(flat) - np.nanmin(flat) < 2
    wave = np.sin(np.linspace(0, 6, 50))[None]
    height = lambda scale: np.nanmax(rows := ink(tm.render(wave, tm.small(128, 64), scale=scale))) - np.nanmin(rows)
    assert height(((-4, 4),)) < 0.4 * height(None)
    assert tm.limits(series([[[1, 2]], [[0, 5]]], "ab")) == ((0, 5),)


# ---- the data set ----------------------------------------------------------------------------------------------------
def test_rows_for_trl():
    values = np.stack([np.arange(30), -np.arange(30)])[:, None]
    own = series(values, ["up", "down"])
    rows = tm.dataset(own, tm.small(64, 32), extension=True)
    assert rows["label"][:] == ["up", "down"] and rows[0]["image"].size == (64, 32)
    assert rows[0]["prompt"] == rows[1]["prompt"]  # says nothing of the row's class
    read = [tm.parse(row["completion"][0]["content"], own.classes, extension=True) for row in rows]
    assert [one.label for one in read] == ["up", "down"]
    assert read[0].think == "highest in the right"
    assert read[1].extension == rows[1]["insight"] == "starts in the top, ends in the bottom"
    with pytest.raises(InvalidValue, match="the class 'up' is not among"):
        tm.dataset(own, classes=("down", "left"))


def test_a_prompt_that_is_too_long():
    from vtok import zoo

    _, processor = zoo.load("vtok-tiny-qwen2.5-vl")
    own = series([[[1, 2, 3]], [[3, 2, 1]]], ["up", "down"])
    rows = tm.dataset(own, tm.small(128, 64), brief=True)
    longest = tm.check_length(rows, processor, 200, 120)
    assert longest - tm.check_length(tm.dataset(own, tm.small(64, 64), brief=True), processor, 200, 120) == 16
    with pytest.raises(InvalidValue, match=f"The prompt has {longest} tokens with its picture"):
        tm.check_length(rows, processor, longest + 119, 120)
    with pytest.raises(InvalidValue, match="An answer to imitate has"):
        tm.check_length(rows, processor, 200, 20)


@pytest.mark.parametrize("name", ["ArrowHead", "BasicMotions"])
def test_what_is_tested_did_not_teach_the_bundled_model(name):
    from vtok.eval.tasks import charts

    train, test = script().unseen(*tm.load(name))
    assert len(train) + len(test) == sum(map(len, tm.load(name))) and set(test.classes) == set(train.classes)
    taught = {row.tobytes() for row in sources.series("train")}
    groups = charts.recordings("train")["BasicMotions"].values()
    taught |= {rows.tobytes() for group in groups for rows, _ in group}
    assert not any(rows[: 3 if len(rows) > 1 else 1].tobytes() in taught for rows in test.values)
    assert any(rows[: 3 if len(rows) > 1 else 1].tobytes() in taught for rows in train.values)


# ---- both stages -----------------------------------------------------------------------------------------------------
def test_both_stages_and_resuming(tmp_path):
    """On a CSV file, patched; a run that was stopped goes on from its checkpoint with the same numbers."""
    file = tmp_path / "own.csv"
    file.write_text("label,1,2,3,4\n" + "".join(f"{'ab'[i % 2]},{i},{i * i},{-i},2\n" for i in range(8)))
    run = script()
    options = {"data": str(file), "out": tmp_path, "sft_steps": 1, "generations": 2, "save_steps": 1, "test_items": 2}
    options |= {"extension": True}
    with pytest.raises(InvalidValue, match="After SFT only 0 % of the answers have the form"):
        run.main(**options, grpo_steps=1)
    results = tmp_path / "results.json"
    results.write_text(results.read_text().replace('"form": 0.0', '"form": 1.0'))  # one step of SFT teaches nothing
    run.main(**options, grpo_steps=1)
    first = json.loads((tmp_path / "results.json").read_text())
    assert first["grpo"]["n"] == 2 and first["majority"] == 0.5 and (tmp_path / "results.png").exists()
    del first["grpo"]
    (tmp_path / "results.json").write_text(json.dumps(first))
    run.main(**options, grpo_steps=2)
    second = json.loads((tmp_path / "results.json").read_text())
    assert second["sft"] == first["sft"]
    assert [row["step"] for row in second["grpo"]["log"]] == [1, 2]
