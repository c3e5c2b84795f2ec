"""The training loop of all recipes: stages of steps, shared out to a team, resumable after a kill at any point."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtok.zoo.team import Team

# In bfloat16 a CPU without instructions for it is twenty times slower than in float32.
DTYPE = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=DTYPE is torch.bfloat16)
COUNTS = ("pictures", "questions")
Answer = dict[str, float]  # of one part: the numbers of "pictures" and "questions", and losses for the log


@dataclass(frozen=True)
class Stage:
    """`loss(index)` is the loss of one part and what the log says of it; its data is a function of the index alone."""

    name: str
    steps: int
    parts: int  # parts a step
    modules: Mapping[nn.Module, float]  # what is trained, each with a factor on the learning rate
    loss: Callable[[int], tuple[torch.Tensor, Answer]]
    kind: Callable[[int], Hashable]  # of a part; those of a kind take about as long
    check: Callable[[], dict[str, float]] | None = None  # accuracies on validation pictures, for the log
    check_every: int = 500


@dataclass(frozen=True)
class Trained:
    """What is trained and how: `heads` are for training only, `processor` is saved with the model."""

    model: nn.Module
    heads: nn.Module
    processor: Any
    recipe: Any  # a dataclass with the settings
    optimisers: Callable[[Mapping[nn.Module, float]], list[torch.optim.Optimizer]]  # each group with its "peak" rate
    rate: Callable[[int, int], float]  # share of the peak learning rate at a step of so many
    before: dict[str, Any] | None = None  # training.json of the weights that it begins with


def fit(
    trained: Trained,
    stages: list[Stage],
    out: Path,
    workers: int = 2,
    stop_after: int | None = None,
    checkpoint_every: float = 180,
    log: Callable = print,
) -> None:
    """Train into the hub folder `out`. The state to go on from lies in `out`.ckpt.

    `stop_after` steps of this call it saves and returns, as if killed; `checkpoint_every` is in seconds.
    """
    model, heads = trained.model, trained.heads
    path = state_file(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"stage": 0, "step": 0, "pictures": 0, "questions": 0, "seconds": 0.0, "optimisers": None}
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state.pop("model"))
        heads.load_state_dict(state.pop("heads"))
        log(f"resumed at stage {state['stage']}, step {state['step']}")
    done = 0

    def save(optimisers):
        weights = {"model": model.state_dict(), "heads": heads.state_dict()}
        torch.save(state | weights | {"optimisers": [o.state_dict() for o in optimisers]}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        if state["stage"] == len(stages) - 1:
            export(model, trained.processor, out)
            made = {k: state[k] for k in (*COUNTS, "seconds", "step")}
            made |= {"recipe": asdict(trained.recipe), "parameters": sum(p.numel() for p in model.parameters())}
            made |= {"workers": workers, "torch": torch.__version__, "dtype": str(DTYPE).removeprefix("torch.")}
            made |= {"before": trained.before} if trained.before else {}
            (out / "training.json").write_text(json.dumps(made, indent=1) + "\n")

    for number, stage in enumerate(stages):
        if number < state["stage"]:
            continue
        weights = [p for module in stage.modules for p in module.parameters()]
        optimisers = trained.optimisers(stage.modules)
        if number > state["stage"]:
            state |= {"stage": number, "step": 0, "optimisers": None}
        for optimiser, saved in zip(optimisers, state["optimisers"] or ()):
            optimiser.load_state_dict(saved)
        team = Team(workers, weights, stage.loss, stage.kind)
        torch.set_num_threads(workers)  # for the optimisers, while the team waits
        clock = saved = began = time.time()
        sums: dict[str, list[float]] = {}
        for step in range(state["step"], stage.steps):
            for group in (group for optimiser in optimisers for group in optimiser.param_groups):
                group["lr"] = group["peak"] * trained.rate(step, stage.steps)
            answers = team.step(range(step * stage.parts, (step + 1) * stage.parts))
            nn.utils.clip_grad_norm_(weights, 1.0)
            for optimiser in optimisers:
                optimiser.step()
            for name in {name for answer in answers for name in answer}:
                some = [answer[name] for answer in answers if name in answer]
                sums.setdefault(name, []).append(sum(some) / (1 if name in COUNTS else len(some)))
            done += 1
            state["step"] = step + 1
            for name in COUNTS:
                state[name] += sum(answer.get(name, 0) for answer in answers)
            state["seconds"], began = state["seconds"] + time.time() - began, time.time()
            if state["step"] % 50 == 0:
                speed, clock = sum(sums["pictures"]) / (time.time() - clock), time.time()
                means = "  ".join(f"{k} {sum(v) / len(v):.3f}" for k, v in sorted(sums.items()) if k not in COUNTS)
                sums.clear()
                log(
                    f"{time.strftime('%H:%M:%S')} {stage.name} {state['step']}/{stage.steps}"
                    f" pictures/s {speed:.1f}  {means}"
                )
            if stage.check and state["step"] % stage.check_every == 0:
                scores = stage.check()
                mean = sum(scores.values()) / len(scores)
                log(f"val {mean:.3f}  " + "  ".join(f"{name} {share:.2f}" for name, share in scores.items()))
                clock = time.time()
            if time.time() - saved > checkpoint_every or state["step"] == stage.steps or done == stop_after:
                save(optimisers)
                saved = time.time()
            if done == stop_after:
                break
        team.stop()
        torch.set_num_threads(1)  # the next team is forked
        if done == stop_after:
            return


def state_file(out: Path) -> Path:
    """Where the run that writes the hub folder `out` keeps the state to go on from."""
    return out.with_name(out.name + ".ckpt") / "state.pt"


def export(model, processor, out: Path) -> None:
    """Write the hub folder: float16 weights, configuration, tokenizer, processor, chat template."""
    half = copy.deepcopy(model).half()
    half.set_attn_implementation("sdpa")
    half.save_pretrained(out)
    processor.save_pretrained(out)
