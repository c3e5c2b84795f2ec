"""The example of GRPO on clips, and the page of trainers: what is theirs alone."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("trl")


def example():
    file = Path(__file__).parents[1] / "examples" / "video_grpo.py"
    spec = importlib.util.spec_from_file_location("video_grpo", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_method_that_is_farther_than_dense_is_named():
    from recipes.trainers import HALF, _against_dense

    dense = [0.05 + 0.001 * i for i in range(10)]
    rows = {"dense a": dense, "like": [x + 0.0005 for x in dense], "far": [x + 0.02 for x in dense]}
    said = _against_dense({name: {"family": "a", HALF: values} for name, values in rows.items()})
    assert "`far`" in said and "`like`" not in said and "2 methods" in said
