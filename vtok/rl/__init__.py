"""Fine-tuning of time-series and video models by RL, on TRL's trainers (extra `rl`).

Importing this package imports neither torch nor TRL; the names below do so when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AnswerTrainer": "vtok.rl.supervised",
    "PreferenceConfig": "vtok.rl.preference",
    "PreferenceTrainer": "vtok.rl.preference",
    "RRPOConfig": "vtok.rl.rrpo",
    "PatchCallback": "vtok.rl.reference",
    "RRPOTrainer": "vtok.rl.rrpo",
    "RandomKeep": "vtok.rl.reference",
    "VideoGRPOTrainer": "vtok.rl.video",
    "encode_once": "vtok.rl.towers",
    "patch_reference": "vtok.rl.reference",
    "prepare": "vtok.rl.reference",
    "replay": "vtok.rl.rollouts",
    "token_advantages": "vtok.rl.advantages",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vtok.rl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOMES)
