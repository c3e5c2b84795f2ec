"""vtok's models for lmms-eval: every supported family, dense or compressed, with what it cost in the results.

    lmms-eval --model vtok --model_args pretrained=PATH,compressor=globalcom2,keep=0.25 --tasks ...

A failure ends the run with an exit code other than 0, as does a run in which nothing was compressed although a
compressor was asked for. Which compressors can be asked for, and how, says `vtok.eval.lmms.plan`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import transformers
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

import vtok
from vtok import adapter as adapters
from vtok.errors import InvalidValue, VtokError
from vtok.eval.lmms import answers, setup
from vtok.eval.lmms import plan as lmms_plan
from vtok.eval.lmms.costs import Costs
from vtok.eval.lmms.failures import RunFailed, named
from vtok.eval.lmms.prompts import Prompts, question
from vtok.media import Sampling
from vtok.models import load
from vtok.patching import Patch
from vtok.prompts import Conversation, encode

log = logging.getLogger("vtok.lmms")


class _Vtok(lmms):
    """What the chat and the simple class share. Arguments, as in `--model_args`:

    pretrained: a local folder, a repository of the hub, or a bundled model.
    compressor, keep, budget, config, and a compressor's options: see `vtok.eval.lmms.plan`.
    dtype: a name of torch's; the checkpoint's own if left out, float32 for bundled models.
    device, device_map, attn_implementation: as in transformers. In several processes each holds the whole model.
    batch_size: samples a batch. max_frames, nframes, fps: of clips, see `vtok.media.Sampling`; families
        without clips get the frames as pictures.
    min_pixels, max_pixels: of pictures, for the families whose processor has such limits (the Qwens).
    system_prompt: text, or a file of it.

    Raises `InvalidValue`, `UnknownName` and `Unsupported`; in a run `RunFailed`, naming the document.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        compressor: str | None = None,
        keep: float | int | Literal["auto"] | None = None,
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
        self.batch_size = setup.batch_size(batch_size)
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        if (shared := setup.accelerator(device_map)) is not None:
            self.accelerator = shared
            self._rank, self._world_size, device = shared.process_index, shared.num_processes, str(shared.device)
        self.model, self.processor = load(
            pretrained, device, dtype, device_map=device_map, attn_implementation=attn_implementation
        )
        self.device = self.model.device
        setup.limit_pixels(self.processor, min_pixels, max_pixels)
        self.processor.tokenizer.padding_side = "left"
        vlm, family = adapters.find(self.model)
        sampling = Sampling(nframes, fps, max_frames)
        self._warn = functools.cache(log.warning)  # each once
        self._prompts = Prompts(self.processor, family.family, "video" in family.encoders, sampling, self._warn)
        self.costs = Costs(family.core(vlm), family, self.device)
        self._setting = {
            "vtok": vtok.__version__,
            "transformers": transformers.__version__,
            "weights": setup.weights(str(pretrained), self.model),
            "dtype": str(self.model.dtype),
            "attention": self.model.config._attn_implementation,
            "sampling": asdict(sampling),
            "pixels": [min_pixels, max_pixels],
            "system_prompt": self.system_prompt,
        }
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
        self.costs.reset()
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

    def _apply(self, plan: lmms_plan.Plan) -> None:
        self.patch = plan.apply(self.model)
        log.info("%s: %s", self._setting["weights"]["name"], self.patch or "dense")

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
            with named([request]):
                told[i] = self._messages(request.args)
        while told:
            going = list(told)
            batch = [requests[i] for i in going]
            prepare = lambda k, told=told, going=going: (told[going[k]], _gen_kwargs(requests[going[k]].args))
            for i, result in zip(going, self._run(batch, prepare, self._answer)):
                said[i].append(result.text)
            told = {}
            for i in going:
                with named([requests[i]]):
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

        if own:
            self.costs.watch_memory()
        try:
            with tqdm(total=len(own), disable=self.rank != 0, desc="vtok") as bar:
                for members in groups.values():
                    members.sort(key=lambda i: -len(str(requests[i].args[0])))
                    for start in range(0, len(members), self.batch_size):
                        batch = members[start : start + self.batch_size]
                        asked = []
                        for i in batch:
                            with named([requests[i]]):
                                messages, extra = prepare(i)
                                asked.append((self._told(messages), extra))
                        with named([requests[i] for i in batch]):
                            done = work(*map(list, zip(*asked)))
                        for i, result in zip(batch, done):
                            results[i] = result
                        bar.update(len(batch))
        except RunFailed:
            self.costs.reset()
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
        return encode(self.processor, asked).to(self.device, self.model.dtype)

    # ---- the model ---------------------------------------------------------------------------------------------
    def _answer(self, asked: list[Conversation], gen_kwargs: list[dict[str, Any]]) -> list[GenerationResult]:
        how, until = answers.arguments(gen_kwargs[0], self.model, self.processor.tokenizer, self._warn)
        inputs = self._inputs(asked)
        results = self._timed(asked, inputs, lambda: answers.generate(self.model, self.processor, inputs, how, until))
        self.costs.totals["output_tokens"] += sum(result.token_counts.output_tokens for result in results)
        return results

    def _score(self, asked: list[Conversation], continuations: list[str]) -> list[GenerationResult]:
        inputs = self._inputs(asked)
        work = lambda: answers.score(self.model, self.processor.tokenizer, inputs, continuations)
        return self._timed(asked, inputs, work)

    def _timed(
        self, asked: list[Conversation], inputs: Any, work: Callable[[], Callable[[], list[GenerationResult]]]
    ) -> list[GenerationResult]:
        self.costs.begin()
        results = work()
        self.costs.end(asked, inputs, self.patch)
        return results()

    def clean(self) -> None:
        """Called by lmms-eval after the last request of a run: reports what it cost, and refuses a run in which nothing
        was compressed. The model stays, so that one object serves many runs."""
        totals = self.costs.report(self.world_size)
        asked = self.patch is not None and not all(part.is_identity for part in self.patch.compressors)
        if totals["samples"] and asked and not totals["compressed"]:
            why = "" if totals["with_pictures"] else ": the tasks show it no picture and no clip"
            raise RunFailed(f"{self.patch!r} compressed nothing{why}. The scores would be those of the dense model.")


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


def _gen_kwargs(arguments: tuple) -> dict[str, Any]:
    """Of a request, in whichever place: they are its only dict."""
    return next((argument for argument in arguments if isinstance(argument, dict)), {})


setup.key_cache_by_model(_Vtok)
