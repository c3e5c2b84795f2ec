"""The model card, written from eval.json and training.json of the model folder, and nothing typed by hand."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from vtok.eval.sweep import BASELINES
from vtok.zoo import DEMO_ANSWER, DEMO_QUESTION, scenes, sources

FRONT = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava-next
- vtok
- tiny
- synthetic
---
"""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _confusion(category: str, pairs: list[list]) -> str:
    """Truth by prediction for a closed list of answers; the commonest mistakes for an open one."""
    known = scenes.ANSWERS[category]
    if known is None:
        wrong = sorted((p for p in pairs if p[0] != p[1]), key=lambda p: (-p[2], p[0]))[:12]
        return _table(["on the label", "read as", "times"], [[f"`{a}`", f"`{p}`", n] for a, p, n in wrong])
    cells: dict = defaultdict(int)
    for truth, predicted, n in pairs:
        cells[truth, predicted if predicted in known else "other"] += n
    columns = [*known, "other"] if any(p == "other" for _, p in cells) else list(known)
    return _table(["truth \\ said", *columns], [[t, *(cells[t, p] or "·" for p in columns)] for t in known])


def _methods(folder: Path, name: str) -> str:
    """What `vtok eval` measured, from sweep.json of the folder; nothing where there is none."""
    file = folder / "sweep.json"
    if not file.is_file():
        return ""
    sweep = json.loads(file.read_text())
    times = _selection_times(folder / "bench.json")
    dense = next(row for row in sweep["cells"] if row["method"] == "dense")
    rows = [row for row in sweep["cells"] if row is not dense]
    parts = [
        f"### {100 * budget:g} % of the tokens\n\n{_at_budget([row for row in rows if row['budget'] == budget], times)}"
        for budget in sorted({row["budget"] for row in rows}, reverse=True)
    ]
    if sweep["refused"]:
        reasons = [f"- `{i['method']}` at {100 * i['budget']:g} %: {i['reason']}" for i in sweep["refused"]]
        parts.append("Not run:\n\n" + "\n".join(reasons))
    count, baselines = sweep["about"]["scenes"], ", ".join(f"`{b}`" for b in BASELINES)
    tables = "\n\n".join(parts)
    return f"""## Compressed

Every training-free method of vtok at the same budget: the mean over decoder layers of kept over all visual
tokens is at most that (*mean keep* is what it was). {dense["n"]:,} questions on the first {count} held-out scenes; the
dense model has {_percent(dense["accuracy"])} % on them. *To dense* and *to best baseline* (of {baselines}, at this
budget) are paired differences in points with 95 % intervals (bootstrap over scenes). FLOPs: of encoder and
prefill, as a fraction of the dense ones, by formula.{_told(folder / "bench.json")}

{tables}

Reproduce: `vtok eval --out DIR --model {name} --scenes {count}`, which writes DIR/sweep.json.

"""


def _selection_times(file: Path) -> dict[int, dict[str, float]]:
    """Visual tokens -> method -> milliseconds of its selection, from what `vtok bench --out` wrote; empty without."""
    if not file.is_file():
        return {}
    return {
        result["visual_tokens"]: {name: 1e3 * row["selection_seconds"] for name, row in result["variants"].items()}
        for result in json.loads(file.read_text())["results"]
    }


def _told(file: Path) -> str:
    if not file.is_file():
        return ""
    about = json.loads(file.read_text())["machine"]
    return f""" *Select at N*: milliseconds of the selection alone, for one
picture of N visual tokens at keep=0.25, in a decoder of 768 dimensions and 8 layers on {about["threads"]} threads of
{about["machine"]} (`{about["command"]}`)."""


def _at_budget(rows: list[dict], times: dict[int, dict[str, float]]) -> str:
    head = [
        "method",
        "mean keep",
        "exact match %",
        "95 % interval",
        "to dense",
        "to best baseline",
        "as dense %",
        "FLOPs",
    ]
    lines = [
        [
            f"`{row['method']}`",
            f"{row['mean_keep']:.3f}",
            f"**{_percent(row['accuracy'])}**",
            "{} to {}".format(*map(_percent, row["interval"])),
            _range(row["to_dense"]),
            _range(row["to_baseline"]) if "to_baseline" in row else "",
            _percent(row["agreement"]),
            f"{row['flops']:.2f}",
            *(f"{of[row['method']]:.1f}" if row["method"] in of else "" for of in times.values()),
        ]
        for row in sorted(rows, key=lambda row: -row["accuracy"])
    ]
    table = _table(head, lines)
    baselines = [row for row in rows if row["method"] in BASELINES]
    if not baselines:
        return table
    best = max(baselines, key=lambda row: row["accuracy"])["method"]
    weak = [f"`{row['method']}`" for row in rows if row not in baselines and row["to_baseline"]["interval"][0] <= 0]
    return f"{table}\n\nNo better than `{best}`, within the interval: {', '.join(weak) or 'none'}."


def _range(row: dict) -> str:
    """A paired difference in points."""
    low, high = row["interval"]
    return f"{100 * row['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def write(folder: Path) -> Path:
    """Write README.md of a model folder and return its path."""
    name = folder.name
    result = json.loads((folder / "eval.json").read_text())
    made = json.loads((folder / "training.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    recipe, test, overall = made["recipe"], result["test_set"], result["overall"]
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    scores = _table(
        [
            "category",
            "n",
            "exact match %",
            "95 % interval",
            "chance",
            "majority",
            "question only",
            "half res.",
            "grey",
        ],
        [
            [
                category,
                row["n"],
                f"**{_percent(row['accuracy'])}**",
                f"{_percent(row['low'])} to {_percent(row['high'])}",
                *(_percent(row[k]) for k in ("chance", "majority", "question_only", "half_resolution", "grey_picture")),
            ]
            for category, row in result["categories"].items()
        ],
    )
    confusion = "\n\n".join(f"### {c}\n\n{_confusion(c, pairs)}" for c, pairs in result["confusion"].items())
    weakest = min(result["categories"], key=lambda c: result["categories"][c]["accuracy"])
    photos = {split: ", ".join(Path(p).stem for p in names) for split, names in sources.PHOTOS.items()}
    card = f"""{FRONT}
# {name}

A LLaVA-NeXT of {made["parameters"] / 1e6:.1f} million parameters ({megabytes:.1f} MB in float16), trained
from scratch on a CPU by `vtok zoo train {name}`. It answers short questions about small pictures, well
enough that what a visual-token compressor throws away shows as a wrong answer. It is there to test, teach
and demonstrate such methods on a laptop, offline, in seconds. It is of no use for anything else.

- vision: CLIP tower with CLS, {vision["num_hidden_layers"]} layers of {vision["hidden_size"]}, views of
  {vision["image_size"]} x {vision["image_size"]} pixels in patches of {vision["patch_size"]}, features of
  layer {config["vision_feature_layer"]}
- anyres: a thumbnail and 2 to 4 crops, pinpoints (height, width) {config["image_grid_pinpoints"]}, unpadding,
  newline tokens: 200 to 336 visual tokens a picture
- language: Llama decoder, {text["num_hidden_layers"]} layers of {text["hidden_size"]},
  {text["num_attention_heads"]} heads; every word it was taught is one token, all else is spelled

## Use

No vtok needed:

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="float32")
processor = AutoProcessor.from_pretrained("{name}")
question = {{"type": "text", "text": "{DEMO_QUESTION}"}}
chat = [{{"role": "user", "content": [{{"type": "image"}}, question]}}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(text=prompt, images=Image.open("demo.png"), return_tensors="pt")
out = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(out, skip_special_tokens=True))  # {DEMO_ANSWER}
```

With vtok: `model, processor = vtok.zoo.load("{name}")`, then `vtok.patch(model, "globalcom2", keep=0.25)`.
`demo.png` is `vtok.zoo.DEMO_IMAGE`.

## Accuracy

{overall["n"]} held-out questions on {test["scenes"]} scenes, one question a category and scene, each asked
alone, greedy: **{_percent(overall["accuracy"])} % exact match** (95 % interval {_percent(overall["low"])}
to {_percent(overall["high"])}, bootstrap over scenes).

{scores}

All in percent. Intervals of categories are Wilson's. *Chance* draws one of the possible answers; *majority*
gives the answer that training scenes have most often in this category; *question only* the one they have
most often for this very wording. *Half res.* and *grey* are the model itself on {test["robbed_scenes"]}
scenes, when the picture is halved and doubled again, and when it is plain grey: what half resolution loses
is what the crops hold and the thumbnail does not. Letter by letter, labels are read with
{_percent(result["letters"]["accuracy"])} %.

Reproduce: `vtok zoo eval {name}` (test set version {test["version"]}, seed {test["seed"]}; drawn, not
stored).

{_methods(folder, name)}## Confusion

{confusion}

## Training

{made["pictures"]:,} pictures with {made["questions"]:,} questions in {made["seconds"] / 60:.0f} minutes in
{made["workers"]} processes of one CPU thread (bfloat16 autocast), AdamW at {recipe["lr"]:g} with cosine
decay. First the tower alone, on what lies in every patch ({recipe["tower_steps"]} steps of
{recipe["tower_batch"]} pictures), then everything ({recipe["steps"]} steps of {recipe["batch"]}): the loss
on the answers, plus {recipe["dense_weight"]} of the dense loss and of a loss that pulls each visual token
towards the embeddings of the words for what it shows. The questions of a picture share a sequence, each
blind to the others. The run can be killed and called again; its data is a function of seed and step.
{made.get("note", "")} ## Data

Drawn by `vtok.zoo.scenes`; no download, nothing but what installed wheels carry. Background photos are cut
from those of scikit-image and scikit-learn; digits are scikit-learn's handwritten ones; plots show windows
of real UCR series that aeon carries ({", ".join(sources.SERIES)}). Coloured shapes and labels of two or
three letters from `{scenes.ALPHABET}` are drawn on top.

Train, validation and test share no photo, no label text, no digit sample and no series. The photos:

- train: {photos["train"]}
- val: {photos["val"]}
- test: {photos["test"]}

## Limits

- It knows its {len(scenes.CATEGORIES)} kinds of question in the wordings of `scenes.PHRASES`, one question
  a chat, and pictures like its own. A photo from a camera gets a confident and meaningless answer.
- {weakest.capitalize()} is its weakest category
  ({_percent(result["categories"][weakest]["accuracy"])} %).
- Its redundancy is that of small drawn scenes: what compression costs here ranks methods on this model, and
  says nothing in numbers about models of billions of parameters.
"""
    path = folder / "README.md"
    path.write_text(card)
    return path
