"""The card of a model that was trained on the offline tasks, written from its JSON files, and nothing typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtok.eval.pages.card_tables import card
from vtok.eval.results import judge
from vtok.eval.tasks.task import tasks
from vtok.markdown import percent, table

GUESSES = ("chance", "majority", "question_only")
DRILLS = {"text": "letters on a page"}  # what a recipe teaches the tower alone, beside the tasks


def _share(row: dict) -> list[str]:
    return [f"**{percent(row['accuracy'])}**", f"{percent(row['low'])} to {percent(row['high'])}"]


def _qwen(vision: dict, text: dict, processor: dict) -> str:
    patch, merge = vision["patch_size"], vision["spatial_merge_size"]
    full = " and ".join(str(n) for n in vision["fullatt_block_indexes"])
    return f"""- vision: native resolution, patches of {patch} pixels, {merge} x {merge} of them a token,
  {vision["temporal_patch_size"]} frames of a clip a token; {vision["depth"]} layers of {vision["hidden_size"]},
  attention in windows of {vision["window_size"]} pixels but for layers {full}
- language: {text["num_hidden_layers"]} layers of {text["hidden_size"]}, {text["num_attention_heads"]} heads,
  M-RoPE with sections {text["rope_parameters"]["mrope_section"]}; every word it was taught is one token, all else is
  spelled"""


def _internvl(vision: dict, text: dict, processor: dict) -> str:
    side, patch, tokens = vision["image_size"][0], vision["patch_size"][0], processor["image_seq_length"]
    tiles = processor["image_processor"]["max_patches"]
    return f"""- vision: a picture is spread over 1 to {tiles} tiles of {side} x {side} pixels, a thumbnail where
  there are several; a frame of a clip is one tile; InternViT, {vision["num_hidden_layers"]} layers of
  {vision["hidden_size"]}, patches of {patch} pixels; by pixel shuffle {tokens} tokens a tile; training asks its CLS
  token what its tile shows, so that its attention, by which `globalcom2`, `tcc` and `visionzip` rank, looks there
- language: Qwen2 decoder, {text["num_hidden_layers"]} layers of {text["hidden_size"]},
  {text["num_attention_heads"]} heads; every word it was taught is one token, all else is spelled"""


def _llava(vision: dict, text: dict, processor: dict) -> str:
    views = processor["image_processor"]["image_grid_pinpoints"]
    return f"""- vision: CLIP tower with CLS, {vision["num_hidden_layers"]} layers of {vision["hidden_size"]}, views of
  {vision["image_size"]} x {vision["image_size"]} pixels in patches of {vision["patch_size"]}; a thumbnail and crops,
  pinpoints (height, width) {views}, unpadding, newline tokens
- language: Llama decoder, {text["num_hidden_layers"]} layers of {text["hidden_size"]},
  {text["num_attention_heads"]} heads; every word it was taught is one token, all else is spelled"""


ARCHITECTURES = {
    "llava_next": ("A LLaVA-NeXT", _llava),
    "qwen2_5_vl": ("A Qwen2.5-VL", _qwen),
    "internvl": ("An InternVL", _internvl),
}


def text(folder: Path) -> str:
    """The card of a model folder."""
    result, made, config, processor = (
        json.loads((folder / f"{part}.json").read_text()) for part in ("eval", "training", "config", "processor_config")
    )
    family, described = ARCHITECTURES[config["model_type"]]
    weakest = sorted(result["categories"], key=lambda c: result["categories"][c]["accuracy"])[:3]
    known = tasks()
    return card(
        "task_card.md.j2",
        folder,
        result=result,
        made=made,
        config=config,
        family=family,
        described=described(config["vision_config"], config["text_config"], processor),
        by_task=by_task(result),
        by_category=by_category(result),
        errors=mistakes_by_category(result),
        weak=", ".join(f"`{c}` ({percent(result['categories'][c]['accuracy'])} %)" for c in weakest),
        listed="\n".join(
            f"- `{key}`: {known[key].title}, version {row['version']}" for key, row in result["tasks"].items()
        ),
        **_history(made),
    )


def by_task(result: dict) -> str:
    return table(
        ["task", "items", "questions", "exact match %", "95 % interval", "chance", "majority", "question only"],
        [
            [f"`{key}`", row["items"], row["n"], *_share(row), *(percent(row[k]) for k in GUESSES)]
            for key, row in result["tasks"].items()
        ],
    )


def by_category(result: dict) -> str:
    return table(
        ["category", "n", "exact match %", "95 % interval", "chance", "majority", "question only", "half res.", "grey"],
        [
            [
                f"`{key}`",
                row["n"],
                *_share(row),
                *(percent(row[k]) for k in GUESSES),
                *("" if row[k] is None else percent(row[k]) for k in ("half_resolution", "grey_picture")),
            ]
            for key, row in result["categories"].items()
        ],
    )


def mistakes_by_category(result: dict) -> str:
    return table(
        ["category", "answer", "said", "times"],
        [
            [f"`{key}`", f"`{answer}`", f"`{said}`", n]
            for key, pairs in result["confusion"].items()
            for answer, said, n in judge.mistakes(pairs)
        ],
    )


def runs_of(made: dict) -> list[dict]:
    """The runs of a training, the last first, each of which began with the weights of the one before."""
    runs = [made]
    while "before" in runs[-1]:
        runs.append(runs[-1]["before"])
    return runs


def _history(made: dict) -> dict[str, Any]:
    """What all runs of the training amount to, each of which began with the weights of the one before."""
    runs = runs_of(made)
    owner = runs[-1]["recipe"]["start"]
    drill = dict.fromkeys(name for run in runs for name in run["recipe"].get("tower_tasks", ()))
    sums = {k: sum(run[k] for run in runs) for k in ("pictures", "questions", "seconds")}
    steps = {k: " + ".join(f"{run['recipe'][k]:,}" for run in reversed(runs)) for k in ("tower_steps", "steps")}
    return {
        "begun": f"from the decoder of `{owner}`" if owner else "from scratch",
        "drilled": "".join(f"- `{key}`, for the tower alone: {DRILLS[key]}\n" for key in drill),
        "chain": f"It was {len(runs)} runs, each from the weights of the one before.\n" if len(runs) > 1 else "",
        **sums,
        **steps,
    }
