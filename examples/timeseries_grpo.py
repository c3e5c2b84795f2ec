"""TimeMaster: a model that classifies time series by their pictures, tuned by SFT, then by GRPO, dense or patched.

    python examples/timeseries_grpo.py --data GunPoint --out out/gunpoint --keep 0.5

DATA is a set that aeon ships, or a CSV file with a series a row and its class in the column `label`. Run it again with
the same --out and it goes on from its last checkpoint. Writes results.json and results.png to OUT, and the model of
either stage to OUT/sft and OUT/grpo. A checkpoint of the hub needs a GPU: see docs/timemaster.md.
"""

import json
import resource
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import PartialState
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

import vtok
from vtok import models, zoo
from vtok.errors import InvalidValue, VtokError
from vtok.prompts import ask, encode
from vtok.rl import timemaster as tm


@dataclass(frozen=True)
class Setting:
    """What depends on the size of the model. Learning rates are of full tuning below the vision tower, or of LoRA."""

    brief: bool  # bare small pictures, short prompts, and answers of words that the small vocabulary has
    sft_lr: float
    grpo_lr: float
    batch: int  # of SFT
    prompts: int  # different ones in a step of GRPO
    together: int  # of these in one forward
    tokens: int  # of an answer at most
    kl: float


TINY = Setting(True, 7e-4, 1.5e-4, 8, 4, 4, 32, 0.0)
PAPER = Setting(False, 1e-5, 1e-6, 8, 8, 1, 1024, 0.01)


# ---- data ------------------------------------------------------------------------------------------------------------
def unseen(train: tm.Series, test: tm.Series) -> tuple[tm.Series, tm.Series]:
    """The same series, cut anew: those to test on are the ones whose charts did not teach the bundled models."""
    from vtok.eval.tasks import sources

    values, labels = np.concatenate([train.values, test.values]), train.labels + test.labels
    if train.name == "BasicMotions":
        old = [sources.split_of(i) == "train" for part in (train, test) for i in range(len(part))]
    else:
        known = {row.tobytes() for row in sources.series("train")}
        old = [row[0].tobytes() in known for row in values]
    if not any(old):
        return train, test
    whole = tm.Series(values, labels, train.name, train.about, train.channels)
    return whole.take(np.flatnonzero(old)), whole.take(np.flatnonzero(~np.array(old)))


def accuracy(model: Any, processor: Any, rows: Any, reward: tm.TimeMasterReward, tokens: int) -> dict[str, Any]:
    """Greedy answers to the rows of a data set, as the reward reads them; `bare`: right ones that are the class alone,
    as the bundled model gives them before it knows the form."""
    model.eval()
    answers, bare = [], 0
    for start in range(0, len(rows), 20):
        some = rows[start : start + 20]
        asked = [ask(prompt[-1]["content"], image) for prompt, image in zip(some["prompt"], some["image"])]
        inputs = encode(processor, asked).to(model.device, model.dtype)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [reward.read(text) for text in said]
        bare += sum(text.strip() == label for text, label in zip(said, some["label"]))
    right = np.array([answer.label == label for answer, label in zip(answers, rows["label"])])
    found = {"accuracy": right.mean().item(), "n": len(rows), "bare": bare / len(rows)}
    return found | {"form": sum(answer.well for answer in answers) / len(rows), "example": said[-1]}


# ---- stages ----------------------------------------------------------------------------------------------------------
class Seconds(TrainerCallback):
    """Writes the seconds of each step into the trainer's log, which its checkpoints keep."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.took = time.perf_counter() - self.began

    def on_log(self, args, state, control, **kwargs):
        if "loss" in state.log_history[-1]:
            state.log_history[-1]["seconds"] = self.took


def teach_tags(model: Any, processor: Any) -> None:
    """One token for each tag, in rows of the embeddings that a bundled model leaves unused; each begins as the mean of
    the characters by which it was spelled."""
    tokenizer, weight = processor.tokenizer, model.get_input_embeddings().weight
    tags = [f"{start}{tag}>" for tag in tm.TAGS for start in ("<", "</")]
    spelled = [tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in tags]
    if len(tokenizer) + len(tags) <= len(weight) and tokenizer.add_tokens(tags):
        with torch.no_grad():
            for tag, ids in zip(tags, spelled):
                weight[tokenizer.convert_tokens_to_ids(tag)] = weight[ids].mean(0)


def common(folder: Path, steps: int, seed: int, lr: float, every: int) -> dict[str, Any]:
    """Settings that both trainers share."""
    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder), "max_steps": steps, "learning_rate": lr, "seed": seed, "bf16": gpu,
        "use_cpu": not gpu, "activation_checkpointing": gpu, "logging_steps": 1, "save_steps": every,
        "save_total_limit": 1, "report_to": [], "disable_tqdm": True, "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": min(10, steps // 5), "max_grad_norm": 1.0,
    }  # fmt: skip


def run(trainer: Any, folder: Path) -> tuple[Any, list[dict[str, float]]]:
    """Train, from the last checkpoint if there is one: the model, LoRA merged into it, and the log."""
    vtok.rl.prepare(trainer)  # replay, the reference, checkpoints
    trainer.add_callback(Seconds())
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    model = trainer.accelerator.unwrap_model(trainer.model)
    keys = ("step", "loss", "reward", "seconds", "frac_reward_zero_std", "timemaster/accuracy", "timemaster/form")
    log = [{key: row[key] for key in keys if key in row} for row in trainer.state.log_history if "loss" in row]
    return (model.merge_and_unload() if hasattr(model, "merge_and_unload") else model), log


def sft(model: Any, processor: Any, rows: Any, o: Any, how: Setting, folder: Path) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        **common(folder, o.sft_steps, o.seed, o.sft_lr or how.sft_lr, o.save_steps),
        per_device_train_batch_size=how.batch,
        completion_only_loss=True,  # also tells vtok where the prompt ends
        max_length=None,  # never cut a picture's tokens
    )
    return SFTTrainer(model, args, train_dataset=rows, processing_class=processor, peft_config=lora(o.lora))


def grpo(model: Any, processor: Any, rows: Any, o: Any, how: Setting, folder: Path, reward: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        **common(folder, o.grpo_steps, o.seed, o.grpo_lr or how.grpo_lr, o.save_steps),
        per_device_train_batch_size=how.together * o.generations,
        gradient_accumulation_steps=how.prompts // how.together,
        num_generations=o.generations,
        max_completion_length=how.tokens,
        beta=how.kl,
        temperature=1.0,
        loss_type="bnpo",  # the mean over a batch's tokens
        log_completions=False,
    )
    return GRPOTrainer(model, reward, args, rows, processing_class=processor, peft_config=lora(o.lora))


def lora(rank: int) -> Any:
    """LoRA on the decoder's linear layers, or None for a rank of 0."""
    if not rank:
        return None
    from peft import LoraConfig

    names = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")


# ---- the whole -------------------------------------------------------------------------------------------------------
def prepared(o: Any, how: Setting) -> tuple[Any, Any, tm.TimeMasterReward]:
    """The rows to train on and to test on, and the reward."""
    train, test = tm.load(o.data, label=o.label, share=o.share, seed=o.seed)
    if o.model in zoo.names():
        train, test = unseen(train, test)
    drawn = np.random.default_rng(o.seed)
    train, test = (
        part.take(drawn.permutation(len(part))[:most]) for part, most in ((train, o.train_items), (test, o.test_items))
    )
    tm.check_split(train, test)
    scale = tm.limits(train) if o.one_scale else None
    shared = {"classes": train.classes, "extension": o.extension, "brief": how.brief, "scale": scale}
    judge = tm.stated if o.extension else None
    plot = tm.small(128, max(64, 16 * train.values.shape[1])) if how.brief else tm.Plot()
    rows, held_out = (tm.dataset(part, plot, **shared) for part in (train, test))
    return rows, held_out, tm.TimeMasterReward(train.classes, judge, o.rules)


def stage(name: str, o: Any, how: Setting, data: tuple[Any, Any, Any], result: dict[str, Any]) -> None:
    """One stage, on the model that the one before left; its result is written at once."""
    rows, held_out, reward = data
    source = o.model if name == "sft" else str(o.out / "sft")
    model, processor = models.load(source, dtype="float32" if o.model in zoo.names() else None)
    if name == "sft" and o.model in zoo.names():
        teach_tags(model, processor)
    room = model.config.get_text_config().max_position_embeddings
    tm.check_length(rows, processor, room, how.tokens)
    if not o.lora:  # the vision tower stays as it is, as is usual; that of the bundled models knows charts
        tower = "visual" if hasattr(model.model, "visual") else "vision_tower"
        getattr(model.model, tower).requires_grad_(False)
    with vtok.patch(model, o.method, keep=o.keep):
        if "before" not in result:
            result["before"] = accuracy(model, processor, held_out, reward, how.tokens)
        folder = o.out / f"{name}-steps"
        if name == "sft":
            trainer = sft(model, processor, rows, o, how, folder)
        else:
            trainer = grpo(model, processor, rows, o, how, folder, reward)
        model, log = run(trainer, folder)
        result[name] = accuracy(model, processor, held_out, reward, how.tokens) | {"log": log}
        result[name]["seconds_a_step"] = float(np.median([row["seconds"] for row in log]))
    gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result[name]["memory_mib"] = peak / 2**20
    if not PartialState().is_main_process:
        return
    model.save_pretrained(o.out / name)
    processor.save_pretrained(o.out / name)
    (o.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")  # last: says that the stage is done
    typer.echo(f"{name}: held-out accuracy {100 * result[name]['accuracy']:.1f} %")


def draw(result: dict[str, Any], file: Path) -> None:
    """Reward and accuracy over the steps of GRPO, and held-out accuracy after each stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    log = result["grpo"]["log"]
    for key in ("reward", "timemaster/accuracy", "timemaster/form"):
        values = [row[key] for row in log if key in row]
        smooth = [np.mean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
        curve.plot(range(1, len(values) + 1), smooth, label=key.removeprefix("timemaster/"))
    curve.set(xlabel="step of GRPO, mean of the last 10", ylim=(0, None), title=result["title"])
    curve.legend()
    stages = [name for name in ("before", "sft", "grpo") if name in result]
    bars.bar(stages, [100 * result[name]["accuracy"] for name in stages])
    bars.axhline(100 * result["majority"], color="black", linestyle=":", label="majority guess")
    bars.set(ylim=(0, 100), title="held-out accuracy, %")
    bars.legend()
    figure.savefig(file, dpi=80)


def whole(o: Any) -> None:
    """Both stages, from where an earlier run left them."""
    how = TINY if o.model in zoo.names() else PAPER
    here = PartialState()  # each process of `accelerate launch` has its own GPU
    set_seed(o.seed)
    rows, held_out, reward = prepared(o, how)
    tm.check_reward(reward, rows["label"][0], **({"insight": rows["insight"][0]} if o.extension else {}))
    o.out.mkdir(parents=True, exist_ok=True)
    file = o.out / "results.json"
    guess = Counter(rows["label"]).most_common(1)[0][0]
    result = json.loads(file.read_text()) if file.exists() else {}
    result |= {
        "title": f"{Path(o.data).stem}, {o.method} keep={o.keep:g}",
        "options": {key: str(value) for key, value in vars(o).items() if key != "out"},
        "train": len(rows),
        "majority": sum(one == guess for one in held_out["label"]) / len(held_out),
    }
    for name in ("sft", "grpo"):
        if name not in result:
            if name == "grpo" and result["sft"]["form"] < 0.5:
                well = 100 * result["sft"]["form"]
                raise InvalidValue(
                    f"After SFT only {well:.0f} % of the answers have the form, so GRPO would have next to no rewards: "
                    f"delete {o.out} and give more --sft-steps than {o.sft_steps}."
                )
            stage(name, o, how, (rows, held_out, reward), result)
        here.wait_for_everyone()  # the first has written the model
    if here.is_main_process:
        draw(result, o.out / "results.png")


def main(
    data: Annotated[str, typer.Option(help="A set of aeon's, or a CSV file.")],
    out: Annotated[Path, typer.Option(help="Folder of the results and checkpoints.")],
    model: Annotated[str, typer.Option(help="A bundled model, a folder or a hub repository.")] = "vtok-tiny-qwen2.5-vl",
    method: Annotated[str, typer.Option(help="Method of vtok.")] = "divprune",
    keep: Annotated[float, typer.Option(help="Share of the visual tokens; 1.0: all.")] = 0.5,
    sft_steps: int = 60,
    grpo_steps: int = 60,
    sft_lr: Annotated[float, typer.Option(help="0: that of the setting.")] = 0.0,
    grpo_lr: Annotated[float, typer.Option(help="0: that of the setting.")] = 0.0,
    generations: Annotated[int, typer.Option(help="Answers to a prompt.")] = 6,
    extension: Annotated[bool, typer.Option(help="Ask for an insight, too, and judge it.")] = False,
    rules: Annotated[str, typer.Option(help="The form of an answer: paper or code.")] = "paper",
    one_scale: Annotated[bool, typer.Option(help="One y scale for all pictures of the set.")] = False,
    label: Annotated[str, typer.Option(help="Column of a CSV file with the class.")] = "label",
    share: Annotated[float, typer.Option(help="Share of a CSV file to train on.")] = 0.7,
    train_items: Annotated[int, typer.Option(help="Train on at most so many.")] = 1000,
    test_items: Annotated[int, typer.Option(help="Test on at most so many.")] = 300,
    lora: Annotated[int, typer.Option(help="Rank of LoRA; 0 trains all below the vision tower.")] = 0,
    save_steps: int = 25,
    seed: int = 0,
) -> None:
    whole(SimpleNamespace(**locals()))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except VtokError as error:
        raise SystemExit(str(error)) from error
