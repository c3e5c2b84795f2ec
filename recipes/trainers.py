"""The page of trainers: every method with TRL's and transformers' trainers, on tiny models.

    python -m recipes.trainers table --out docs/rl/trainers.json [--methods divprune,fastv]
    torchrun --nproc_per_node 2 -m recipes.trainers losses divprune --batch 2

Goes on where it stopped, and writes the page beside the folder, docs/trainers.md. A cell is a run of that trainer on a
patched model of four decoder layers with random weights; its number is what must be small. `vtok.rl.prepare` is called
before each training.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from datasets import Dataset
from PIL import Image
from rich.progress import track
from scipy.stats import mannwhitneyu
from torch import nn

import vtok
from vtok import adapter as adapters
from vtok import compressor as compressors
from vtok.errors import VtokError
from vtok.eval.results.statistics import holm
from vtok.markdown import table

FAMILIES = ("qwen2_5_vl", "llava_next")  # the first that gives what a method needs
TOKENS = 64
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
SMALL = {"per_device_train_batch_size": 2, "max_steps": 1, "save_strategy": "no", "learning_rate": 1e-4}


app = typer.Typer(help=__doc__)


@cache
def folder(family: str) -> Path:
    """A tiny model's checkpoint, where trainers find its reference."""
    torch.manual_seed(0)
    model, processor = adapters.load_all()[family].tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # so that what a token sees matters to it
    place = Path(tempfile.mkdtemp())
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


def load(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder(family), dtype=dtype)
    return model, AutoProcessor.from_pretrained(folder(family))


def patched(family: str, name: str | None, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    model, processor = load(family, dtype)
    if name is not None:
        cls = compressors.find(name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vtok.patch(model, cls(**{**cls.examples[0], **cls.small_weights(model)}))
    return model, processor


def pictures(n: int = 4) -> list[Image.Image]:
    sizes = [(70, 112), (56, 84), (112, 70), (84, 84)]
    return [Image.fromarray(np.random.default_rng(i).integers(0, 255, (*sizes[i % 4], 3), "uint8")) for i in range(n)]


def rows(**columns: Any) -> Dataset:
    prompts = [[{"role": "user", "content": f"What is it? {'x ' * i}"}] for i in range(4)]
    return Dataset.from_dict({"prompt": prompts, "images": [[p] for p in pictures()], **columns})


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


# ---- one function a column: the number of a method ------------------------------------------------------------------
def agreement(dtype: torch.dtype, rollouts: int, family: str, name: str | None) -> list[float]:
    """The largest |log-probability in the rollout - in the training forward| of sampled tokens, TOKENS a prompt, of
    each of so many rollouts."""
    return [_agreement(dtype, family, name, seed) for seed in range(rollouts)]


def _agreement(dtype: torch.dtype, family: str, name: str | None, seed: int) -> float:
    from trl.trainer.utils import add_fused_lm_head

    from vtok.patching import patches_on
    from vtok.prompts import ask, encode

    model, processor = patched(family, name, dtype)
    model.eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    inputs = encode(processor, [ask(f"What is it? {'x ' * i}", p) for i, p in enumerate(pictures())])
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    banned = [i for name in names if (i := getattr(model.config, name, None)) is not None]
    torch.manual_seed(seed)
    how = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": True, "top_k": 0}
    how |= {"output_logits": True, "return_dict_in_generate": True, "suppress_tokens": banned}
    with torch.no_grad():
        rollout = model.generate(**inputs, **how)
    ids, prompt = rollout.sequences, inputs["input_ids"].shape[1]
    answer = ids[:, prompt:]
    first = torch.stack(rollout.logits, 1).float().log_softmax(-1).gather(-1, answer[..., None]).squeeze(-1)
    full = {**inputs, "input_ids": ids}
    for key in ("attention_mask", "mm_token_type_ids"):
        if key in inputs:
            full[key] = torch.cat([inputs[key], torch.full_like(answer, int(key == "attention_mask"))], 1)
    labels = ids.clone()
    labels[:, :prompt] = -100
    worst = 0.0
    kept = patches_on(model)[0].trace.kept() if name is not None else None
    for some in ([0, 1, 2, 3], [2], [3, 1]):  # other batches than the rollout's
        part = {k: v[some] for k, v in full.items() if k not in ("pixel_values", "image_grid_thw")}
        part |= _pictures_of(full, some)
        with torch.no_grad():
            if kept is None:
                again = model(**part, labels=labels[some], fused_lm_head=True).log_probs
            else:
                with patches_on(model)[0].replaying([kept[i] for i in some]):
                    again = model(**part, labels=labels[some], fused_lm_head=True).log_probs
        worst = max(worst, float((again[:, -TOKENS:].float() - first[some]).abs().max()))
    return worst


def _pictures_of(inputs: dict[str, Any], some: list[int]) -> dict[str, Any]:
    pixels = inputs["pixel_values"]
    if "image_grid_thw" not in inputs:
        return {"pixel_values": pixels[some]}
    grids = inputs["image_grid_thw"]
    split = pixels.split(grids.prod(1).tolist())
    return {"pixel_values": torch.cat([split[i] for i in some]), "image_grid_thw": grids[some]}


def _logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def online(kind: str, family: str, name: str, **settings: Any) -> Any:
    """A GRPO or RLOO trainer behind its training."""
    import trl

    model, processor = patched(family, name)
    few = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 8, "num_iterations": 2}
    out = tempfile.mkdtemp()
    args = getattr(trl, f"{kind}Config")(out, **QUIET | SMALL | few | {"max_steps": 2} | settings)
    reward = lambda completion_ids, **columns: [float(sum(ids) % 5) for ids in completion_ids]
    trainer = getattr(trl, f"{kind}Trainer")(model, reward, args=args, train_dataset=rows(), processing_class=processor)
    vtok.rl.prepare(trainer)
    trainer.train()
    return trainer


def grpo(family: str, name: str) -> float:
    """|KL to the reference| in the first step of GRPO: two iterations of a rollout, two accumulated batches."""
    settings = {"beta": 0.1, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    return abs(_logged(online("GRPO", family, name, **settings), "kl")[0])


def rloo(family: str, name: str) -> float:
    """|KL to the reference| in the first step of RLOO."""
    return abs(_logged(online("RLOO", family, name, beta=0.1), "kl")[0])


def pairs() -> Dataset:
    return rows(chosen=said(*["a red cat"] * 4), rejected=said(*["blue"] * 4))


def dpo(family: str, name: str) -> float:
    """|loss - ln 2| of DPO's first step."""
    from trl import DPOConfig, DPOTrainer

    model, processor = patched(family, name)
    args = DPOConfig(tempfile.mkdtemp(), max_length=None, **QUIET | SMALL)
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=processor)
    vtok.rl.prepare(trainer)
    trainer.train()
    return abs(_logged(trainer, "loss")[0] - math.log(2))


def rrpo(family: str, name: str) -> float:
    """|loss - ln 2| of RRPO's first step."""
    model, processor = patched(family, name)
    args = vtok.rl.RRPOConfig(tempfile.mkdtemp(), **QUIET | SMALL)
    trainer = vtok.rl.RRPOTrainer(model, args=args, train_dataset=pairs(), processing_class=processor)
    vtok.rl.prepare(trainer)
    trainer.train()
    return abs(_logged(trainer, "loss")[0] - math.log(2))


def supervised(family: str, name: str, folder: Any = None, resume: Any = None, **settings: Any) -> list[float]:
    """Losses of SFTTrainer, one a step."""
    from trl import SFTConfig, SFTTrainer

    lora, answers = settings.pop("peft_config", None), settings.pop("answers", ("a red cat",) * 4)
    model, processor = patched(family, name)
    chat = rows(completion=said(*answers))
    how = {"max_length": None, "completion_only_loss": True, "seed": 0, "max_steps": 3}
    args = SFTConfig(folder or tempfile.mkdtemp(), **QUIET | SMALL | how | settings)
    trainer = SFTTrainer(model, args=args, train_dataset=chat, processing_class=processor, peft_config=lora)
    vtok.rl.prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return _logged(trainer, "loss")


def checkpointing(family: str, name: str) -> float:
    """The largest difference of SFT's losses with and without gradient checkpointing."""
    plain, again = (supervised(family, name, gradient_checkpointing=on) for on in (False, True))
    return max(abs(a - b) for a, b in zip(plain, again, strict=True))


def resumed(family: str, name: str) -> float:
    """The largest difference of SFT's losses run through, and stopped behind two steps of three and resumed."""
    plain = supervised(family, name)
    place = tempfile.mkdtemp()
    saving = {"save_strategy": "steps", "save_steps": 2}
    supervised(family, name, place, **saving)
    again = supervised(family, name, place, f"{place}/checkpoint-2")
    return abs(plain[-1] - again[-1])


def lora(family: str, name: str) -> float:
    """The difference of SFT's first loss with a fresh adapter, and without."""
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    return abs(supervised(family, name, max_steps=1)[0] - supervised(family, name, max_steps=1, peft_config=adapter)[0])


HALF = "rollout, bf16"
COLUMNS: dict[str, Callable[..., float | list[float]]] = {
    "rollout, fp32": partial(agreement, torch.float32, 1),
    HALF: partial(agreement, torch.bfloat16, 10),
    "GRPO": grpo,
    "RLOO": rloo,
    "DPO": dpo,
    "RRPO": rrpo,
    "SFT, checkpointing": checkpointing,
    "SFT, resumed": resumed,
    "SFT, LoRA": lora,
}


HEAD = """# Trainers

Written by `python -m recipes.trainers table --out docs/rl/trainers.json`; nothing here is typed by hand. Each cell is a
run on a tiny random model of four decoder layers, fp32 unless said otherwise, on a CPU, with
`vtok.rl.prepare(trainer)`. Each number is what must be small:

- *rollout*: the largest |log-probability in the rollout - in the training forward| of {tokens} sampled tokens a prompt,
  over other batches than the rollout's, what the rollout kept being replayed; in bf16 the median of ten rollouts.
  To be compared with the dense model of the same family, which the last line does.
- *GRPO*, *RLOO*: |KL to the reference| in the first step, with `beta=0.1`; for GRPO two iterations of a rollout and two
  accumulated batches.
- *DPO*, *RRPO*: |loss - ln 2| in the first step.
- *SFT*: differences of the loss with and without gradient checkpointing; of a run through and one that was stopped and
  resumed; with and without a fresh LoRA adapter.
"""


def page(result: dict[str, dict[str, Any]]) -> str:
    """The page of all cells, with what was refused below."""
    lines, refused = [], {}
    for name, row in result.items():
        numbers = [row.get(column) for column in COLUMNS]
        lines.append([f"`{name}`", row["family"], *map(_shown, numbers)])
        for column, x in zip(COLUMNS, numbers):
            if isinstance(x, str):
                refused.setdefault((name, x), []).append(column)
    head = HEAD.format(tokens=TOKENS)
    told = [f"- `{name}`, {', '.join(columns)}: {reason}" for (name, reason), columns in refused.items()]
    return "\n".join([head, table(["method", "on", *COLUMNS], lines), "", *told, "", _against_dense(result), ""])


def _shown(x: Any) -> str:
    if isinstance(x, list):
        x = statistics.median(x)
    return f"{x:.1e}" if isinstance(x, float) else "" if x is None else "refused"


def _against_dense(result: dict[str, dict[str, Any]]) -> str:
    """Which methods' rollouts in bf16 are farther from training than the dense model's, beyond chance."""
    tested = {name: row for name, row in result.items() if isinstance(row.get(HALF), list) and "dense" not in name}
    dense = {name: result[f"dense {row['family']}"][HALF] for name, row in tested.items()}
    p = holm([mannwhitneyu(row[HALF], dense[name], alternative="greater").pvalue for name, row in tested.items()])
    more = [f"`{name}` (p = {x:.2g})" for name, x in zip(tested, p) if x < 0.05]
    return (
        f"In bf16, farther from the rollout than the dense model of the family (one-sided Mann-Whitney tests of each "
        f"method's rollouts, {len(tested)} methods, Holm's correction, p below .05): {', '.join(more) or 'none'}. Ten "
        f"rollouts see large differences alone; `python -m recipes.trainers rollouts METHOD` draws sixty."
    )


@app.command(name="table")
def write_table(
    out: Annotated[Path, typer.Option(help="JSON file to write, and to go on from.")],
    methods: Annotated[str, typer.Option(metavar="NAME,...", help="Left out: all.")] = "",
) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = vtok.available()["compressors"]
    names = methods.split(",") if methods else list(found)
    result = json.loads(out.read_text()) if out.is_file() else {}
    for family in FAMILIES:
        row = result.setdefault(f"dense {family}", {"family": family})
        for column in ("rollout, fp32", "rollout, bf16"):
            if column not in row:
                row[column] = COLUMNS[column](family, None)
    for name, column in track([(name, column) for name in names for column in COLUMNS], description="trainers"):
        row = result.setdefault(name, {})
        if column in row:
            continue
        family = next((f for f in FAMILIES if f in found[name]["families"]), None)
        row["family"] = family
        try:
            row[column] = "no family here" if family is None else COLUMNS[column](family, name)
        except VtokError as error:
            row[column] = str(error)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    result = dict(sorted(result.items(), key=lambda row: (not row[0].startswith("dense "), row[0])))
    out.write_text(json.dumps(result, indent=1) + "\n")
    out.parent.with_name("trainers.md").write_text(page(result))


@app.command()
def rollouts(method: str, count: int = 60, first: Annotated[int, typer.Option(help="The first seed.")] = 100) -> None:
    """How far training is from so many rollouts in bf16, of a method and of the dense model of its family."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = vtok.available()["compressors"][method]["families"]
    family = next(name for name in FAMILIES if name in found)
    both = [[_agreement(torch.bfloat16, family, name, first + i) for i in range(count)] for name in (None, method)]
    p = mannwhitneyu(both[1], both[0], alternative="greater").pvalue
    dense, mine = map(statistics.median, both)
    print(f"{method}: {mine:.4f}, dense {family}: {dense:.4f}, medians of {count}; one-sided Mann-Whitney p = {p:.2g}")


@app.command()
def losses(
    method: str,
    batch: Annotated[int, typer.Option(help="Rows of each process, of four in all.")] = 4,
    ragged: Annotated[bool, typer.Option("--ragged", help="Answers of unequal length.")] = False,
) -> None:
    """The losses of three steps of SFT, to be compared between one process and two."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    answers = ("a red cat", "blue", "a dog", "it") if ragged else ("a red cat",) * 4
    found = supervised(FAMILIES[0], method, per_device_train_batch_size=batch, answers=answers)
    if int(os.environ.get("RANK", 0)) == 0:
        print(method, found)


if __name__ == "__main__":
    app()
