"""The model card, written from eval.json and training.json of the model folder, and nothing typed by hand."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from vtok.eval.pages import tables
from vtok.eval.tasks import scenes, sources
from vtok.markdown import percent, table
from vtok.zoo import DEMO_ANSWER, DEMO_QUESTION

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


def usage(name: str, said: str) -> str:
    """How to ask a model of the hub about the demo's picture without vtok; `said` is what it answers."""
    return f"""No vtok needed:

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
print(processor.decode(out, skip_special_tokens=True).strip())  # {said}
```
"""


def _confusion(category: str, pairs: list[list]) -> str:
    """Truth by prediction for a closed list of answers; the commonest mistakes for an open one."""
    known = scenes.ANSWERS[category]
    if known is None:
        wrong = sorted((p for p in pairs if p[0] != p[1]), key=lambda p: (-p[2], p[0]))[:12]
        return table(["on the label", "read as", "times"], [[f"`{a}`", f"`{p}`", n] for a, p, n in wrong])
    cells: dict = defaultdict(int)
    for truth, predicted, n in pairs:
        cells[truth, predicted if predicted in known else "other"] += n
    columns = [*known, "other"] if any(p == "other" for _, p in cells) else list(known)
    return table(["truth \\ said", *columns], [[t, *(cells[t, p] or "·" for p in columns)] for t in known])


def write(folder: Path) -> Path:
    """Write README.md of a model folder and return its path."""
    name = folder.name
    result = json.loads((folder / "eval.json").read_text())
    made = json.loads((folder / "training.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    recipe, test, overall = made["recipe"], result["test_set"] | result["tasks"]["scenes"], result["overall"]
    plain = lambda rows: {key.removeprefix("scenes/"): row for key, row in rows.items()}
    categories, pairs_of = plain(result["categories"]), plain(result["confusion"])
    letters = [(a == p, n) for truth, said, n in pairs_of["reading"] for a, p in zip(truth, said.ljust(3))]
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    scores = table(
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
                f"**{percent(row['accuracy'])}**",
                f"{percent(row['low'])} to {percent(row['high'])}",
                *(percent(row[k]) for k in ("chance", "majority", "question_only", "half_resolution", "grey_picture")),
            ]
            for category, row in categories.items()
        ],
    )
    confusion = "\n\n".join(f"### {c}\n\n{_confusion(c, pairs)}" for c, pairs in pairs_of.items())
    weakest = min(categories, key=lambda c: categories[c]["accuracy"])
    photos = {split: ", ".join(Path(p).stem for p in names) for split, names in sources.PHOTOS.items()}
    card = f"""{FRONT}
# {name}

A LLaVA-NeXT of {made["parameters"] / 1e6:.1f} million parameters ({megabytes:.1f} MB in float16), trained
from scratch on a CPU by the recipe of commit `{made["commit"]}`. It answers short questions about small pictures, well
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

{usage(name, DEMO_ANSWER)}
With vtok: `model, processor = vtok.zoo.load("{name}")`, then `vtok.patch(model, "globalcom2", keep=0.25)`.
`demo.png` is `vtok.zoo.DEMO_IMAGE`.

## Accuracy

{overall["n"]} held-out questions on {test["items"]} scenes, one question a category and scene, each asked
alone, greedy: **{percent(overall["accuracy"])} % exact match** (95 % interval {percent(overall["low"])}
to {percent(overall["high"])}, bootstrap over scenes).

{scores}

All in percent. Intervals of categories are Wilson's. *Chance* draws one of the possible answers; *majority*
gives the answer that training scenes have most often in this category; *question only* the one they have
most often for this very wording. *Half res.* and *grey* are the model itself on {test["robbed_items"]}
scenes, when the picture is halved and doubled again, and when it is plain grey: what half resolution loses
is what the crops hold and the thumbnail does not. Letter by letter, labels are read with
{percent(sum(n for right, n in letters if right) / sum(n for _, n in letters))} %.

Reproduce: `vtok zoo eval {name}` (test set version {test["version"]}, seed {test["seed"]}; drawn, not
stored).

{tables.compressed(folder)}## Confusion

{confusion}

## Training

{made["pictures"]:,} pictures with {made["questions"]:,} questions in {made["seconds"] / 60:.0f} minutes in
{made["workers"]} processes of one CPU thread ({made["dtype"]}), AdamW at {recipe["lr"]:g} with cosine
decay. First the tower alone, on what lies in every patch ({recipe["tower_steps"]} steps of
{recipe["tower_batch"]} pictures), then everything ({recipe["steps"]} steps of {recipe["batch"]}): the loss
on the answers, plus {recipe["dense_weight"]} of the dense loss and of a loss that pulls each visual token
towards the embeddings of the words for what it shows. The questions of a picture share a sequence, each
blind to the others. The run can be killed and called again; its data is a function of seed and step.
{made.get("note", "")} ## Data

Drawn by `eval/tasks/scenes.py`; no download, nothing but what installed wheels carry. Background photos are cut
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
  ({percent(categories[weakest]["accuracy"])} %).
- Its redundancy is that of small drawn scenes: what compression costs here ranks methods on this model, and
  says nothing in numbers about models of billions of parameters.
"""
    path = folder / "README.md"
    path.write_text(card)
    return path
