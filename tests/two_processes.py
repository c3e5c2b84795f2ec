"""One step of the trainers of token-level losses, by the processes that there are.

torchrun --nproc_per_node 2 tests/two_processes.py FOLDER
"""

import sys
from pathlib import Path

import torch
from test_alignment_trainers import answer_trainer, pairs, says, trainer_on

from vtok.rl.objectives import LOGO, TDPO, SparsePO
from vtok.rl.supervised import IFT

WRONG = {"rejected_2": [says("assistant", "up"), says("assistant", "a man who throws a ball")]}
PAIRS = {"tdpo": (TDPO(), {}), "sparsepo": (SparsePO(dropout=0.0), {}), "logo": (LOGO(), WRONG)}


def steps(folder: Path, each: int) -> dict[str, dict[str, torch.Tensor]]:
    """Trainer -> weights behind a step on two rows, of which every process has `each`."""
    given = {"per_device_train_batch_size": each, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    found = {}
    for name, (objective, more) in PAIRS.items():
        torch.manual_seed(3)
        data = pairs("picture", **more)
        found[name] = stepped(trainer_on("picture", objective, folder, "divprune", data=data, **given))
    return found | {"ift": stepped(answer_trainer("picture", IFT(), folder, "divprune", **given))}


def stepped(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: p.detach() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = steps(Path(sys.argv[1]), 1)
    if torch.distributed.get_rank() == 0:
        torch.save(made, Path(sys.argv[1]) / "two.pt")
    torch.distributed.destroy_process_group()
