"""The example of GRPO on clips, and the page of trainers: what is theirs alone."""

import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")


def example():
    file = Path(__file__).parents[1] / "examples" / "video_grpo.py"
    spec = importlib.util.spec_from_file_location("video_grpo", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_asks_and_rewards():
    """Of the chosen kinds alone, one question a clip; and the gain by hand."""
    found, kinds = example(), ("event", "zoom")
    rows = found.questions("val", 2, {*kinds})
    items = (found.TASK.item("val", found.SEED, i) for i in itertools.count())
    having = ((item, q) for item in items for q in item.questions if q.category in kinds)
    for row, (item, q) in zip(rows, having):
        assert (row["prompt"], row["answer"]) == ([{"role": "user", "content": q.text}], q.answer)
        assert (len(row["video"]), row["fps"]) == (found.FRAMES, item.fps)
    assert len(rows) == 2
    said = [[{"role": "assistant", "content": text}] for text in ("In.", "out")]
    assert found.right(said, ["in", "in"]) == [1.0, 0.0]
    record = lambda text: SimpleNamespace(predicted=text, answer="in")
    gain = found.gain([record("in"), record("out"), record("out")], [record("in"), record("in"), record("out")])
    assert gain["accuracy"] == pytest.approx(1 / 3) and gain["low"] <= 1 / 3 <= gain["high"] and gain["p"] == 1


def test_a_method_that_is_farther_than_dense_is_named():
    from recipes.trainers import HALF, _against_dense

    dense = [0.05 + 0.001 * i for i in range(10)]
    rows = {"dense a": dense, "like": [x + 0.0005 for x in dense], "far": [x + 0.02 for x in dense]}
    said = _against_dense({name: {"family": "a", HALF: values} for name, values in rows.items()})
    assert "`far`" in said and "`like`" not in said and "2 methods" in said
