"""R2R: a small model writes, and a large one decides the tokens that matter (https://arxiv.org/abs/2505.21600).

At each step the small model proposes a token, and a switch looks at how it came to it. Where the switch doubts, the
large model reads all that was written since it was last asked, in one chunk, and decides this token. Both models must
have one vocabulary, and both see the pictures: each has its own prefill and its own cache.

Differs from the paper: its router was trained for text models; the two switches without training come first here, with
the paper's thresholds. The router is in `vtok.text.decoding.router`. The large model's cache begins with the first
doubt, and the prompt is a forward of its own, so that a patched model finds its end.
Not lossless: what comes out is neither model's own text; use the large one as target of drafts for that. Not for short
answers to pictures: the second prefill costs more than it saves. One prompt a call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerateDecoderOnlyOutput

from vtok import options
from vtok.engine.cache import NAME, cache_in
from vtok.errors import Unsupported
from vtok.options import AtLeast1
from vtok.text.decoding.loop import ONE_BY_ONE, OUTPUTS, Asked, wanted
from vtok.text.decoding.second import prepared, same_vocabulary


# ---- switches --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Proposal:
    """A token of the small model, and what it came from.

    token: [1]. logits: [1, V] fp32, before processors. hidden: [1, D] that the head was given. embedding: [1, D] of the
    token."""

    token: Tensor
    logits: Tensor
    hidden: Tensor
    embedding: Tensor


class Switch(Protocol):
    """When to ask the large model: where `doubt` is at least `threshold`."""

    threshold: float

    def doubt(self, proposal: Proposal) -> Tensor:
        """[1]."""


def entropy(logits: Tensor) -> Tensor:
    """logits [..., V] -> [...] nats."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)


def uncertainties(logits: Tensor, top: int = 10, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Aleatoric and epistemic uncertainty of logits [..., V] -> two of [...].

    The `top` logits x are taken as evidence, the parameters of a Dirichlet distribution, S their sum:
    AU = -sum x_i / S (psi(x_i + 1) - psi(S + 1)), EU = K / (S + K). They are no less than `floor`, since psi has poles
    from -1 on."""
    x = logits.double().topk(min(top, logits.shape[-1])).values.clamp_min(floor)
    total = x.sum(-1, keepdim=True).clamp_min(1e-9)
    aleatoric = -(x / total * (torch.digamma(x + 1) - torch.digamma(total + 1))).sum(-1)
    return aleatoric, x.shape[-1] / (total[..., 0] + x.shape[-1])


@dataclass(frozen=True)
class Entropy:
    """Doubts where the small model's entropy is high. threshold: nats, the paper's."""

    threshold: float = 0.45

    def doubt(self, proposal: Proposal) -> Tensor:
        return entropy(proposal.logits)


@dataclass(frozen=True)
class Aleatoric:
    """Doubts where likely tokens are alike in evidence, see `uncertainties`. threshold: the paper's, for 10 logits."""

    threshold: float = 2.275
    top: AtLeast1 = 10
    floor: float = 0.0

    def doubt(self, proposal: Proposal) -> Tensor:
        return uncertainties(proposal.logits, self.top, self.floor)[0]


# ---- decoding --------------------------------------------------------------------------------------------------------
@dataclass
class Routed(GenerateDecoderOnlyOutput):
    """What `R2R` gives with `return_dict_in_generate`; the cache is the small model's.

    routed: [1, N] bool, which of the new tokens the large model decided. doubts: [1, N]."""

    routed: Tensor | None = None
    doubts: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class R2R:
    """A large model decides what a small one doubts: `small.generate(..., custom_generate=R2R(large=large))`.

    large: a model of the same tokenizer, that takes the same inputs. switch: says when, see `Switch`.
    vocabulary: how many token ids count, `len(tokenizer)`, where the models pad their tables of one tokenizer to
        different lengths; None where they are of one length.

    Sampling and processors are those of the call, for both models. Raises `Unsupported` for different vocabularies, for
    more than one prompt, for beam search, and for embeddings instead of tokens."""

    large: nn.Module = field(repr=False)
    switch: Switch = field(default_factory=Entropy)
    vocabulary: AtLeast1 | None = None

    def __post_init__(self) -> None:
        options.check(AtLeast1 | None, self.vocabulary, "vocabulary")

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | Routed:
        """Called by `generate` of the small model."""
        asked = Asked.of_generate()
        self._refuse(model, input_ids, generation_config, asked)
        small, large = Session(model, input_ids, generation_config, model_kwargs), None
        ids, routed, doubts, done = input_ids, [], [], False
        with heads_input(model) as hidden:
            while not done:
                logits = self._cut(small.behind(ids))
                token = choose(logits_processor(ids, logits.clone()), generation_config.do_sample)  # [1]
                proposal = Proposal(token, logits, hidden[-1], model.get_input_embeddings()(token))
                doubts.append(float(self.switch.doubt(proposal)))
                routed.append(doubts[-1] >= self.switch.threshold)
                if routed[-1]:
                    large = large or prepared(self.large, input_ids, generation_config, Session)
                    logits = self._cut(large.behind(ids)).to(logits.device)
                    token = choose(logits_processor(ids, logits), generation_config.do_sample)
                ids = torch.cat([ids, token[:, None]], 1)
                if asked.streamer is not None:
                    asked.streamer.put(token.cpu())
                done = bool(stopping_criteria(ids, None).all())
        if asked.streamer is not None:
            asked.streamer.end()
        if not generation_config.return_dict_in_generate:
            return ids
        held = {NAME: cache_in(small.kwargs)}
        return Routed(sequences=ids, routed=torch.tensor([routed]), doubts=torch.tensor([doubts]), **held)

    def _cut(self, logits: Tensor) -> Tensor:
        return logits[:, : self.vocabulary].to(torch.float32, copy=True)

    def _refuse(self, model: nn.Module, ids: Tensor, config: Any, asked: Asked) -> None:
        same_vocabulary(model, self.large, self.vocabulary)
        complaint = None
        if self.large is model:
            complaint = "the large model is the small one"
        elif config.get_generation_mode(asked.assistant_model) not in ONE_BY_ONE:
            complaint = "greedy search and sampling alone: no beam search, no assistant, no prompt lookup"
        elif left := wanted(config, *OUTPUTS):
            complaint = f"what is returned is sequences, routed and doubts: leave {' and '.join(left)} off"
        elif len(ids) > 1:
            complaint = f"rows would ask the large model at different steps: one prompt a call, here are {len(ids)}"
        elif not config.use_cache:
            complaint = "both models need their caches: leave use_cache on"
        if complaint is not None:
            raise Unsupported(f"R2R: {complaint}.")


def choose(scores: Tensor, sample: bool) -> Tensor:
    """[1, V] -> [1]."""
    return torch.multinomial(scores.softmax(-1), 1)[:, 0] if sample else scores.argmax(-1)


@contextmanager
def heads_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within, a list that holds the hidden states [B, D] which the model's head was given last, in this thread."""
    seen: list[Tensor] = []
    mine = threading.get_ident()

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == mine:
            seen[:] = [args[0][:, -1]]

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


class Session:
    """A model that follows a text, with its cache: it may lag behind, and catches up in one chunk.

    read: tokens that are in the cache."""

    def __init__(
        self, model: nn.Module, prompt: Tensor, config: Any, kwargs: dict[str, Any], processors: Any = None
    ) -> None:
        self.model, self.prompt, self.config, self.kwargs = model, prompt, config, kwargs
        self.read, self.outputs = 0, None

    def behind(self, ids: Tensor) -> Tensor:
        """The logits [1, V] behind ids [1, T], which begin with all that was read before."""
        ids = ids.to(self.prompt.device)
        if not self.read:
            self._keep(self.model._prefill(self.prompt, self.config, self.kwargs), self.prompt.shape[1])
        if (new := ids.shape[1] - self.read) > 0:
            self.kwargs = self.model._update_model_kwargs_for_generation(self.outputs, self.kwargs, num_new_tokens=new)
            inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=new, **self.kwargs)
            self._keep(self.model(**inputs, return_dict=True), ids.shape[1])
        return self.outputs.logits[:, -1]

    def _keep(self, outputs: Any, read: int) -> None:
        self.outputs, self.read = outputs, read
