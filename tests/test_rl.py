"""TRL's trainers on patched models: replay, references, checkpoints, clips."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from contract import picture, tiny

import vtok
from vtok.errors import InvalidValue, Unsupported

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")
COMMON = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}


def save(family, folder):
    """A tiny model in a folder, where TRL finds the reference model."""
    model, processor = tiny(family)
    model.generation_config.suppress_tokens = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save("qwen2_5_vl", tmp_path_factory.mktemp("model"))


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype), AutoProcessor.from_pretrained(folder)


def length_reward(completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]


def rows(column, values):
    from datasets import Dataset

    prompts = [[{"role": "user", "content": f"What is it? {'x ' * i}"}] for i in range(len(values))]
    return Dataset.from_dict({"prompt": prompts, column: values})


def clip(frames, seed):
    return [picture(56, 84, seed * 100 + i) for i in range(frames)]


def grpo(folder, method, cls=None, dtype=torch.float32, data=None, patched=True, out="out", **settings):
    from trl import GRPOConfig, GRPOTrainer

    model, processor = load(folder, dtype)
    patch = vtok.patch(model, method) if patched else None
    few = {"max_steps": 2, "num_generations": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    args = GRPOConfig(out, bf16=False, max_completion_length=6, **COMMON | few | settings)
    data = rows("image", [picture(56, 84, i) for i in range(4)]) if data is None else data
    trainer = (cls or GRPOTrainer)(model, length_reward, args=args, train_dataset=data, processing_class=processor)
    return trainer, patch


def kept_in_training(trainer, patch):
    """What forwards for the loss keep, and what their samples' records say."""
    theirs, seen = trainer._compute_loss, []

    def compute_loss(model, inputs):
        loss = theirs(model, inputs)
        seen.append((patch.trace.kept(), inputs["vtok_kept"]))
        return loss

    trainer._compute_loss = compute_loss
    return seen


def same(one, two):
    return one.layers.keys() == two.layers.keys() and all(
        torch.equal(x, y) for layer in one.layers for x, y in zip(one.layers[layer], two.layers[layer])
    )


def test_pictures_of_several_tiles(tmp_path):
    """InternVL, whose pixels are told apart by tiles: each row keeps its own, and the reference begins at no KL."""
    folder = save("internvl", tmp_path)
    data = rows("image", [picture(56, 56 * (1 + i % 3), i) for i in range(4)])
    settings = {"num_iterations": 2, "beta": 0.1, "learning_rate": 0.0, "data": data, "out": str(tmp_path / "out")}
    trainer, patch = grpo(folder, vtok.DivPrune(keep=0.5), **settings)
    vtok.rl.prepare(trainer)
    seen = kept_in_training(trainer, patch)
    trainer.train()
    assert all(same(one, two) for now, then in seen for one, two in zip(now, then, strict=True))
    assert len({len(sample.present_at(0)[0]) for now, _ in seen for sample in now}) > 1
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert len(kl) == 2 and max(map(abs, kl)) < 1e-6


class Drawing(vtok.Random):
    """Draws anew in each forward: nothing but a record can make two of them agree."""

    def select(self, tokens):
        index = torch.randperm(tokens.layout.n)[: tokens.layout.n // 2]
        return vtok.Selection.of_indices(index.expand(len(tokens.features), -1), tokens.layout.n)


Drawing.name = "random"  # no method of its own


@pytest.mark.parametrize("method", [Drawing(keep=0.5), vtok.FastV(keep=0.5, layer=1)], ids=["drawing", "fastv"])
def test_training_keeps_what_the_rollout_kept(saved, tmp_path, method):
    """Over iterations, shuffled and split, in half precision, also for the old log-probabilities."""
    settings = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    trainer, patch = grpo(saved, method, dtype=torch.bfloat16, out=str(tmp_path), **settings)
    vtok.rl.prepare(trainer)
    seen = kept_in_training(trainer, patch)
    trainer.train()
    assert len(seen) == 4
    assert all(same(one, two) for now, then in seen for one, two in zip(now, then, strict=True))
    half = [int(sample.present_at(3)[0].sum()) for now, _ in seen for sample in now]
    assert set(half) == {len(seen[0][0][0].present_at(0)[0]) // 2}


def test_without_replay_a_method_that_rounds_says_so(saved, tmp_path, caplog):
    for method, expected in (("fastv", 1), ("uniform", 0)):
        trainer, _ = grpo(saved, method, dtype=torch.bfloat16, out=str(tmp_path))
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="vtok"):
            trainer.train()
        assert sum("vtok.rl.prepare" in record.message for record in caplog.records) == expected
    trainer, _ = grpo(saved, "fastv", dtype=torch.bfloat16, out=str(tmp_path))
    vtok.rl.prepare(trainer)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="vtok"):
        trainer.train()
    assert not [record for record in caplog.records if "vtok.rl.prepare" in record.message]


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_the_reference_of_grpo_begins_at_no_divergence(saved, tmp_path, method):
    kl = {}
    for choice in ("alike", "dense"):
        trainer, _ = grpo(saved, method, beta=0.1, max_steps=1, learning_rate=0.0, out=str(tmp_path))
        vtok.rl.prepare(trainer, reference=choice)
        trainer.train()
        kl[choice] = next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert abs(kl["alike"]) < 1e-6
    assert kl["dense"] > 1e-3


def dpo(folder, out, patched=True, **settings):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, processor = load(folder)
    patch = vtok.patch(model, "divprune", keep=0.25) if patched else None
    say = lambda text: [{"role": "assistant", "content": text}]
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "What is it?"}]] * 4,
            "chosen": [say("a red cat")] * 4,
            "rejected": [say("blue")] * 4,
            "images": [[picture(56, 84, i)] for i in range(4)],
        }
    )
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, **settings}
    args = DPOConfig(str(out), bf16=False, max_length=None, **COMMON | settings)
    return DPOTrainer(model, args=args, train_dataset=data, processing_class=processor), patch


def test_the_loss_of_dpo_begins_at_ln_2(saved, tmp_path, caplog):
    loss = {}
    for choice in ("alike", "dense", None):
        trainer, _ = dpo(saved, tmp_path)
        if choice is not None:
            vtok.rl.prepare(trainer, reference=choice)
        else:
            trainer.add_callback(vtok.rl.PatchCallback(trainer))
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="vtok"):
            trainer.train()
        loss[choice] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert any("patch_reference" in record.message for record in caplog.records) == (choice is None)
    assert abs(loss["alike"] - math.log(2)) < 1e-4
    assert abs(loss["dense"] - math.log(2)) > 1e-3
    assert loss["dense"] == loss[None]


def test_references_that_cannot_be(saved, tmp_path):
    trainer, _ = dpo(saved, tmp_path)
    vtok.patch(trainer.ref_model, "uniform", keep=0.5)
    with pytest.raises(Unsupported, match="patched otherwise"):
        vtok.rl.patch_reference(trainer)
    with pytest.raises(Unsupported, match="was to be dense"):
        vtok.rl.patch_reference(trainer, dense=True)
    with pytest.raises(InvalidValue, match="alike"):
        vtok.rl.prepare(trainer, reference="same")
    trainer, _ = dpo(saved, tmp_path, patched=False)
    with pytest.raises(Unsupported, match="not patched"):
        vtok.rl.prepare(trainer)
    with pytest.raises(Unsupported, match="no rollouts"):
        vtok.rl.replay(trainer)
    trainer, _ = dpo(saved, tmp_path)
    trainer.precompute_ref_logps = True  # TRL allows it for text alone
    with pytest.raises(Unsupported, match="computed when the trainer was built"):
        vtok.rl.patch_reference(trainer)


def test_a_checkpoint_says_how_it_was_trained(saved, tmp_path, caplog):
    trainer, patch = dpo(saved, tmp_path, save_strategy="steps", save_steps=1)
    vtok.rl.prepare(trainer)
    trainer.train()
    file = tmp_path / "checkpoint-1" / "vtok.json"
    assert vtok.load(file) == list(patch.compressors)
    assert json.loads(file.read_text())["reference"] == "alike"

    def resumed(patched, change=lambda: None):
        trainer, _ = dpo(saved, tmp_path, patched=patched, max_steps=2)
        trainer.add_callback(vtok.rl.PatchCallback(trainer, "alike"))
        change()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="vtok"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        told = [record.getMessage() for record in caplog.records if record.name.startswith("vtok")]
        return [text for text in told if "without its weights" not in text]

    assert resumed(True) == []
    (told,) = resumed(False)
    assert "was trained with DivPrune(keep=0.25" in told and "goes on with no compressor" in told
    assert "does not say" in resumed(True, file.unlink)[0]


def test_a_keep_for_each_step(saved, tmp_path):
    trainer, patch = grpo(saved, vtok.DivPrune(keep=0.5), max_steps=6, num_iterations=2, out=str(tmp_path))
    vtok.rl.prepare(trainer, keep=[0.25, 0.5, 1.0], seed=1)
    seen = kept_in_training(trainer, patch)
    trainer.train()
    assert all(same(one, two) for now, then in seen for one, two in zip(now, then, strict=True))
    shares = [sum(int(m.sum()) for s in now for m in s.present_at(0)) for now, _ in seen]
    assert len(set(shares)) > 1
    assert shares[0::2] == shares[1::2]  # the second iteration is of the same rollout, whatever was drawn for it
    one, two = (vtok.rl.RandomKeep(patch, [0.25, 0.5, 1.0], seed) for seed in (1, 2))
    assert [one.keep(i) for i in range(20)] != [two.keep(i) for i in range(20)]
    with pytest.raises(InvalidValue):
        vtok.rl.RandomKeep(patch, [0.0])


def log_probs(logits, ids):
    """Of the tokens behind the first, [S - 1], from logits [S, V]."""
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("method", [None, vtok.DivPrune(keep=0.5), vtok.FastV(keep=0.5, layer=1)], ids=str)
def test_grpo_on_clips(saved, tmp_path, method):
    """Rollout and training see the clip: the same log-probabilities, which another clip changes."""
    data = rows("video", [np.stack([np.asarray(frame) for frame in clip(4 + 2 * (i % 2), i)]) for i in range(4)])
    settings = {"data": data, "out": str(tmp_path), "num_iterations": 2, "learning_rate": 0.0, "beta": 0.1}
    trainer, patch = grpo(saved, method, vtok.rl.VideoGRPOTrainer, patched=method is not None, **settings)
    if patch is not None:
        vtok.rl.prepare(trainer)
    theirs, batches = trainer._compute_loss, []
    trainer._compute_loss = lambda model, inputs: batches.append(inputs) or theirs(model, inputs)
    trainer.train()
    batch = batches[1]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    assert batch["completion_mask"].sum() > 4
    logged = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert all(abs(entry["kl"]) < 1e-6 for entry in logged)  # the reference sees the clip
    ratios = [entry[f"clip_ratio/{end}"] for entry in logged for end in ("low_mean", "high_mean")]
    assert len(logged) == 2 and not any(ratios)

    # an oracle: each sample alone, unpadded, its prompt and answer in one forward of the dense or patched model
    old = batch["old_per_token_logps"]
    model = trainer.model.eval()
    for row in range(4):
        here = mask[row].bool()
        fields = {k: torch.as_tensor(v) for k, v in batch["vtok_clips"][row].items()}
        answer = int(batch["completion_mask"][row].sum())
        types = fields.pop("mm_token_type_ids")
        types = torch.cat([types, types.new_zeros(1, answer)], 1)
        one = ids[row][here][None]
        labels = one.clone()
        labels[:, :-answer] = -100
        with torch.no_grad():
            logits = model(input_ids=one, labels=labels, mm_token_type_ids=types, **fields).logits
            fields["pixel_values_videos"] = -fields["pixel_values_videos"]
            other = model(input_ids=one, labels=labels, mm_token_type_ids=types, **fields).logits
        expected, other = (log_probs(x[0], one[0])[-answer:] for x in (logits, other))
        torch.testing.assert_close(old[row][batch["completion_mask"][row].bool()], expected, atol=1e-5, rtol=1e-5)
        assert (other - expected).abs().max() > 1e-3


def test_clips_that_cannot_be(saved, tmp_path):
    film = tmp_path / "broken.mp4"
    film.write_bytes(b"no film")
    with pytest.raises(InvalidValue, match="broken.mp4"):
        grpo(saved, None, vtok.rl.VideoGRPOTrainer, data=rows("video", [str(film)] * 2), patched=False)


def test_a_resumed_training_has_its_weights(saved, tmp_path, caplog):
    """Of three steps, the third after a stop: the same loss. transformers alone begins with the weights of step 0."""

    def losses(out, resume=None, prepared=True, **settings):
        trainer, _ = dpo(saved, out, max_steps=3, learning_rate=1e-2, seed=0, **settings)
        if prepared:
            vtok.rl.prepare(trainer)
        else:
            vtok.rl.patch_reference(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    through = losses(tmp_path / "through")
    losses(tmp_path / "stopped", save_strategy="steps", save_steps=2)
    checkpoint = str(tmp_path / "stopped" / "checkpoint-2")
    assert losses(tmp_path / "stopped", checkpoint)[-1] == pytest.approx(through[-1], abs=1e-5)
    assert losses(tmp_path / "stopped", checkpoint, prepared=False)[-1] != pytest.approx(through[-1], abs=1e-5)


def test_weights_of_a_method_are_named_in_a_checkpoint(saved, tmp_path):
    """No file of choices holds them, and a training must not stop for that."""
    trainer, patch = dpo(saved, tmp_path)
    vtok.unpatch(trainer.model)
    patch = vtok.patch(trainer.model, vtok.TokenFLEX(keep=0.25, **vtok.TokenFLEX.small_weights(trainer.model)))
    callback = vtok.rl.PatchCallback(trainer)
    (tmp_path / "checkpoint-0").mkdir()
    callback.on_save(trainer.args, trainer.state, None)
    told = json.loads((tmp_path / "checkpoint-0" / "vtok.json").read_text())
    assert told["compressors"] == [repr(patch.compressors[0])]
    assert vtok.rl.patch_reference(trainer).compressors[0].weights is not patch.compressors[0].weights
    assert vtok.rl.patch_reference(trainer) is not patch  # patched already, with a copy of the weights
