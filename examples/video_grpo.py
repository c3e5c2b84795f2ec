"""Train the bundled video model by GRPO on clips, on all or some of the visual tokens.

    python examples/video_grpo.py --out DIR --keep 0.25
    python examples/video_grpo.py --out DIR --keep 1.0

Questions are those of the offline task `video` that the model answers neither surely nor by chance, on clips that it
has not seen; the reward is 1 for the right answer and 0 for any other. Writes video_grpo.json: accuracy on the held-out
clips before and after, the gain with its interval, the reward of each step, seconds a step. A run that stopped goes on
where it was if the same command is given again.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from datasets import Dataset, load_from_disk
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig

import vtok
from vtok import zoo
from vtok.eval.results import judge, statistics
from vtok.eval.tasks.video import FRAMES, TASK
from vtok.media import Sampling

NAME, SEED = "vtok-tiny-qwen2.5-vl", 78  # a seed that the model was not trained with


def questions(split: str, count: int, categories: set[str]) -> Dataset:
    """One question a clip: `prompt`, `video` (its frames), `fps`, `answer`."""
    rows, index = [], 0
    while len(rows) < count:
        item = TASK.item(split, SEED, index)
        index += 1
        for question in [q for q in item.questions if q.category in categories][:1]:
            prompt = [{"role": "user", "content": question.text}]
            rows.append({"prompt": prompt, "video": list(item.images), "fps": item.fps, "answer": question.answer})
    return Dataset.from_list(rows)


def right(completions: list, answer: list[str], **columns: object) -> list[float]:
    """The reward: 1 for the right answer."""
    return [float(TASK.score(a, said[0]["content"])) for a, said in zip(answer, completions)]


def tested(model: torch.nn.Module, processor: object, clips: int, categories: set[str]) -> list[judge.Record]:
    """Answers to these questions of the first held-out clips; those behind the task's own test set are in no result."""
    model.eval()
    chances = {name: chance for name, chance in TASK.chances.items() if name in categories}
    return judge.run(model, processor, replace(TASK, chances=chances, count=max(clips, TASK.count)), clips)


def gain(before: list[judge.Record], after: list[judge.Record]) -> dict:
    """Accuracy after - before with its interval, the same clips redrawn in both, and the p of McNemar's test."""
    change = np.array([int(b.predicted == b.answer) - int(a.predicted == a.answer) for a, b in zip(before, after)])
    low, high = statistics.interval(change, np.ones(len(change)))
    p = statistics.mcnemar(int((change > 0).sum()), int((change < 0).sum()))
    return {"accuracy": float(change.mean()), "low": low, "high": high, "p": p}


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the result.")],
    method: Annotated[str, typer.Option(help="A compressor.")] = "divprune",
    keep: Annotated[float, typer.Option(help="Of the visual tokens that it keeps; 1.0: all.")] = 0.25,
    kinds: Annotated[str, typer.Option(help="Of the questions that are trained and tested.")] = "event,first,zoom",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 60,
    clips: Annotated[int, typer.Option(help="Clips a step.")] = 16,
    generations: Annotated[int, typer.Option(help="Answers a clip.")] = 4,
    lr: Annotated[float, typer.Option(help="Learning rate, falling linearly to 0.")] = 2e-4,
    beta: Annotated[float, typer.Option(help="Weight of the KL to the model as it was.")] = 0.0,
    held_out: Annotated[int, typer.Option(help="Held-out clips of all kinds; a third has these questions.")] = 1440,
    threads: int = 1,
) -> None:
    settings = {name: value for name, value in locals().items() if name != "out"}
    torch.set_num_threads(threads)
    set_seed(0)
    model, processor = zoo.load(NAME)
    categories = set(kinds.split(","))
    tower = model.model.visual.requires_grad_(False)  # as with real checkpoints: the decoder is trained
    vtok.patch(model, method, keep=keep)
    vtok.rl.encode_once(tower, clips)
    out.mkdir(parents=True, exist_ok=True)
    start, asked = out / "before.json", out / "questions"  # for a run that goes on
    if not asked.is_dir():
        questions("train", steps * clips, categories).save_to_disk(asked)
    if not start.is_file():
        start.write_text(json.dumps([asdict(said) for said in tested(model, processor, held_out, categories)]))
    before = [judge.Record(**said) for said in json.loads(start.read_text())]
    print(f"before: {judge.summary(before)['accuracy']:.3f}", flush=True)
    args = GRPOConfig(
        str(out),
        max_steps=steps,
        learning_rate=lr,
        beta=beta,
        num_generations=generations,
        per_device_train_batch_size=clips * generations,
        max_completion_length=8,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=1,
        save_steps=5,
        save_total_limit=1,
        disable_tqdm=True,
    )
    trainer = vtok.rl.VideoGRPOTrainer(
        model,
        right,
        args=args,
        train_dataset=load_from_disk(asked),
        processing_class=processor,
        sampling=Sampling(nframes=FRAMES),
    )
    vtok.rl.prepare(trainer)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out))
    after = tested(trainer.model, processor, held_out, categories)
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    result = {
        "settings": settings,
        "before": judge.summary(before),
        "after": judge.summary(after),
        "gain": gain(before, after),
        "reward": [round(entry["reward"], 4) for entry in log],
        "step_seconds": round(float(np.median([entry["step_time"] for entry in log])), 3),
    }
    print(f"after: {result['after']['accuracy']:.3f}, {result['step_seconds']:.2f} s a step")
    (out / "video_grpo.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
