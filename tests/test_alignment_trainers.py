"""The trainers of token-level losses: text, pictures, patched models; accumulated batches; against slow oracles."""

import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from contract import apart, picture, tiny

import vtok
from vtok.errors import InvalidValue, Unsupported

pytest.importorskip("trl")
from trl import GRPOConfig, GRPOTrainer, SFTConfig

from vtok.rl import AnswerTrainer, PreferenceConfig, PreferenceTrainer, RRPOConfig, RRPOTrainer
from vtok.rl.advantages import rto
from vtok.rl.objectives import DPO, LOGO, TDPO, TREG, SparsePO, WeightedDPO
from vtok.rl.preferences import PairCollator
from vtok.rl.scores import contrast, critical
from vtok.rl.supervised import IFT, AlignDistil, WeightedNLL
from vtok.text.align.rto import advantages, shaped_rewards

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
FEW |= {"max_steps": 1, "logging_steps": 1, "lr_scheduler_type": "constant"}
says = lambda role, text: [{"role": role, "content": text}]


def pairs(kind, **columns):
    """Two pairs of unequal lengths, of text or with pictures."""
    told = [("Which way?", "left, slowly", "right, slowly"), ("What is to be seen?", "a red ball and a man", "a dog")]
    rows = [
        {"prompt": says("user", q), "chosen": says("assistant", w), "rejected": says("assistant", x)}
        for q, w, x in told
    ]
    if kind == "picture":
        rows = [row | {"image": picture(56, 84 + 28 * i, i)} for i, row in enumerate(rows)]
    return datasets.Dataset.from_list([row | {k: v[i] for k, v in columns.items()} for i, row in enumerate(rows)])


def trainer_on(kind, objective, folder, method=None, moved=True, data=None, **given):
    (model, processor), (ref, _) = tiny("qwen2_5_vl", layers=2), tiny("qwen2_5_vl", layers=2)
    for one in (model, ref) if method else ():
        vtok.patch(one, method, keep=0.5)
    args = PreferenceConfig(str(folder), **FEW | {"per_device_train_batch_size": 2, "beta": 0.3} | given)
    data = pairs(kind) if data is None else data
    made = PreferenceTrainer(
        apart(model) if moved else model,
        ref,
        args,
        train_dataset=data,
        processing_class=processor if kind == "picture" else processor.tokenizer,
        objective=objective,
    )
    made.model.eval()
    return made


def batch_of(trainer, rows=(0, 1)):
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def loss_of(trainer, batch):
    with torch.no_grad():
        return trainer._compute_loss(trainer.model, batch, False)


@pytest.fixture(scope="module")
def scored():
    """Pairs of pictures with T-REG's scores and with cDPO's weights."""
    model, processor = tiny("qwen2_5_vl", layers=2)
    collator, data = PairCollator(processor, phrases="all"), pairs("picture")
    other = apart(tiny("qwen2_5_vl", layers=2)[0])
    columns = lambda found: {name: [row[name] for row in found] for name in found[0]}
    return [
        pairs("picture", **columns(list(found)))
        for found in (contrast(model, collator, data), critical(model, other, collator, data))
    ]


@pytest.mark.parametrize(("kind", "method"), [("text", None), ("picture", None), ("picture", "divprune")])
def test_every_objective_begins_at_ln_2_and_leaves_it(kind, method, tmp_path, scored):
    objectives = [(DPO(), None), (TDPO(version=1), None), (TDPO(), None), (SparsePO(l1=0.0), None)]
    objectives += [(SparsePO("activations"), None)]
    if kind == "picture":
        objectives += [(TREG(alpha=0.0), scored[0]), (WeightedDPO(), scored[1])]
    trainer = trainer_on(kind, DPO(), tmp_path, method, moved=False)
    for objective, data in objectives:
        trainer.objective, trainer.train_dataset = objective, data or pairs(kind)
        objective.attach(trainer.model)
        batch = batch_of(trainer)
        assert loss_of(trainer, batch).item() == pytest.approx(math.log(2), abs=1e-6)
    apart(trainer.model)
    found = []
    for objective, data in objectives:
        trainer.objective, trainer.train_dataset = objective, data or pairs(kind)
        found.append(loss_of(trainer, batch_of(trainer)).item())
    assert all(abs(loss - math.log(2)) > 1e-4 for loss in found) and len({round(x, 6) for x in found}) > len(found) - 2
    if method:
        (patch,) = vtok.patching.patches_on(trainer.model)
        assert patch.trace.n_kept == [n // 2 for n in patch.trace.n_visual]


def test_weights_of_signs_are_rrpo_without_kl(tmp_path):
    model, processor = tiny("qwen2_5_vl", layers=2)
    args = RRPOConfig(str(tmp_path), **FEW, per_device_train_batch_size=2, beta=0.3, alpha=0.0)
    ref = tiny("qwen2_5_vl", layers=2)[0]
    theirs = RRPOTrainer(apart(model), ref, args, train_dataset=pairs("picture"), processing_class=processor)
    theirs.model.eval()
    batch = batch_of(theirs)
    rows = zip(batch["signs"], batch["completion_mask"].bool())
    weights = [(signs[mask] > 0).float().tolist() for signs, mask in rows]
    assert 0 < sum(map(sum, weights)) < sum(map(len, weights))
    data = pairs("picture", chosen_weights=weights[:2], rejected_weights=weights[2:])
    mine = trainer_on("picture", WeightedDPO(), tmp_path, data=data)
    torch.testing.assert_close(loss_of(mine, batch_of(mine)), loss_of(theirs, batch))
    short = pairs("picture", chosen_weights=[[1.0], [1.0]])
    with pytest.raises(InvalidValue, match="1 numbers, and the answer"):
        mine.data_collator(list(short))
    with pytest.raises(InvalidValue, match="the rows have none"):
        loss_of(mine, mine.data_collator(list(pairs("picture"))))
    mine.objective = TREG()
    with pytest.raises(InvalidValue, match="scores are in"):
        loss_of(mine, batch_of(mine))


def test_scores_are_those_of_each_answer_alone(scored):
    model, processor = tiny("qwen2_5_vl", layers=2)
    collator = PairCollator(processor, phrases="all")
    row = pairs("picture")[0]
    from vtok.text.align.treg import BETTER, WORSE

    logps = []
    for told in (BETTER, WORSE):
        batch = collator([{**row, "prompt": [*says("system", told), *row["prompt"]]}])
        mask = batch.pop("completion_mask")[1].bool()
        batch.pop("signs")
        with torch.no_grad():
            logits = model(**batch).logits[1].log_softmax(-1)
        ids = batch["input_ids"][1]
        logps.append(torch.stack([logits[t - 1, ids[t]] for t in mask.nonzero()[:, 0].tolist()]))
    wanted = (logps[0] - logps[1]).sigmoid() - 0.5
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(torch.tensor(scored[0][0]["rejected_weights"]), wanted, atol=1e-5, rtol=1e-4)
    assert all(0 <= w <= 1 for w in scored[1][0]["rejected_weights"])


@pytest.mark.parametrize("objective", [TDPO(), SparsePO(dropout=0.0)], ids=["tdpo", "sparsepo"])
def test_accumulated_pairs_give_the_step_of_one_batch(objective, tmp_path):
    after = []
    for size, parts in ((2, 1), (1, 2)):
        torch.manual_seed(3)
        given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "learning_rate": 0.1}
        trainer = trainer_on("picture", objective, tmp_path, "divprune", optim="sgd", max_grad_norm=0.0, **given)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        after.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    moved = [name for name, p in after[0].items() if not p.equal(start[name])]
    assert len(moved) > 10 and ("mask_head.row.weight" in moved) is isinstance(objective, SparsePO)
    for name, p in after[0].items():
        torch.testing.assert_close(p, after[1][name], atol=1e-6, rtol=1e-4)


def test_pairs_that_are_one_answer_are_left_out(tmp_path, caplog):
    row = pairs("text")[0]
    same = row | {"rejected": row["chosen"]}
    trainer = trainer_on("text", TDPO(), tmp_path, data=datasets.Dataset.from_list([same, row]))
    assert len(trainer.train_dataset) == 1 and "one answer twice" in caplog.text


@pytest.mark.parametrize(("kind", "method"), [("text", None), ("picture", "divprune")])
def test_several_rejected_answers(kind, method, tmp_path):
    """LOGO: its formula on the log-probabilities of each answer alone, and no reference is run."""
    more = {"rejected_2": [says("assistant", "up"), says("assistant", "a man who throws a red ball")]}
    trainer = trainer_on(kind, LOGO(gap=0.2, sft=0.5), tmp_path, method, data=pairs(kind, **more), beta=2.0)
    assert trainer.ref_model is None
    batch = batch_of(trainer)
    assert len(batch["input_ids"]) == 6
    with torch.no_grad():
        given = {k: v for k, v in batch.items() if k not in ("completion_mask", "signs")}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        logits = trainer.model(**given, labels=labels).logits.log_softmax(-1)
    mean = []
    for row, mask, p in zip(batch["input_ids"], batch["completion_mask"].bool(), logits):
        mean.append(sum(p[t - 1, row[t]] for t in mask.nonzero()[:, 0].tolist()) / mask.sum())
    wanted = []
    for w, x, y in zip(mean[:2], mean[2:4], mean[4:]):
        wanted.append(-torch.nn.functional.logsigmoid(2 * (w - (x + y) / 2 - 0.2)) - 0.5 * w)
    assert len({round(x.item(), 3) for x in mean}) == 6
    torch.testing.assert_close(loss_of(trainer, batch), sum(wanted) / 2)
    with pytest.raises(InvalidValue, match="no column 'rejected_2'"):
        trainer_on(kind, LOGO(), tmp_path, data=pairs(kind))
    with pytest.raises(InvalidValue, match="of 3 use"):
        trainer_on(kind, LOGO(), tmp_path, data=pairs(kind, **more), phrases="words")
    trainer.objective = TDPO()
    with pytest.raises(InvalidValue, match="TDPO compares with a reference, and this trainer has none"):
        loss_of(trainer, batch)


def test_hidden_states_that_a_reference_drops(tmp_path):
    trainer = trainer_on("text", SparsePO(), tmp_path)
    forward = trainer.ref_model.forward
    trainer.ref_model.forward = lambda output_hidden_states, **given: forward(**given)
    with pytest.raises(Unsupported, match="SparsePO reads hidden states, and the reference gives none"):
        loss_of(trainer, batch_of(trainer))
    with pytest.raises(InvalidValue, match="does not give: learnt, states"):
        trainer.objective(None, {}, 0.1)


# ---- supervised ------------------------------------------------------------------------------------------------------
def answers(kind):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs("text")]
    if kind == "picture":
        rows = [row | {"images": [picture(56, 84 + 28 * i, i)]} for i, row in enumerate(rows)]
    return datasets.Dataset.from_list(rows)


def answer_trainer(kind, objective, folder, method=None, **given):
    model, processor = tiny("qwen2_5_vl", layers=2)
    if method:
        vtok.patch(model, method, keep=0.5)
    args = SFTConfig(str(folder), max_length=None, **FEW | {"per_device_train_batch_size": 2} | given)
    processing = processor if kind == "picture" else processor.tokenizer
    made = AnswerTrainer(
        apart(model), args=args, train_dataset=answers(kind), processing_class=processing, objective=objective
    )
    made.model.eval()
    return made


def slow_logp(model, batch, row, logits=None):
    """Log-probabilities of an answer's tokens, one after the other, from logits of the whole batch."""
    labels = batch["labels"][row]
    p = logits[row].log_softmax(-1)
    return torch.stack([p[t - 1, labels[t]] for t in (labels != -100).nonzero()[:, 0].tolist()])


@pytest.mark.parametrize(("kind", "method"), [("text", None), ("picture", None), ("picture", "divprune")])
def test_supervised_losses_are_those_of_the_formulas(kind, method, tmp_path):
    trainer = answer_trainer(kind, IFT(share=0.0, gamma=0.0), tmp_path, method)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] != -100).sum(1).tolist()[0] != (batch["labels"] != -100).sum(1).tolist()[1]
    with torch.no_grad():
        logits = trainer.model(**batch).logits
        sft = trainer.compute_loss(trainer.model, dict(batch))
        logps = [slow_logp(trainer.model, batch, row, logits) for row in (0, 1)]
        torch.testing.assert_close(sft, -(logps[0].mean() + logps[1].mean()) / 2)
        trainer.objective = WeightedNLL(lambda ids, labels: torch.arange(ids.shape[1]).expand_as(ids) % 3)
        found = trainer.compute_loss(trainer.model, dict(batch))
        places = [(batch["labels"][row] != -100).nonzero()[:, 0] % 3 for row in (0, 1)]
        wanted = sum(-(w * logp).sum() / w.sum() for w, logp in zip(places, logps)) / 2
        torch.testing.assert_close(found, wanted)
        # IFT: the embeddings by hand
        table = trainer.model.get_input_embeddings()
        ids, real = batch["input_ids"], batch["labels"] != -100
        guess = torch.cat([ids[:, :1], logits[:, :-1].argmax(-1)], 1)
        plain, mixed = table.weight[ids], 0.7 * table.weight[ids] + 0.3 * table.weight[guess]
        hook = table.register_forward_hook(lambda *_: torch.where(real[..., None], mixed, plain))
        second = trainer.model(**batch).logits
        hook.remove()
        assert (second - logits).abs().max() > 1e-3
        wanted = 0.0
        for row in (0, 1):
            loss = -slow_logp(trainer.model, batch, row, second)
            ahead = torch.stack([sum(0.9**i * x for i, x in enumerate(loss[t:])) for t in range(len(loss))])
            wanted += (loss * ahead * len(loss) / ahead.sum()).mean() / 2
        trainer.objective = IFT(share=0.3, gamma=0.9)
        torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), wanted)
        assert not table._forward_hooks
        nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
        with pytest.raises(InvalidValue, match="supervised"):
            trainer.compute_loss(trainer.model, nothing)


def test_accumulated_answers_give_the_step_of_one_batch(tmp_path):
    after = []
    for size, parts in ((2, 1), (1, 2)):
        given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "learning_rate": 0.1}
        trainer = answer_trainer("picture", IFT(), tmp_path, "divprune", optim="sgd", max_grad_norm=0.0, **given)
        start = trainer.model.lm_head.weight.detach().clone()
        trainer.train()
        after.append(trainer.model.lm_head.weight.detach())
    assert math.isfinite(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert not after[0].equal(start)
    torch.testing.assert_close(*after, atol=1e-6, rtol=1e-4)


def test_aligndistil_learns_from_models_and_from_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model

    trainer = answer_trainer("text", None, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    dpo, other = apart(tiny("qwen2_5_vl", layers=2)[0]), tiny("qwen2_5_vl", layers=2)[0]
    lora = LoraConfig(r=2, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)
    made = {"objective": AlignDistil(dpo, dpo, {})}
    args = SFTConfig(str(tmp_path), max_length=None, **FEW)
    processor = tiny("qwen2_5_vl")[1].tokenizer
    same = AnswerTrainer(
        apart(tiny("qwen2_5_vl", layers=2)[0]),
        args=args,
        train_dataset=answers("text"),
        processing_class=processor,
        **made,
    )
    with torch.no_grad():
        assert same.compute_loss(same.model, dict(batch)).abs() < 1e-6  # teachers are the student
        same.objective = AlignDistil(dpo, other, {"strength": 5.0})
        from vtok.rl.answers import add_answer_logits

        add_answer_logits(other)
        wanted = same.compute_loss(same.model, dict(batch))
        assert wanted > 1e-4
        policy = get_peft_model(apart(tiny("qwen2_5_vl", layers=2)[0]), lora)
        policy.add_adapter("dpo", lora)
        adapted = AnswerTrainer(
            policy,
            args=args,
            train_dataset=answers("text"),
            processing_class=processor,
            objective=AlignDistil("dpo", "", {}),
        )
        assert adapted.compute_loss(adapted.model, dict(batch)) > 1e-4
        assert policy.active_adapters == ["default"]
        adapted.objective = AlignDistil("default", "default", {})
        adapted.model.eval()
        assert adapted.compute_loss(adapted.model, dict(batch)).abs() < 1e-6
        adapted.objective = AlignDistil("gone", "", {})
        with pytest.raises(InvalidValue, match="no adapter 'gone'"):
            adapted.compute_loss(adapted.model, dict(batch))


def test_a_patched_teacher_with_adapters_sees_where_answers_begin(tmp_path):
    """One whose fresh adapter changes nothing is the student: nothing is to be learnt."""
    from peft import LoraConfig, get_peft_model

    teacher = apart(tiny("qwen2_5_vl", layers=2)[0])
    vtok.patch(teacher, "fastv", keep=0.5, layer=1)
    teacher = get_peft_model(teacher, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    trainer = answer_trainer("picture", AlignDistil(teacher, teacher, {}), tmp_path)
    vtok.patch(trainer.model, "fastv", keep=0.5, layer=1)
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).abs() < 1e-6


def test_two_processes_give_the_step_of_one(tmp_path):
    """Of pictures of unequal sizes and answers of unequal lengths, on half of the tokens."""
    from two_processes import steps

    file = Path(__file__).with_name("two_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(file), str(tmp_path)]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two, one = torch.load(tmp_path / "two.pt"), steps(tmp_path, 2)
    start = tiny("qwen2_5_vl", layers=2)[0].lm_head.weight
    assert len(one) == 4 and not one["tdpo"]["lm_head.weight"].allclose(start)
    for name, weights in one.items():
        for key, p in weights.items():
            torch.testing.assert_close(two[name][key], p, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


# ---- GRPO ------------------------------------------------------------------------------------------------------------
def test_grpo_trains_with_advantages_of_tokens(tmp_path):
    model, processor = tiny("qwen2_5_vl", layers=2)
    model.generation_config.suppress_tokens = None
    dpo, ref = apart(tiny("qwen2_5_vl", layers=2)[0]), tiny("qwen2_5_vl", layers=2)[0]
    reward = lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids]
    data = [{"prompt": says("user", f"What is it? {'x ' * i}"), "image": picture(56, 84, i)} for i in range(2)]
    few = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 5, "scale_rewards": "none"}
    args = GRPOConfig(str(tmp_path), **FEW | few | {"learning_rate": 1e-3})
    data = datasets.Dataset.from_list(data)
    trainer = GRPOTrainer(model, reward, args=args, train_dataset=data, processing_class=processor)
    vtok.patch(trainer.model, "divprune", keep=0.5)
    seen, give = [], rto(dpo, ref, beta=1.0, clip=0.2)

    def noted(trainer, samples):
        made = give(trainer, samples)
        seen.append((samples, made))
        return made

    vtok.rl.token_advantages(trainer, noted)
    start = model.lm_head.weight.detach().clone()
    trainer.train()
    assert not model.lm_head.weight.equal(start)
    (samples, made) = seen[0]
    mask = samples["completion_mask"].bool()
    assert made.shape == mask.shape and not made[~mask].any()
    ids = torch.cat([samples["prompt_ids"], samples["completion_ids"]], 1)
    whole = torch.cat([samples["prompt_mask"], samples["completion_mask"]], 1)
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    media = {name: samples[name] for name in names if name in samples}
    logps = []
    for judge in (dpo, ref):
        with torch.no_grad():
            logits = judge(input_ids=ids, attention_mask=whole, **media).logits.log_softmax(-1)
        width = mask.shape[1]
        logps.append(logits[:, -width - 1 : -1].gather(2, ids[:, -width:, None])[..., 0])
    outcome = torch.zeros(len(mask))
    rewards = shaped_rewards(*logps, logps[1], mask, outcome, beta=1.0, clip=0.2, kl=0.0)
    wanted = samples["advantages"][:, None] * mask + advantages(rewards, mask, 2, scale=False)
    assert rewards.any()
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-4)
    vtok.rl.token_advantages(trainer, lambda *_: torch.zeros(2))
    with pytest.raises(InvalidValue, match="Advantages of tokens"):
        trainer._generate_and_score_completions([data[0]] * 2 + [data[1]] * 2)
    with pytest.raises(Unsupported, match="no rollouts"):
        vtok.rl.token_advantages(object(), noted)
