"""`python -m recipes NAME --out DIR`: train a model by its recipe. Call again after a kill to go on."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

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
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    name, out, workers = (given.pop(key) for key in ("name", "out", "workers"))
    made = import_module(f"recipes.{FAMILIES[name]}")
    getattr(made, "train", train)(made.FAMILY, out, made.Recipe(**given), workers)


if __name__ == "__main__":
    main()
