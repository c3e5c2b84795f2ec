"""Training runs that stop and go on. Run by `test_recipes.py` in a process of its own."""

import json

import pytest
import torch

from recipes import internvl, llava_next, loop, qwen2_5_vl
from recipes.loop import Team
from recipes.recipe import train
from vtok import zoo
from vtok.eval.pages import cards, task_card
from vtok.eval.results import judge
from vtok.eval.tasks import task as offline


@pytest.mark.parametrize("family", [llava_next, qwen2_5_vl, internvl], ids=["llava", "qwen", "internvl"])
def test_task_training_resumes_where_it_stopped(tmp_path, family):
    """And what it writes loads through the Auto classes, is judged, and gets its card."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    recipe = family.Recipe(
        tasks={"scenes": (1.0, 1), "charts": (1.0, 2)}, words=8, tower_steps=2, steps=3, parts=1, start=""
    )
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    lines = []
    train(family.FAMILY, whole, recipe, workers=1, check=1, log=lines.append)
    train(family.FAMILY, halves, recipe, workers=1, check=1, stop_after=3, log=lines.append)
    train(family.FAMILY, halves, recipe, workers=1, check=1, log=lines.append)
    one, two = (torch.load(loop.state_file(folder)) for folder in (whole, halves))
    assert any("resumed at stage 1, step 1" in line for line in lines)
    assert one["pictures"] == two["pictures"] >= 5
    for name, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][name], rtol=0, atol=1e-6)

    model = AutoModelForImageTextToText.from_pretrained(halves, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(halves)
    assert model.config.model_type in task_card.ARCHITECTURES
    assert (halves / "model.safetensors").stat().st_size < 11.5e6
    some = {name: offline.get(name) for name in ("scenes", "charts")}
    result = judge.report(model.eval(), processor, some, count=1, robbed=1, learn=4)
    assert set(result["tasks"]) == set(some)
    assert result["overall"]["n"] == sum(row["n"] for row in result["categories"].values())
    (halves / "eval.json").write_text(json.dumps(result))
    text = cards.write(halves).read_text()
    assert text.startswith("---\n") and "license: apache-2.0\n" in text.split("---\n")[1]
    assert all(f"`{key}`" in text for key in result["categories"])


def test_parts_that_take_longest_come_first():
    weight = torch.nn.Parameter(torch.ones(()))
    team = Team(1, [weight], lambda index: (index * weight, index), lambda index: index % 2)
    team.seconds = {0: 1.0, 1: 5.0}
    assert team.step(range(4)) == [1, 3, 0, 2]  # one worker takes them in turn
    assert weight.grad == 1.5  # the mean over the parts
    assert all(0 < seconds < 1 for seconds in team.seconds.values())
    team.stop()


def test_two_workers_give_what_one_gives(tmp_path):
    """The same weights, to rounding, after steps of several parts of either stage."""
    recipe = llava_next.Recipe(tasks={"scenes": (1.0, 1)}, words=8, tower_steps=2, steps=2, parts=3)
    for workers in (1, 2):
        train(llava_next.FAMILY, tmp_path / str(workers), recipe, workers, check=1, log=lambda line: None)
    one, two = (torch.load(loop.state_file(tmp_path / n)) for n in "12")
    assert one["questions"] == two["questions"] > 0
    for name, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][name], rtol=0, atol=1e-4)


def test_a_part_that_fails_is_told():
    weight = torch.nn.Parameter(torch.ones(()))

    def work(index):
        raise ValueError(f"part {index}")

    team = Team(2, [weight], work, lambda index: 0)
    with pytest.raises(ValueError, match="part"):
        team.step(range(2))
    team.stop()


def test_task_training_goes_on_from_a_bundled_model(tmp_path):
    """At a learning rate of 0, with another vocabulary: its tower, its decoder, and what is known of its training."""
    name, out = "vtok-tiny-qwen2.5-vl", tmp_path / "on"
    settings = {"tasks": {"charts": (1.0, 1)}, "words": 8, "tower_steps": 0, "steps": 1, "parts": 1}
    recipe = qwen2_5_vl.Recipe(**settings, start=name, lr=0.0, matrix_lr=0.0)
    train(qwen2_5_vl.FAMILY, out, recipe, workers=1, check=1, log=lambda line: None)
    own, _ = zoo.load(name)
    found = torch.load(loop.state_file(out))["model"]
    same = {key: value for key, value in own.state_dict().items() if "embed_tokens" not in key and "lm_head" not in key}
    assert any("visual" in key for key in same) and any("language_model" in key for key in same)
    for key, value in same.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)
    made = json.loads((out / "training.json").read_text())
    assert made["before"] == json.loads((zoo.path(name) / "training.json").read_text())
