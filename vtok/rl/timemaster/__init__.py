"""TimeMaster: a vision-language model that classifies time series by their pictures, tuned by SFT, then by GRPO.

train, test = load("GunPoint")                       # of aeon, or a CSV file
rows = dataset(train)                                # pictures, prompts and answers for TRL's trainers
reward = TimeMasterReward(train.classes)
trainer = GRPOTrainer(model, reward, args=..., train_dataset=rows, processing_class=processor)

`examples/timeseries_grpo.py` runs both stages, dense or on a patched model.
Source: TimeMaster: Training Time-Series Multimodal LLMs to Reason via Reinforcement Learning (2025).
"""

from vtok.rl.timemaster.data import check_length, dataset, describe, limits, stated
from vtok.rl.timemaster.picture import Plot, render, small
from vtok.rl.timemaster.prompts import TAGS, Answer, answer, parse, question
from vtok.rl.timemaster.reward import Guarded, JudgeFailed, TimeMasterReward, Weights, capped, check_reward
from vtok.rl.timemaster.series import Series, check_split, load, read_csv, read_ts, shipped, split

__all__ = [
    "TAGS",
    "Answer",
    "Guarded",
    "JudgeFailed",
    "Plot",
    "Series",
    "TimeMasterReward",
    "Weights",
    "answer",
    "capped",
    "check_length",
    "check_reward",
    "check_split",
    "dataset",
    "describe",
    "limits",
    "load",
    "parse",
    "question",
    "read_csv",
    "read_ts",
    "render",
    "shipped",
    "small",
    "split",
    "stated",
]
