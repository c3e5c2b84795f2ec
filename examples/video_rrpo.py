"""Train the bundled video model by RRPO on its own errors, and by DPO for as many steps.

    python examples/video_rrpo.py --out DIR [--method divprune --keep 0.5] [--no-lora] [--steps 40]

Questions are those of the task `video`, on clips that the model has not seen. The rejected answers are what the model
says when a quarter to half of the frames are black and the others shuffled locally, or a wrong answer where it still
says the right one. Writes video_rrpo.json: accuracy on the held-out clips before and after; and on held-out pairs the
margin in nats of reward, the share of pairs in the right order, and the KL to the reference in nats an answer.
"""

import itertools
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from datasets import Dataset
from transformers import set_seed

import vtok
from vtok import zoo
from vtok.eval.results import judge
from vtok.eval.tasks.video import TASK
from vtok.media import Clip
from vtok.patching import patches_on
from vtok.prompts import ask
from vtok.rl import RRPOConfig, RRPOTrainer, patch_reference
from vtok.rl.pairs import own_answers, pair, perturb

NAME, SEED = "vtok-tiny-qwen2.5-vl", 77  # a seed that the model was not trained with
LORA = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
OF_FRAMES = {"cut", "order", "event"}  # what is said of the perturbed clip may be right of it: no error to learn from
DPO = {"phrases": "all", "alpha": 0.0}  # RRPO with every token a phrase, and no KL


def pairs(model, processor, split, count):
    """Rows of a data set, one a clip."""
    rng = np.random.default_rng((SEED, count))
    items = (TASK.item(split, SEED, index) for index in itertools.count())
    asked = ((item.questions[0], Clip(item.images, item.fps)) for item in items)
    known = list(itertools.islice((one for one in asked if one[0].category not in OF_FRAMES), count))
    said = own_answers(model, processor, [ask(q.text, perturb(clip, rng)) for q, clip in known], tokens=8)
    answers = defaultdict(set)
    for question, _ in known:
        answers[question.category].add(question.answer)
    rows = []
    for (question, clip), own in zip(known, said):
        named = [a for a in sorted(answers[question.category]) if question.category != "first" or a in question.text]
        rows.append(pair(question.text, clip, question.answer, own, named, rng))
    return Dataset.from_list([row for row in rows if row is not None])


def tested(model, processor, clips):
    """Accuracy on the first held-out clips, its interval, and each category's."""
    return judge.summary(judge.run(model, processor, TASK, clips))


def trained(model, processor, train, val, lora, **how):
    """The trainer behind its last step, and the seconds of all steps."""
    adapter = None
    if lora:
        from peft import LoraConfig

        adapter = LoraConfig(r=16, lora_alpha=32, target_modules=LORA)
    how |= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none"}
    how |= {"save_strategy": "no", "logging_steps": 10, "disable_tqdm": True, "seed": 0}
    args = RRPOConfig(**how)
    trainer = RRPOTrainer(
        model, None, args, train_dataset=train, eval_dataset=val, processing_class=processor, peft_config=adapter
    )
    if patches_on(model):
        patch_reference(trainer)
    began = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - began


def main(
    out: Annotated[Path, typer.Option(help="Folder for the result.")],
    method: Annotated[str | None, typer.Option(help="A compressor; left out: all visual tokens.")] = None,
    keep: Annotated[float, typer.Option(help="Of the visual tokens that the method keeps.")] = 0.5,
    lora: Annotated[bool, typer.Option(help="Train an adapter of the decoder, or all weights.")] = True,
    steps: Annotated[int, typer.Option(help="Of training, each on `batch` pairs.")] = 40,
    batch: int = 4,
    lr: Annotated[float, typer.Option(help="Learning rate, falling linearly to 0.")] = 2e-3,
    alpha: Annotated[float, typer.Option(help="Weight of the KL.")] = 0.05,
    beta: float = 0.5,
    held_out: Annotated[int, typer.Option(help="Held-out clips, of 720.")] = 90,
    threads: int = 2,
) -> None:
    settings = {name: value for name, value in locals().items() if name != "out"}
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    def loaded():
        set_seed(0)
        model, processor = zoo.load(NAME)
        if method:
            vtok.patch(model, method, keep=keep)
        return model, processor

    model, processor = loaded()
    train, val = pairs(model, processor, "train", steps * batch), pairs(model, processor, "val", 45)
    counts = {"train": len(train), "own_errors": sum(train["own"]), "held_out": len(val)}
    result = {"settings": settings, "pairs": counts, "before": tested(model, processor, held_out)}
    print(f"{counts}; before: {result['before']['accuracy']:.3f}", flush=True)
    how = {"max_steps": steps, "learning_rate": lr, "beta": beta, "per_device_train_batch_size": batch}
    for name, loss in {"rrpo": {"alpha": alpha}, "dpo": DPO}.items():
        model, processor = loaded()
        trainer, seconds = trained(model, processor, train, val, lora, output_dir=str(out / name), **how, **loss)
        measured = trainer.evaluate()
        model.eval()
        row = {"after": tested(model, processor, held_out), "train_seconds": round(seconds, 1)}
        row |= {k.removeprefix("eval_"): round(v, 4) for k, v in measured.items() if "/" in k or k == "eval_loss"}
        result[name] = row
        print(f"{name}: {row['after']['accuracy']:.3f}, margin {row['rewards/margins']}, KL {row['kl/chosen']}")
    result["seconds"] = {"wall": round(time.perf_counter() - began), "cpu": round(time.process_time())}
    (out / "video_rrpo.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
