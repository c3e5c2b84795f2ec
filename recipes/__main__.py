"""`python -m recipes NAME --out DIR`: train a model by its recipe. Call again after a kill to go on."""

from __future__ import annotations

import argparse
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import torch

from recipes.recipe import train

FAMILIES = {  # model -> module
    "vtok-tiny-llava-next": "llava_next",
    "vtok-tiny-qwen2.5-vl": "qwen2_5_vl",
    "vtok-tiny-internvl": "internvl",
    "vtok-smollm2-llava": "smollm2",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes", description=__doc__)
    parser.add_argument("name", choices=FAMILIES)
    parser.add_argument("--out", type=Path, required=True, help="hub folder to write; the state to go on is beside it")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--start", help="bundled model to begin with; this and the steps are the recipe's if left out")
    parser.add_argument("--tower-steps", type=int, help="steps of the tower's stage")
    parser.add_argument("--steps", type=int, help="steps of the question stage")
    parser.add_argument("--workers", type=int, default=2, help="processes of one CPU thread")
    around = parser.add_argument_group("vtok-smollm2-llava")
    around.add_argument("--tasks", help="names with commas between  [default: all that show pictures or clips]")
    around.add_argument("--tiles", type=int, help="of a picture, of 64 visual tokens each")
    around.add_argument("--many", type=int, help="times as many pictures a part, for a GPU")
    around.add_argument("--device", help="such as cuda: it trains there, and the workers make the pictures")
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    name, out, workers, device = (given.pop(key, None) for key in ("name", "out", "workers", "device"))
    made = import_module(f"recipes.{FAMILIES[name]}")
    if unknown := given.keys() - {field.name for field in fields(made.Recipe)}:
        parser.error(f"{name} takes no --{', --'.join(sorted(unknown))}")
    if "tasks" in given:
        given["tasks"] = {task: made.Recipe().tasks[task] for task in given["tasks"].split(",")}
    more = {} if device is None else {"device": torch.device(device)}
    getattr(made, "train", train)(made.FAMILY, out, made.Recipe(**given), workers, **more)


if __name__ == "__main__":
    main()
