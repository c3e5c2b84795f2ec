"""The training loop: stages of steps, shared out to worker processes, resumable after a kill at any point."""

from __future__ import annotations

import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing, nn
from torch.utils.data import DataLoader

from vtok.eval.bench.machine import commit

# In bfloat16 a CPU without instructions for it is several times slower than in float32.
FAST = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
DTYPE = torch.bfloat16 if FAST else torch.float32


def dtype_on(device: torch.device) -> torch.dtype:
    """In which a loss is computed there."""
    return torch.bfloat16 if device.type == "cuda" else DTYPE


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype_on(device) is torch.bfloat16)


COUNTS = ("pictures", "questions")
Answer = dict[str, float]  # of one part: the numbers of "pictures" and "questions", and losses for the log
LOG_EVERY, CHECK_EVERY = 50, 500  # steps


@dataclass(frozen=True)
class Stage:
    """`loss(data[index])` is the loss of one part and what the log says of it; a part's data is a function of its index
    alone."""

    name: str
    steps: int
    parts: int  # parts a step
    modules: Mapping[nn.Module, float]  # what is trained, each with a factor on the learning rate
    data: Any  # what `recipes.batches.Parts` is; `kind(index)`: parts of a kind take about as long
    loss: Callable[[Any], tuple[torch.Tensor, Answer]]
    check: Callable[[], dict[str, float]] | None = None  # accuracies on validation pictures, for the log
    check_every: int = CHECK_EVERY  # steps


def _pretrained(half: nn.Module, processor: Any, out: Path) -> dict[str, Any]:
    half.set_attn_implementation("sdpa")
    half.save_pretrained(out)
    processor.save_pretrained(out)
    return {}


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
    # puts a float16 copy and the processor into the folder; what it returns is told in training.json
    write: Callable[[nn.Module, Any, Path], dict[str, Any]] = _pretrained


class Team:
    """Data-parallel gradients on CPU: worker processes of one thread each, which share the weights.

    A worker that other programs slow down takes fewer parts of a step; those of the `kind` that has taken longest come
    first, so that none waits long for the last. Threads inside an operation all wait for the slowest, which on a busy
    machine halves speed. `work(index)` gives a part's loss and anything picklable to hand back.
    """

    def __init__(self, size: int, weights: list[nn.Parameter], work: Callable, kind: Callable[[int], Hashable]):
        self.weights, self.kind = weights, kind
        self.seconds: dict[Hashable, float] = {}  # of the last part of each kind
        self.grads = torch.zeros(size, sum(w.numel() for w in weights)).share_memory_()
        context = multiprocessing.get_context("fork")
        rows = context.SimpleQueue()
        for row in range(size):
            rows.put(row)
        self.pool = context.Pool(size, _begin, (self.grads, rows, weights, work))

    def step(self, indices) -> list:
        """Leave the mean gradient over the parts in the weights; return what `work` handed back."""
        slowest_first = sorted(indices, key=lambda index: -self.seconds.get(self.kind(index), 0.0))
        answers = []
        for index, seconds, answer in self.pool.imap_unordered(_part, slowest_first):
            self.seconds[self.kind(index)] = seconds
            answers.append(answer)
        mean = (self.grads.sum(0) / len(indices)).split([w.numel() for w in self.weights])
        for weight, grad in zip(self.weights, mean):
            weight.grad = grad.view_as(weight)
        self.grads.zero_()
        return answers

    def stop(self) -> None:
        self.pool.close()
        self.pool.join()


class Feed:
    """The same with an accelerator: worker processes make the data of parts ahead of time, this one takes gradients."""

    def __init__(self, size: int, weights: list[nn.Parameter], stage: Stage, first: int, device: torch.device):
        self.weights, self.stage, self.device = weights, stage, device
        multiprocessing.set_sharing_strategy("file_system")  # else every tensor on its way is an open file
        ahead = {"num_workers": size, "prefetch_factor": 4, "multiprocessing_context": "fork"} if size else {}
        parts = range(first * stage.parts, stage.steps * stage.parts)
        self.made = iter(DataLoader(stage.data, batch_size=None, sampler=parts, **ahead))

    def step(self, indices) -> list:
        for weight in self.weights:
            weight.grad = None
        answers = []
        for _ in indices:
            loss, answer = self.stage.loss(next(self.made).to(self.device))
            (loss / len(indices)).backward()
            answers.append(answer)
        return answers

    def stop(self) -> None:
        del self.made


def _begin(grads, rows, weights, work) -> None:
    """In a worker: gradients are added to its row in place."""
    global _work
    torch.set_num_threads(1)  # also what makes forking safe: no thread pool is entered
    for weight, grad in zip(weights, grads[rows.get()].split([w.numel() for w in weights])):
        weight.grad = grad.view_as(weight)
    _work = work


def _loss(stage: Stage, index: int) -> tuple[torch.Tensor, Answer]:
    return stage.loss(stage.data[index])


def _part(index: int) -> tuple[int, float, Any]:
    began = time.perf_counter()
    loss, answer = _work(index)
    loss.backward()
    return index, time.perf_counter() - began, answer


def fit(
    trained: Trained,
    stages: list[Stage],
    out: Path,
    workers: int = 2,
    stop_after: int | None = None,
    checkpoint_every: float = 180,
    log: Callable = print,
    device: torch.device | None = None,
) -> None:
    """Train into the hub folder `out`. The state to go on from lies in `out`.ckpt.

    `stop_after` steps of this call it saves and returns, as if killed; `checkpoint_every` is in seconds. device: an
    accelerator, where the model already is; left out, the workers themselves train on the CPU.
    """
    path, left = state_file(out), math.inf if stop_after is None else stop_after
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"stage": 0, "step": 0, "pictures": 0, "questions": 0, "seconds": 0.0, "optimisers": None, "curve": []}
    if path.exists():
        state = torch.load(path, map_location="cpu")
        state.setdefault("curve", [])
        trained.model.load_state_dict(state.pop("model"))
        trained.heads.load_state_dict(state.pop("heads"))
        log(f"resumed at stage {state['stage']}, step {state['step']}")
    for number, stage in enumerate(stages[state["stage"] :], state["stage"]):
        if number > state["stage"]:
            state |= {"stage": number, "step": 0, "optimisers": None}
        optimisers = trained.optimisers(stage.modules)
        for optimiser, before in zip(optimisers, state["optimisers"] or ()):
            optimiser.load_state_dict(before)
        weights = [p for module in stage.modules for p in module.parameters()]
        told = Told(stage, log)
        if device is None:
            team = Team(workers, weights, partial(_loss, stage), stage.data.kind)
        else:
            team = Feed(workers, weights, stage, state["step"], device)
        torch.set_num_threads(max(1, workers))  # for the optimisers, while the team waits
        saved = began = time.time()
        while state["step"] < stage.steps and left:
            _step(trained, stage, state, team, optimisers, told)
            state["seconds"], began, left = state["seconds"] + time.time() - began, time.time(), left - 1
            told.after(state)
            if time.time() - saved > checkpoint_every or state["step"] == stage.steps or not left:
                _save(trained, state, optimisers, path)
                if number == len(stages) - 1:
                    _write(trained, state, out, workers, device)
                saved = time.time()
        team.stop()
        torch.set_num_threads(1)  # the next team is forked
        if not stage.steps and number == len(stages) - 1:  # what the stages before made
            _write(trained, state, out, workers, device)
        if not left:
            return


def _step(trained: Trained, stage: Stage, state: dict, team: Team | Feed, optimisers: list, told: Told) -> None:
    step = state["step"]
    for group in (group for optimiser in optimisers for group in optimiser.param_groups):
        group["lr"] = group["peak"] * trained.rate(step, stage.steps)
    answers = team.step(range(step * stage.parts, (step + 1) * stage.parts))
    nn.utils.clip_grad_norm_(team.weights, 1.0)
    for optimiser in optimisers:
        optimiser.step()
    told.add(answers)
    state["step"] = step + 1
    for name in COUNTS:
        state[name] += sum(answer.get(name, 0) for answer in answers)


class Told:
    """What the log says of a stage: means of the losses, pictures a second, accuracies."""

    def __init__(self, stage: Stage, log: Callable):
        self.stage, self.log, self.clock, self.seen = stage, log, time.time(), defaultdict(list)

    def add(self, answers: list[Answer]) -> None:
        for answer in answers:
            for name, value in answer.items():
                self.seen[name].append(value)

    def after(self, state: dict) -> None:
        step, means = state["step"], {}
        last = step == self.stage.steps
        if step % LOG_EVERY == 0 or last:
            speed = sum(self.seen["pictures"]) / (time.time() - self.clock)
            means = {k: sum(v) / len(v) for k, v in sorted(self.seen.items()) if k not in COUNTS}
            clock = f"{time.strftime('%H:%M:%S')} {self.stage.name} {step}/{self.stage.steps}"
            self.log(f"{clock} pictures/s {speed:.1f}  {'  '.join(f'{k} {v:.3f}' for k, v in means.items())}")
            self.seen.clear()
            self.clock = time.time()
        if self.stage.check and (step % self.stage.check_every == 0 or last):
            scores = self.stage.check()
            mean = sum(scores.values()) / len(scores)
            self.log(f"val {mean:.3f}  " + "  ".join(f"{name} {share:.2f}" for name, share in scores.items()))
            point = {"step": step} | {key: state[key] for key in (*COUNTS, "seconds")}
            state["curve"].append(point | {"losses": means, "right": scores})
            self.clock = time.time()


def state_file(out: Path) -> Path:
    """Where the run that writes the hub folder `out` keeps the state to go on from."""
    return out.with_name(out.name + ".ckpt") / "state.pt"


def _save(trained: Trained, state: dict, optimisers: list, path: Path) -> None:
    weights = {"model": trained.model.state_dict(), "heads": trained.heads.state_dict()}
    torch.save(state | weights | {"optimisers": [o.state_dict() for o in optimisers]}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _write(trained: Trained, state: dict, out: Path, workers: int, device: torch.device | None) -> None:
    """The hub folder: float16 weights, configuration, tokenizer, processor, chat template; and what made it."""
    out.mkdir(parents=True, exist_ok=True)
    told = trained.write(copy.deepcopy(trained.model).half(), trained.processor, out)
    made = told | {key: state[key] for key in (*COUNTS, "seconds", "step")} | {"commit": commit()}
    made |= {"recipe": asdict(trained.recipe), "parameters": sum(p.numel() for p in trained.model.parameters())}
    made |= {"workers": workers, "torch": torch.__version__}
    made |= {"dtype": str(dtype_on(device or torch.device("cpu"))).removeprefix("torch.")}
    made |= {"device": torch.cuda.get_device_name(device)} if device is not None and device.type == "cuda" else {}
    made |= {"curve": state["curve"]} if state["curve"] else {}
    made |= {"before": trained.before} if trained.before else {}
    (out / "training.json").write_text(json.dumps(made, indent=1) + "\n")
