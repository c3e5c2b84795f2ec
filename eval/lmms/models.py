"""vtok's models for lmms-eval: every supported family, dense or compressed, with what it cost in the results.

    lmms-eval --model vtok --model_args pretrained=PATH,compressor=globalcom2,keep=0.25 --tasks ...

A failure ends the run with an exit code other than 0, as does a run in which nothing was compressed although a
compressor was asked for. Which compressors can be asked for, and how, says `vtok.eval.lmms.plan`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.caching.response_cache import ResponseCache
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import vtok
from vtok import adapter as adapters
from vtok import zoo
from vtok.errors import InvalidValue, UnknownName, Unsupported, VtokError
from vtok.eval.bench.machine import PeakMemory
from vtok.eval.lmms import plan as lmms_plan
from vtok.eval.lmms.prompts import Conversation, Prompts, question
from vtok.eval.lmms.video import Sampling
from vtok.patching import Patch

MAX_NEW_TOKENS = 1024  # where a task does not say
PHASES = ("encoder", "selection", "prefill", "decode")


class RunFailed(BaseException):
    """The evaluation cannot go on, or would be worth nothing.

    No `Exception`, since the command line of lmms-eval prints those and exits with code 0.
    """


class Phases:
    """When the language model was first entered and first left, on the host's clock with the device waited for."""

    def __init__(self, language_model: torch.nn.Module, device: torch.device) -> None:
        self.device = device
        self.begin()
        language_model.register_forward_pre_hook(self._enter)
        language_model.register_forward_hook(self._leave)

    def begin(self) -> None:
        self.entered = self.left = None
        self.began = self.now()

    def seconds(self, selection: float) -> dict[str, float]:
        """Of the run since `begin`. encoder: all before the language model. prefill: its first forward without
        `selection`, the compressors' time in it. decode: the rest."""
        ended = self.now()
        return {
            "encoder": self.entered - self.began,
            "selection": selection,
            "prefill": self.left - self.entered - selection,
            "decode": ended - self.left,
        }

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _enter(self, *_: Any) -> None:
        if self.entered is None:
            self.entered = self.now()

    def _leave(self, *_: Any) -> None:
        if self.left is None:
            self.left = self.now()


class _Vtok(lmms):
    """What the chat and the simple class share. Arguments, as in `--model_args`:

    pretrained: a local folder, a repository of the hub, or a bundled model.
    compressor, keep, budget, config, and a compressor's options: see `vtok.eval.lmms.plan`.
    dtype: a name of torch's; the checkpoint's own if left out, float32 for bundled models.
    device, device_map, attn_implementation: as in transformers. In several processes each holds the whole model.
    batch_size: samples a batch. max_frames, nframes, fps: of clips, see `vtok.eval.lmms.video.Sampling`; families
        without clips get the frames as pictures.
    min_pixels, max_pixels: of pictures, for the families whose processor has such limits (the Qwens).
    system_prompt: text, or a file of it.

    Raises `InvalidValue`, `UnknownName` and `Unsupported`; in a run `RunFailed`, naming the document.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        compressor: str | None = None,
        keep: float | int | None = None,
        budget: float | None = None,
        config: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        max_frames: int = Sampling.max_frames,
        nframes: int | None = None,
        fps: float | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system_prompt: str = "",
        **options: Any,
    ) -> None:
        super().__init__()
        if pretrained is None:
            raise InvalidValue("Which model? pretrained=PATH among the --model_args says it.")
        plan = lmms_plan.plan(compressor, keep, budget, config, **options)
        self.batch_size = _batch_size(batch_size)
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import Accelerator

            if device_map is not None:
                raise InvalidValue("device_map spreads one model over devices: run it in one process.")
            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            if self._world_size == 1:
                raise InvalidValue(
                    f"Of {os.environ['WORLD_SIZE']} processes accelerate takes each for the only one without a "
                    "GPU: set ACCELERATE_USE_CPU=true."
                )
            device = str(self.accelerator.device)
        self.model, self.processor, self._source = _load(pretrained, device, device_map, dtype, attn_implementation)
        self.device = self.model.device
        _limit_pixels(self.processor, min_pixels, max_pixels)
        self.processor.tokenizer.padding_side = "left"
        vlm, self._adapter = adapters.find(self.model)
        self._core = self._adapter.core(vlm)
        sampling = Sampling(nframes, fps, max_frames)
        self._warn = functools.cache(logger.warning)  # each once
        self._prompts = Prompts(
            self.processor, self._adapter.family, "video" in self._adapter.encoders, sampling, self._warn
        )
        self._phases = Phases(self._core.language_model, self.device)
        self._setting = {
            "vtok": vtok.__version__,
            "transformers": transformers.__version__,
            "weights": self._source,
            "dtype": str(self.model.dtype),
            "attention": self.model.config._attn_implementation,
            "sampling": asdict(sampling),
            "pixels": [min_pixels, max_pixels],
            "system_prompt": self.system_prompt,
        }
        self._begin()
        self.patch: Patch | None = None
        self._apply(plan)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> _Vtok:
        """Called for `--model vtok`. A mistake in the arguments ends the program with one line."""
        try:
            return super().create_from_arg_string(arg_string, additional_config)
        except VtokError as error:
            raise SystemExit(f"vtok: {' '.join(str(error).split())}") from error
        except Exception as error:
            raise RunFailed(f"The model could not be made: {type(error).__name__}: {error}") from error

    def compress(self, compressor: str | None = None, **options: Any) -> Patch | None:
        """Another compressor on the same model, for the runs from now on, which are counted anew; arguments as in the
        constructor, "none" for the dense model. A mistake leaves the model as it was."""
        plan = lmms_plan.plan(compressor, **options)
        self._begin()
        before, self.patch = self.patch, None
        if before is not None:
            before.remove()
        try:
            self._apply(plan)
        except VtokError:
            if before is not None:
                self.patch = vtok.patch(self.model, before.compressors)
            raise
        return self.patch

    def _begin(self) -> None:
        """Count from nothing: a new run."""
        self._totals: Counter[str] = Counter()
        self._peak: PeakMemory | None = None

    def _apply(self, plan: lmms_plan.Plan) -> None:
        self.patch = plan.apply(self.model)
        logger.info(f"{self._setting['weights']['name']}: {self.patch or 'dense'}")

    def fingerprint(self) -> str:
        """16 hex digits of all that an answer depends on, beside the question."""
        parts = () if self.patch is None else self.patch.compressors
        held = json.dumps([self._setting, lmms_plan.fingerprint(parts)], sort_keys=True, default=str)
        return hashlib.sha256(held.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.fingerprint()}>"  # what lmms-eval's cache takes for a model's name

    # ---- requests ----------------------------------------------------------------------------------------------
    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        prepare = lambda i: (self._messages(requests[i].args), _gen_kwargs(requests[i].args))
        return self._run(requests, prepare, self._answer)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Each round is a prompt of its own that the task makes of the answers so far. Returns them, round by round."""
        said: list[list[str]] = [[] for _ in requests]
        state: list[Any] = [None] * len(requests)
        told = {}
        for i, request in enumerate(requests):
            with _named([request]):
                told[i] = self._messages(request.args)
        while told:
            going = list(told)
            batch = [requests[i] for i in going]
            prepare = lambda k, told=told, going=going: (told[going[k]], _gen_kwargs(requests[going[k]].args))
            for i, result in zip(going, self._run(batch, prepare, self._answer)):
                said[i].append(result.text)
            told = {}
            for i in going:
                with _named([requests[i]]):
                    following = self._round(requests[i].args, said[i], state[i])
                if following is not None:
                    told[i], state[i] = following
        return said

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each (loss, is_greedy): mean negative log-probability of the continuation's tokens, in nats, and whether
        each is the likeliest. Wrapped, since lmms-eval 0.7.3 makes a string of a bare pair."""

        def prepare(i: int) -> tuple[list[dict], str]:
            context, target, to_visual = requests[i].args[:3]
            doc = self._doc(requests[i].args)
            continuation = target if isinstance(target, str) else str(target(doc))
            return question(to_visual(doc), context), continuation

        return self._run(requests, prepare, self._score)

    def _run(
        self,
        requests: Sequence[Instance],
        prepare: Callable[[int], tuple[list[dict], Any]],
        work: Callable[[list[Conversation], list[Any]], list[GenerationResult]],
    ) -> list[GenerationResult]:
        """The results of `work` in the order of the requests, which it gets in batches of equal generation arguments,
        the longest texts first."""
        results = [GenerationResult("") for _ in requests]  # of paddings, which nobody looks at, they stay so
        own = [i for i, request in enumerate(requests) if not request.metadata.get("__padding_only__")]
        groups: dict[str, list[int]] = {}
        for i in own:
            groups.setdefault(json.dumps(_gen_kwargs(requests[i].args), sort_keys=True, default=str), []).append(i)

        if own and self._peak is None:  # the first of a run
            self._peak = PeakMemory(str(self.device))
        try:
            with tqdm(total=len(own), disable=self.rank != 0, desc="vtok") as bar:
                for members in groups.values():
                    members.sort(key=lambda i: -len(str(requests[i].args[0])))
                    for start in range(0, len(members), self.batch_size):
                        batch = members[start : start + self.batch_size]
                        asked = []
                        for i in batch:
                            with _named([requests[i]]):
                                messages, extra = prepare(i)
                                asked.append((self._told(messages), extra))
                        with _named([requests[i] for i in batch]):
                            done = work(*map(list, zip(*asked)))
                        for i, result in zip(batch, done):
                            results[i] = result
                        bar.update(len(batch))
        except RunFailed:
            self._begin()
            raise
        return results

    # ---- prompts -----------------------------------------------------------------------------------------------
    @abstractmethod
    def _messages(self, arguments: tuple) -> list[dict[str, Any]]:
        """The messages of a request to generate."""

    @abstractmethod
    def _round(self, arguments: tuple, said: list[str], state: Any) -> tuple[list[dict[str, Any]], Any] | None:
        """The messages of a later round and the task's own state, or None where the conversation has ended."""

    def _doc(self, arguments: tuple) -> Any:
        doc_id, task, split = arguments[-3:]
        return self.task_dict[task][split][doc_id]

    def _told(self, messages: Iterable[dict[str, Any]]) -> Conversation:
        conversation = self._prompts.conversation(messages)
        return replace(conversation, turns=self._apply_system_prompt(conversation.turns, self.system_prompt))

    def _inputs(self, asked: Sequence[Conversation]) -> Any:
        return self._prompts.encode(asked).to(self.device, self.model.dtype)

    # ---- the model ---------------------------------------------------------------------------------------------
    def _answer(self, asked: list[Conversation], gen_kwargs: list[dict[str, Any]]) -> list[GenerationResult]:
        how, until = self._generation(gen_kwargs[0])
        inputs = self._inputs(asked)
        length = inputs["input_ids"].shape[1]
        self._phases.begin()
        with torch.inference_mode():
            out = self.model.generate(**inputs, **how)[:, length:]  # [B, T]
        ended = self._note(asked, inputs)
        self._totals["seconds"] += sum(ended.values())
        texts = self.processor.batch_decode(out, skip_special_tokens=True)
        results = []
        for text, row, mask in zip(texts, out, inputs["attention_mask"]):
            for stop in until:
                text = text.partition(stop)[0]
            counts = TokenCounts(input_tokens=int(mask.sum()), output_tokens=self._n_generated(row))
            self._totals["output_tokens"] += counts.output_tokens
            results.append(GenerationResult(text.strip(), counts))
        return results

    def _generation(self, gen_kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Arguments of `generate`, and the strings at which an answer ends.

        A task's temperature of 0 is greedy whatever else it says; one above 0 samples unless it says do_sample=false.
        """
        asked = dict(gen_kwargs)
        until = asked.pop("until", None) or []
        until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        longest = asked.pop("max_gen_toks", None)
        how = {"max_new_tokens": asked.pop("max_new_tokens", None) or longest or MAX_NEW_TOKENS}
        temperature, sample = asked.pop("temperature", None), asked.pop("do_sample", None)
        sample = bool(temperature) if sample is None else bool(sample) and temperature != 0
        shape = {"temperature": temperature} | {name: asked.pop(name, None) for name in ("top_p", "top_k")}
        how["do_sample"] = sample
        how |= {name: value for name, value in shape.items() if value is not None} if sample else dict.fromkeys(shape)
        if (asked.get("num_return_sequences") or 1) > 1:
            raise Unsupported("num_return_sequences above 1: ask for --repeats instead.")
        for name, value in asked.items():
            if value is None:
                continue
            if hasattr(_GENERATION, name):
                how[name] = value
            else:
                self._warn(f"The task's generation argument {name}={value!r} means nothing to transformers; left out.")
        if until:
            how |= {"stop_strings": until, "tokenizer": self.processor.tokenizer}
        if self.model.generation_config.pad_token_id is None:
            tokenizer = self.processor.tokenizer
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            how["pad_token_id"] = pad
        return how, until

    def _n_generated(self, row: Tensor) -> int:
        """Tokens of an answer, its end token with them and padding without."""
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends, device=row.device, dtype=row.dtype).view(-1)
        found = torch.isin(row, ends).nonzero()
        if len(found):
            return int(found[0]) + 1
        pad = self.model.generation_config.pad_token_id
        content = (row != (self.processor.tokenizer.pad_token_id if pad is None else pad)).nonzero()
        return int(content[-1]) + 1 if len(content) else 0

    def _score(self, asked: list[Conversation], continuations: list[str]) -> list[GenerationResult]:
        inputs = dict(self._inputs(asked))
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        prompts = [row[valid] for row, valid in zip(ids, mask)]
        tokenizer = self.processor.tokenizer
        ends = [tokenizer.decode(row[-1:])[-1:].isspace() for row in prompts]
        said = [text.lstrip() if space else text for text, space in zip(continuations, ends)]
        answers = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0] for text in said]
        if not all(len(answer) for answer in answers):
            raise InvalidValue("A continuation without a token has no likelihood.")
        answers = [answer.to(ids) for answer in answers]
        # On the right nothing is in the way of the answers, and positions are those of a row alone.
        fill = lambda rows, value: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        joined = list(zip(prompts, answers))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                rows = [row[valid] for row, valid in zip(inputs[name], mask)]
                inputs[name] = fill([torch.cat([row, row.new_zeros(len(a))]) for row, a in zip(rows, answers)], 0)
        inputs["input_ids"] = fill([torch.cat(pair) for pair in joined], pad)
        inputs["attention_mask"] = fill([ids.new_ones(len(p) + len(a)) for p, a in joined], 0)
        # The labels tell a text-guided compressor where the prompt ends, so that it chooses as before an answer.
        labels = fill([torch.cat([torch.full_like(p, -100), a]) for p, a in joined], -100)
        self._phases.begin()
        with torch.inference_mode():
            logits = self.model(**inputs, labels=labels, use_cache=False).logits  # [B, S, V]
        self._totals["seconds"] += sum(self._note(asked, inputs).values())
        results = []
        for row, (prompt, answer) in zip(logits, joined):
            given = row[len(prompt) - 1 : len(prompt) + len(answer) - 1].float()  # [T, V]
            loss = torch.nn.functional.cross_entropy(given, answer)
            greedy = bool((given.argmax(-1) == answer).all())
            results.append(GenerationResult((float(loss), greedy), TokenCounts(len(prompt), 0)))
        return results

    # ---- what it cost ------------------------------------------------------------------------------------------
    def _note(self, asked: list[Conversation], inputs: Any) -> dict[str, float]:
        """Count a batch that was just run; returns its seconds by phase."""
        totals, n = self._totals, len(asked)
        seen = any(conversation.pictures or conversation.clips for conversation in asked)
        trace = self.patch.trace if self.patch is not None and seen else None
        seconds = self._phases.seconds(0.0 if trace is None else trace.selection_seconds)
        totals.update(seconds)
        kinds = [self._adapter.token_id(self._core.config, modality) for modality in self._adapter.encoders]
        n_visual = n_kept = sum(int((inputs["input_ids"] == kind).sum()) for kind in kinds)
        if trace is not None:
            beams = trace.batch / n
            visual = sum(trace.n_visual)
            n_kept -= (visual - sum(trace.n_kept)) / beams
            flops = trace.flops()
            totals["compressed"] += n * any(flops["compressed"][p] < flops["dense"][p] for p in flops["dense"])
            totals["traced"] += visual / beams
            totals["present"] += visual / beams * trace.mean_keep
            for kind in flops:
                totals[f"flops_{kind}"] += (flops[kind]["encoder"] + flops[kind]["prefill"]) / beams
        totals.update({"samples": n, "with_pictures": sum(bool(c.pictures or c.clips) for c in asked)})
        totals.update({"n_visual": n_visual, "n_kept": n_kept, "input_tokens": int(inputs["attention_mask"].sum())})
        return seconds

    def clean(self) -> None:
        """Called by lmms-eval after the last request of a run: reports what it cost, and refuses a run in which nothing
        was compressed. The model stays, so that one object serves many runs."""
        totals, peak = self._totals, None if self._peak is None else self._peak.rise()
        self._begin()
        if self.world_size > 1:
            totals, peak = self._gathered(totals, peak)
        n = totals["samples"]
        if not n:  # all answers came from the cache
            return
        costs = {f"{phase}_seconds": totals[phase] / n for phase in PHASES}
        costs |= {name: totals[name] / n for name in ("n_visual", "n_kept", "input_tokens")}
        costs["mean_keep"] = totals["present"] / totals["traced"] if totals["traced"] else 1.0
        costs["flops_ratio"] = totals["flops_compressed"] / totals["flops_dense"] if totals["flops_dense"] else 1.0
        if peak is not None:
            costs["peak_memory_mb"] = peak / 1e6
        speed = totals["output_tokens"] / totals["seconds"]
        log_metrics(totals["seconds"], int(totals["output_tokens"]), speed, {"total_requests": int(n), **costs})
        asked = self.patch is not None and not all(part.is_identity for part in self.patch.compressors)
        if asked and not totals["compressed"]:
            why = "" if totals["with_pictures"] else ": the tasks show it no picture and no clip"
            raise RunFailed(f"{self.patch!r} compressed nothing{why}. The scores would be those of the dense model.")

    def _gathered(self, totals: Counter, peak: int | None) -> tuple[Counter, int | None]:
        """Sums and the highest peak over the processes."""
        held: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(held, (dict(totals), peak))
        peaks = [p for _, p in held if p is not None]
        return sum((Counter(one) for one, _ in held), Counter()), max(peaks, default=None)


class VtokChat(_Vtok):
    """For tasks to generate, by the task's messages. `--model vtok`."""

    is_simple = False

    def _messages(self, arguments: tuple) -> list[dict[str, Any]]:
        return arguments[1](self._doc(arguments))

    def _round(self, arguments: tuple, said: list[str], state: Any) -> tuple[list[dict[str, Any]], Any] | None:
        to_messages, doc = arguments[1], self._doc(arguments)
        told = to_messages(doc, round_idx=len(said), previous_output=list(said), previous_round_info=state)
        if not isinstance(told, tuple):  # a task of one round
            return None
        messages, ended, _, state = told
        return None if ended else (messages, state)


class VtokSimple(_Vtok):
    """For all tasks, log-likelihood too, by the task's text and pictures. `--model vtok --force_simple`."""

    is_simple = True

    def _messages(self, arguments: tuple) -> list[dict[str, Any]]:
        context, _, to_visual = arguments[:3]
        return question(to_visual(self._doc(arguments)), context)

    def _round(self, arguments: tuple, said: list[str], state: Any) -> tuple[list[dict[str, Any]], Any] | None:
        to_text, doc = arguments[3], self._doc(arguments)
        told = to_text(doc, previous_output=list(said), round_idx=len(said), previous_round_info=state)
        if not isinstance(told, tuple):
            return None
        visuals, text, ended, _, state = told
        return None if ended else (question(visuals, text), state)


_GENERATION = GenerationConfig()


@contextmanager
def _named(requests: Sequence[Instance]) -> Iterator[None]:
    """Makes of what goes wrong with some requests a `RunFailed` that names their documents."""
    try:
        yield
    except Exception as error:
        where = ", ".join(f"{request.task_name} document {request.doc_id}" for request in requests)
        raise RunFailed(f"{where}: {type(error).__name__}: {error}") from error


def _gen_kwargs(arguments: tuple) -> dict[str, Any]:
    """Of a request, in whichever place: they are its only dict."""
    return next((argument for argument in arguments if isinstance(argument, dict)), {})


def _batch_size(value: int | str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise InvalidValue(f"batch_size is a number of at least 1, not {value!r}.")
    return number


def _load(
    name: str, device: str | None, device_map: str | None, dtype: str | None, attn_implementation: str | None
) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its processor, and what tells its weights from others."""
    name = str(name)
    bundled = name in zoo.names()
    place = zoo.path(name) if bundled else Path(name)
    if not place.is_dir() and "/" not in name:
        raise UnknownName(f"No model {name!r}: no local folder, and the bundled models are {', '.join(zoo.names())}.")
    if dtype not in (None, "auto") and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InvalidValue(f"dtype is a name of torch's such as bfloat16, not {dtype!r}.")
    how = {"dtype": dtype or ("float32" if bundled else "auto"), "attn_implementation": attn_implementation}
    if device_map is not None:
        how["device_map"] = device_map
    source = str(place) if place.is_dir() else name
    try:
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(source, **how).eval()
    except (OSError, ValueError) as error:
        raise UnknownName(
            f"The model {name!r} could not be loaded: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    if device_map is None:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    files = sorted(place.glob("*")) if place.is_dir() else []
    held = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.suffix != ".md"]
    return model, processor, {"name": name, "commit": getattr(model.config, "_commit_hash", None), "files": held}


def _limit_pixels(processor: Any, low: int | None, high: int | None) -> None:
    if low is None and high is None:
        return
    images = processor.image_processor
    size = dict(images.size or {})
    if not {"shortest_edge", "longest_edge"} <= set(size) or not hasattr(images, "merge_size"):
        raise InvalidValue(f"{type(images).__name__} has no limits of pixels: leave out min_pixels and max_pixels.")
    size |= {key: value for key, value in (("shortest_edge", low), ("longest_edge", high)) if value is not None}
    images.size = size


def _key_by_model(execute: Callable) -> Callable:
    """lmms-eval's cache is keyed on the argument string alone: not on what is in files that it names, nor, for a model
    object, on anything. For a model of ours its fingerprint is added."""

    @functools.wraps(execute)
    def keyed(cache: ResponseCache, lm: Any, reqtype: str, requests: list[Instance]) -> list:
        if not isinstance(lm, _Vtok):
            return execute(cache, lm, reqtype, requests)
        if reqtype == "loglikelihood":  # 0.7.3 can neither store these nor give them back
            return lm.loglikelihood(requests)
        before = cache._model_fingerprint_hash
        cache._model_fingerprint_hash = f"{before}-{lm.fingerprint()}"
        try:
            return execute(cache, lm, reqtype, requests)
        finally:
            cache._model_fingerprint_hash = before

    return keyed


ResponseCache.execute = _key_by_model(ResponseCache.execute)
