"""RRPO for text, pictures and clips, on TRL's DPOTrainer (https://arxiv.org/abs/2504.12083).

trainer = RRPOTrainer(model, args=RRPOConfig("out", nframes=16), processing_class=processor, train_dataset=pairs)

`PreferenceTrainer` with the objective `RRPO`, and the options that go with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vtok.errors import InvalidValue
from vtok.rl.objectives import RRPO
from vtok.rl.preference import PreferenceConfig, PreferenceTrainer


@dataclass
class RRPOConfig(PreferenceConfig):
    """Options of `RRPOTrainer` beside those of `PreferenceConfig`; the paper's `beta` is 0.1 to 0.9.

    alpha: weight of the KL, >= 0. The KL is a sum over the chosen answer: long answers want less. phrases: "words" by
    default; with "all" and alpha=0 this is DPO. Raises `InvalidValue`."""

    alpha: float = field(default=0.01, metadata={"help": "Weight of the KL to the reference."})
    phrases: str = field(default="words", metadata={"help": "words, tokens, markup or all."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0:
            raise InvalidValue(f"alpha must be >= 0, got alpha={self.alpha!r}.")


class RRPOTrainer(PreferenceTrainer):
    """PreferenceTrainer with RRPO's loss. args: an `RRPOConfig`."""

    _tag_names = ["trl", "rrpo"]
    _name = "RRPO"
    _config = RRPOConfig
    _paper = {  # for model cards
        "title": "Self-alignment of Large Video Language Models with Refined Regularized Preference Optimization",
        "id": "2504.12083",
    }

    def __init__(self, model: Any, ref_model: Any = None, args: RRPOConfig | None = None, *rest: Any, **given: Any):
        args = RRPOConfig("RRPO") if args is None else args
        super().__init__(model, ref_model, args, *rest, objective=RRPO(getattr(args, "alpha", 0.0)), **given)
