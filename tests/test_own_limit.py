"""The limit of a family's own processor as a baseline: counts, costs, and that nothing is left of it."""

import json

import pytest
import torch
from contract import picture, tiny
from typer.testing import CliRunner

import vtok
from vtok import cli, zoo
from vtok.errors import Unsupported
from vtok.eval.results import own_limit, sweep
from vtok.eval.results.cells import OWN_LIMIT, Cell, baselines, cells
from vtok.eval.tasks.answers import answer, read
from vtok.eval.tasks.task import Item, Question, tasks

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "glm4v", "internvl", "llava_next", "llava_onevision")


def items(*sizes, questions=2):
    """One picture each."""
    asked = tuple(Question("colour", f"What is {n}?", "red") for n in range(questions))
    return [Item(i, "image", (picture(*size, seed=i),), asked) for i, size in enumerate(sizes)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, *tiny(request.param)


def settings(processor, model):
    parts = (processor.image_processor, getattr(processor, "video_processor", None), model.config)
    names = ("size", "max_patches", "image_grid_pinpoints")
    return [str(getattr(part, name, None)) for part in parts for name in names]


def test_the_largest_setting_within_the_budget(family):
    _, model, processor = family
    asked, before = items((224, 112), (112, 224), (196, 196)), settings(processor, model)
    limit = own_limit.of(model, processor)
    count = lambda item: own_limit.cost(model, processor, item).visual
    whole = [count(item) for item in asked]
    place = own_limit.fit(model, processor, asked, 0.7)
    kept = []
    for at in (place - 1, place):
        with limit.at(at):
            assert settings(processor, model) != before or at == 0
            kept.append(sum(count(item) / n for item, n in zip(asked, whole)) / len(asked))
    assert kept[1] <= 0.7 < kept[0]
    with pytest.raises(Unsupported, match="smallest limit"):
        own_limit.fit(model, processor, asked, 1e-4)
    with pytest.raises(RuntimeError), limit.at(place):
        raise RuntimeError
    assert settings(processor, model) == before


def test_costs_are_those_of_a_trace(family):
    """Limited and not, against the engine's count of what it sees go by."""
    _, model, processor = family
    (item,) = items((224, 112))
    place = own_limit.fit(model, processor, [item], 0.7)

    def seen():
        inputs = read(processor, item).to(model.device)
        with vtok.patch(model, "uniform", keep=1.0) as patch, torch.inference_mode():
            model(**inputs, use_cache=True)
            flops = patch.trace.flops()["dense"]
            return sum(patch.trace.n_visual), int(patch.trace.tokens.sum()), flops["encoder"] + flops["prefill"]

    told = lambda: tuple(vars(own_limit.cost(model, processor, item)).values())
    assert told() == (whole := seen())
    with own_limit.of(model, processor).at(place):
        assert told() == (less := seen())
    with own_limit.applied(model, processor, [item], 0.7) as spared:
        parts = spared(item)
    assert (parts["mean_keep"], parts["cache"], parts["flops"]) == tuple(a / b for a, b in zip(less, whole))
    assert parts["mean_keep"] <= 0.7


def test_it_is_what_a_user_would_set():
    """Qwen's `max_pixels`, at the call."""
    model, processor = zoo.load("vtok-tiny-qwen2.5-vl")
    (item,) = tasks()["needle"].held_out(1)
    with own_limit.applied(model, processor, [item], 0.25):
        pixels = processor.image_processor.size.longest_edge
        said, ids = answer(model, processor, item), read(processor, item)["input_ids"]
    by_hand = processor.image_processor(images=list(item.images), max_pixels=pixels, min_pixels=256)
    rows, cols = by_hand["image_grid_thw"][0, 1:].tolist()
    assert (ids[0] == model.config.image_token_id).sum() == rows * cols // 4 <= 256 // 4
    processor.image_processor.size = {"longest_edge": pixels, "shortest_edge": 256}
    assert answer(model, processor, item) == said


def test_a_clip_has_fewer_pixels_a_frame():
    model, processor = tiny("qwen2_5_vl")
    clip = Item(0, "video", tuple(picture(112, 112, i) for i in range(4)), (Question("a", "What?", "b"),), fps=2.0)
    whole = own_limit.cost(model, processor, clip)
    with own_limit.applied(model, processor, [clip], 0.5) as spared:
        assert 0 < spared(clip)["mean_keep"] <= 0.5
        assert read(processor, clip)["video_grid_thw"][0, 0] == 2
    assert own_limit.cost(model, processor, clip) == whole


def test_families_without_one_are_refused():
    for name in ("llava", "gemma3", "smolvlm"):
        assert "has no limit" in own_limit.refusal(*tiny(name), items((112, 112)), 0.5)


def test_it_stands_in_the_sweep(tmp_path):
    assert OWN_LIMIT in baselines() and OWN_LIMIT not in baselines(pictures=False)
    assert Cell(OWN_LIMIT, 0.5) in cells(None, [0.5]) and Cell(OWN_LIMIT, 0.5) not in cells(None, [0.5], pictures=False)
    words = ["eval", "--model", "vtok-tiny-internvl", "--tasks", "scenes", "--items", "2", "--budgets", "0.5,0.1"]
    result = CliRunner().invoke(cli.app, [*words, "--methods", "own_limit", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "scenes" / "sweep.json").read_text())
    rows = {(row["method"], row["budget"]): row for row in summary["cells"]}
    assert set(rows) == {("dense", 1.0), ("own_limit", 0.5)}
    assert 0 < rows["own_limit", 0.5]["mean_keep"] <= 0.5 and rows["own_limit", 0.5]["flops"] < 0.6
    (refused,) = summary["refused"]
    assert refused["method"] == "own_limit" and "cannot be met" in refused["reason"]
    assert sweep.untouched(Cell(OWN_LIMIT, 0.5), {0: {"mean_keep": 1.0}}) == 0  # small pictures stay as they are
