"""The card of a model that was trained on the offline tasks, written from its JSON files, and nothing typed by hand."""

from __future__ import annotations

import json
from pathlib import Path

from vtok.eval.pages import tables
from vtok.eval.pages.card import usage
from vtok.eval.results import judge
from vtok.eval.tasks.task import tasks
from vtok.markdown import percent, table

GUESSES = ("chance", "majority", "question_only")
DRILLS = {"text": "letters on a page"}  # what a recipe teaches the tower alone, beside the tasks


def _share(row: dict) -> list[str]:
    return [f"**{percent(row['accuracy'])}**", f"{percent(row['low'])} to {percent(row['high'])}"]


def _front(kind: str) -> str:
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- {kind}
- vtok
- tiny
- synthetic
---
"""


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


def write(folder: Path) -> Path:
    """Write README.md of a model folder and return its path."""
    name = folder.name
    result, made, config, processor = (
        json.loads((folder / f"{part}.json").read_text()) for part in ("eval", "training", "config", "processor_config")
    )
    recipe, commit, overall = made["recipe"], made["commit"], result["overall"]
    family, described = ARCHITECTURES[config["model_type"]]
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    known = tasks()
    by_task = table(
        ["task", "items", "questions", "exact match %", "95 % interval", "chance", "majority", "question only"],
        [
            [f"`{key}`", row["items"], row["n"], *_share(row), *(percent(row[k]) for k in GUESSES)]
            for key, row in result["tasks"].items()
        ],
    )
    by_category = table(
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
    errors = table(
        ["category", "answer", "said", "times"],
        [
            [f"`{key}`", f"`{answer}`", f"`{said}`", n]
            for key, pairs in result["confusion"].items()
            for answer, said, n in judge.mistakes(pairs)
        ],
    )
    runs = [made]  # the last first; each began with the weights of the next
    while "before" in runs[-1]:
        runs.append(runs[-1]["before"])
    owner = runs[-1]["recipe"]["start"]
    begun = f"from the decoder of `{owner}`" if owner else "from scratch"
    pictures, questions, seconds = (sum(run[k] for run in runs) for k in ("pictures", "questions", "seconds"))
    tower_steps, steps = (
        " + ".join(f"{run['recipe'][k]:,}" for run in reversed(runs)) for k in ("tower_steps", "steps")
    )
    drill = dict.fromkeys(name for run in runs for name in run["recipe"].get("tower_tasks", ()))
    drilled = "".join(f"- `{key}`, for the tower alone: {DRILLS[key]}\n" for key in drill)
    chain = f"It was {len(runs)} runs, each from the weights of the one before.\n" if len(runs) > 1 else ""
    weakest = sorted(result["categories"], key=lambda c: result["categories"][c]["accuracy"])[:3]
    weak = ", ".join(f"`{c}` ({percent(result['categories'][c]['accuracy'])} %)" for c in weakest)
    listed = "\n".join(
        f"- `{key}`: {known[key].title}, version {row['version']}" for key, row in result["tasks"].items()
    )
    card = f"""{_front(config["model_type"])}
# {name}

{family} of {made["parameters"] / 1e6:.1f} million parameters ({megabytes:.1f} MB in float16), trained
{begun} on a CPU by the recipe of commit `{commit}`. It answers short questions about small pictures, pages, charts and
clips, well enough that what a visual-token compressor throws away shows as a wrong answer. It is there to test, teach
and demonstrate such methods on a laptop, offline, in seconds. It is of no use for anything else.

{described(config["vision_config"], config["text_config"], processor)}

## Use

{usage(name, result["demo"])}
With vtok: `model, processor = vtok.zoo.load("{name}")`, then `vtok.patch(model, "divprune", keep=0.25)`.
`demo.png` is `vtok.zoo.DEMO_IMAGE`. Of a clip, say the frames a second: `videos=[frames],
video_metadata=[{{"fps": 4.0, "total_num_frames": 8, "frames_indices": list(range(8))}}], do_sample_frames=False`.

## Accuracy

{overall["n"]:,} held-out questions, each asked alone, greedy: **{percent(overall["accuracy"])} % exact match**
(95 % interval {percent(overall["low"])} to {percent(overall["high"])}, bootstrap over items).

{by_task}

{by_category}

All in percent. Intervals of categories are Wilson's, of tasks from a bootstrap over items. *Chance* draws one of the
possible answers; *majority* gives the answer that training items have most often in this category; *question only* the
one they have most often for this very wording. *Half res.* and *grey* are the model itself on the first
{result["test_set"]["robbed_items"]} items of each task, when pictures and frames are halved and doubled again, and when
they are plain grey.

Reproduce: `vtok zoo eval {name}` (seed {result["test_set"]["seed"]}; drawn, not stored).

{tables.compressed(folder)}## Mistakes

The commonest of each category.

{errors}

## Training

{pictures:,} pictures and clips with {questions:,} questions in {seconds / 3600:.1f} hours in
{made["workers"]} processes of one CPU thread ({made["dtype"]}), Muon at {recipe["matrix_lr"]:g} and AdamW at
{recipe["lr"]:g}, the last {100 * recipe["cooldown"]:.0f} % of each stage falling to 0. First the tower alone, on what
lies in every patch ({tower_steps} steps of {recipe["parts"]} parts), then everything ({steps}
steps): the loss on the answers, {recipe["dense_weight"]} of the dense loss, {recipe["word_weight"]} of a loss that
pulls each visual token towards the embeddings of the words for what it shows, and {recipe["focus_weight"]} of one that
teaches two heads where to look. What lies where is told by the boxes of the questions. The questions of a picture share
a sequence, each blind to the others. The run can be killed and called again; its data is a function of seed and step.
{chain}{made.get("note", "")}
## Data

The training splits of the offline tasks (`vtok tasks list`), judged on their test splits, which share no photo, series,
frame or code with them:

{listed}
{drilled}
Nothing is downloaded: all comes out of installed wheels, whose licences the tasks' cards name.

## Limits

- It knows the questions of these tasks in their wordings, one question a chat, and pictures like theirs. A photo from a
  camera gets a confident and meaningless answer.
- Its weakest categories: {weak}.
- Its redundancy is that of small drawn pictures: what compression costs here ranks methods on this model, and says
  nothing in numbers about models of billions of parameters.
"""
    path = folder / "README.md"
    path.write_text(card)
    return path
