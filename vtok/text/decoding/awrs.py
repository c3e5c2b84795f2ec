"""AWRS: text that a check accepts, at a few calls of the check a token (https://arxiv.org/abs/2504.05410).

`ok(ids) -> bool` says of the tokens behind the prompt whether a valid answer can begin with them; where the last one
ends the text, whether they are a valid answer. A mask of the vocabulary would ask it for each of V tokens. Here tokens
are drawn without replacement until one is accepted: that token is distributed as the masked model's next token.

Always to draw an acceptable token is not yet to draw an acceptable text: it forgets how unlikely the acceptable ones
were. Their mass is estimated from the same few calls, without bias, and several texts (particles) are weighted by it
and resampled: sequential Monte Carlo. With many particles the answer is distributed as the model's own given that it
is valid.

Differs from the paper: the estimators "recursive" and "geometric" are those of its library, which vary less than the
"two_pass" of the paper.
Not for a check that says no only at the end: it must see a dead end coming, or all particles run into it. A dead end
asks for all tokens of the vocabulary once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from vtok import options
from vtok.engine.cache import NAME, cache_in
from vtok.errors import InvalidValue, Unsupported
from vtok.options import AtLeast1, In
from vtok.text.decoding.coupling import Chance
from vtok.text.decoding.loop import ONE_BY_ONE, OUTPUTS, Asked, wanted
from vtok.text.decoding.target import PER_TOKEN

Check = Callable[[list[int]], bool]
Estimator = Literal["auto", "recursive", "two_pass", "geometric"]
PEAKED = math.log(2 / 3)  # above it "geometric" asks for fewer tokens than "recursive", which asks for two at least


class Draw(NamedTuple):
    """A token that is accepted, or None where none is; and the log of its weight w: E[w; token is x] = p(x) ok(x)."""

    token: int | None
    log_weight: float


DEAD = Draw(None, -math.inf)


# ---- one token -------------------------------------------------------------------------------------------------------
def first_accepted(logp: Tensor, check: Callable[[int], bool], chance: Chance) -> int | None:
    """A draw of the masked, renormalised log-probabilities [V]; None where no token is accepted."""
    return next((token for token, _ in chance.order(logp) if check(token)), None)


def recursive(logp: Tensor, check: Callable[[int], bool], chance: Chance) -> Draw:
    """One look beyond the accepted token: had the next one been rejected too, all that is left is this token.

    The weight is the mass that was not rejected where the next candidate is accepted as well, else the token's own."""
    order, rest = chance.order(logp), 1.0
    for token, p in order:
        if check(token):
            beyond = next(order, None)
            return Draw(token, math.log(max(rest, p) if beyond is not None and check(beyond[0]) else p))
        rest -= p
    return DEAD


def two_pass(logp: Tensor, check: Callable[[int], bool], chance: Chance) -> Draw:
    """A second run without what the first rejected: (1 - mass rejected in the first) / (1 + rejections in both)."""
    rejected, rest, token = [], 1.0, None
    for candidate, p in chance.order(logp):
        if check(candidate):
            token, rest = candidate, max(rest, p)
            break
        rejected.append(candidate)
        rest -= p
    if token is None:
        return DEAD
    more = 0
    for candidate, _ in chance.order(without(logp, rejected)):
        if check(candidate):
            break
        more += 1
    return Draw(token, math.log(rest / (len(rejected) + more + 1)))


def geometric(logp: Tensor, check: Callable[[int], bool], chance: Chance, accepts: int = 2) -> Draw:
    """Draws with replacement until `accepts` of them were accepted, of which only new tokens are really checked: how
    often rejected ones would have come again is drawn. The weight is (accepts - 1) / (draws - 1)."""
    token, mass, rejections = None, 0.0, 0
    for _ in range(accepts):
        found, rejected = None, []
        for candidate, p in chance.order(logp):
            if mass > 0:
                rejections += chance.failures(max(1 - mass, p))
            if check(candidate):
                found = candidate
                break
            rejected.append(candidate)
            mass, rejections = mass + p, rejections + 1
        if found is None:
            return DEAD
        token, logp = found if token is None else token, without(logp, rejected)
    return Draw(token, math.log((accepts - 1) / (accepts + rejections - 1)))


def without(logp: Tensor, tokens: list[int]) -> Tensor:
    return logp.index_fill(0, torch.tensor(tokens, dtype=torch.long, device=logp.device), -math.inf)


def awrs(
    logp: Tensor, check: Callable[[int], bool], chance: Chance, estimator: Estimator = "auto", accepts: int = 2
) -> Draw:
    """The next token by adaptive weighted rejection sampling.

    logp: [V] log-probabilities. check: whether a token is accepted; each token is asked for once at most.
    estimator: "auto" is "geometric" where one token has 2/3 of the mass, or for more than 2 accepts, else "recursive".
    accepts: of "geometric": more calls, less variance."""
    asked = functools.cache(check)
    if estimator == "auto":
        estimator = "geometric" if accepts > 2 or float(logp.max()) >= PEAKED else "recursive"
    if estimator == "geometric":
        return geometric(logp, asked, chance, accepts)
    return (recursive if estimator == "recursive" else two_pass)(logp, asked, chance)


# ---- one text --------------------------------------------------------------------------------------------------------
class AWRSProcessor(LogitsProcessor):
    """Lets `generate` take accepted tokens only: `logits_processor=[AWRSProcessor(ok, prompt_length)]`.

    Each step draws an accepted token, and leaves no other. Without weights: the same texts come out as with a mask of
    the vocabulary, which are not distributed as the model's own valid texts (`AWRS` does that).

    prompt_length: tokens of the (padded) prompt, those of `input_ids` that `ok` does not get.
    temperature: of the draw; 0 takes the likeliest accepted token. What `generate` is told of temperature, top_k and
        top_p comes behind this, when there is nothing left to choose.
    eos_token_id: as of `generate`: rows that ended are left alone.

    Raises `InvalidValue` where `ok` accepts no token."""

    def __init__(
        self, ok: Check, prompt_length: int, *, temperature: float = 1.0, eos_token_id: int | list[int] | None = None
    ) -> None:
        options.check(Annotated[float, In(">= 0")], temperature, "temperature")
        self.ok, self.prompt_length, self.temperature = ok, prompt_length, temperature
        self.ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: [B, T]; scores: [B, V] logits."""
        scores = scores.clone()
        for row, answer in enumerate(input_ids[:, self.prompt_length :].tolist()):
            if self.ends.isdisjoint(answer):
                token = self._choose(scores[row], lambda token, answer=answer: bool(self.ok([*answer, token])))
                if token is None:
                    raise InvalidValue(dead_end(answer))
                scores[row] = -math.inf
                scores[row, token] = 0
        return scores

    def _choose(self, scores: Tensor, check: Callable[[int], bool]) -> int | None:
        if self.temperature == 0:
            return next((i for i in scores.argsort(descending=True, stable=True).tolist() if check(i)), None)
        return first_accepted((scores.float() / self.temperature).log_softmax(-1), check, Chance())


def dead_end(answer: list[int]) -> str:
    return (
        f"No token is accepted behind {answer}. ok(ids) must be False already where no valid answer begins so, and "
        f"True for a whole answer with an end-of-sequence token behind it; top_k and top_p can leave no valid token."
    )


# ---- many texts ------------------------------------------------------------------------------------------------------
@dataclass
class Weighted(GenerateDecoderOnlyOutput):
    """What `AWRS` gives with `return_dict_in_generate`.

    sequences: [B * N, T], the N particles of each prompt. log_weights: [B * N] fp64; the mean weight of a prompt's
        particles estimates, without bias, with what probability the model's own text is accepted."""

    log_weights: Tensor | None = None


@dataclass(frozen=True)
class AWRS:
    """Texts that a check accepts, distributed as the model's own: `generate(..., do_sample=True, custom_generate=...)`.

    ok: whether a valid answer can begin with these tokens, see above. particles: texts that are sampled for each
        prompt, as rows of one batch; 1 is masking, whatever the weights.
    ess: a prompt's particles are resampled where their effective number falls below this share of them.
    estimator: of the weights, see `awrs`. accepts: of the estimator "geometric".

    Gives for each prompt one text, drawn by weight; with `return_dict_in_generate` a `Weighted`, with all of them. The
    model's text is that of temperature, top_k and top_p: valid texts that these leave out are not found. A text that
    reaches its greatest length is valid as a beginning. Raises `InvalidValue` where all particles are in dead ends."""

    ok: Check
    particles: AtLeast1 = 8
    ess: Annotated[float, In("[0, 1]")] = 0.5
    estimator: Estimator = "auto"
    accepts: Annotated[int, In(">= 2")] = 2

    def __post_init__(self) -> None:
        options.check_all(self)

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | Weighted:
        """Called by `generate`."""
        asked = Asked.of_generate()
        if not generation_config.do_sample or not generation_config.use_cache:
            raise Unsupported("AWRS draws texts, with a cache: pass do_sample=True, and leave use_cache on.")
        mode = generation_config.get_generation_mode(asked.assistant_model)
        if mode not in ONE_BY_ONE or asked.streamer is not None:
            raise Unsupported("AWRS chooses its text at the end, of many: no beam search, no assistant, no streamer.")
        if left := wanted(generation_config, *OUTPUTS):
            raise Unsupported(f"AWRS returns sequences and log_weights: leave {' and '.join(left)} off.")
        if not isinstance(cache := cache_in(model_kwargs), DynamicCache):
            kind = type(cache).__name__
            raise Unsupported(f"AWRS repeats a DynamicCache for its particles, not a {kind}: leave the cache unset.")
        swarm = Swarm(self, model, input_ids, model_kwargs, generation_config)
        while swarm.live.any():
            scores = logits_processor(swarm.ids, swarm.logits.to(torch.float32, copy=True))
            swarm.extend(scores.log_softmax(-1))
            swarm.live &= ~stopping_criteria(swarm.ids, None).cpu()
            swarm.resample()
            if swarm.live.any():
                swarm.forward()
        if generation_config.return_dict_in_generate:
            return Weighted(sequences=swarm.ids, log_weights=swarm.weights, **{NAME: cache_in(swarm.kwargs)})
        drawn = torch.multinomial(swarm.weights.view(-1, self.particles).softmax(1), 1)[:, 0]  # [B]
        return swarm.ids.view(len(drawn), self.particles, -1)[torch.arange(len(drawn)), drawn.to(input_ids.device)]


GROWING = ("attention_mask", *PER_TOKEN)  # keywords with a row each


class Swarm:
    """The particles of one call: N rows for each of B prompts.

    ids: [B * N, T]. logits: [B * N, V] behind them. weights: [B * N] fp64, logs. live: [B * N] bool: not ended. Weights
    and live are on the CPU, where `ok` is."""

    def __init__(self, how: AWRS, model: nn.Module, ids: Tensor, kwargs: dict[str, Any], config: Any) -> None:
        self.how, self.model, self.prompt = how, model, ids.shape[1]
        self.pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        outputs = model._prefill(ids, config, kwargs)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        n = how.particles
        for name in GROWING:
            if (rows := kwargs.get(name)) is not None:
                kwargs[name] = rows.repeat_interleave(n, 0)
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = positions.repeat_interleave(n, -2)  # [B, T], or [3, B, T] of M-RoPE
        cache_in(kwargs).batch_repeat_interleave(n)
        self.kwargs, self.ids = kwargs, ids.repeat_interleave(n, 0)
        self.logits = outputs.logits[:, -1].repeat_interleave(n, 0)
        self.weights = torch.zeros(len(self.ids), dtype=torch.float64)
        self.live = torch.ones(len(self.ids), dtype=torch.bool)

    def forward(self) -> None:
        inputs = self.model.prepare_inputs_for_generation(self.ids, next_sequence_length=1, **self.kwargs)
        outputs = self.model(**inputs, return_dict=True)
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs)
        self.logits = outputs.logits[:, -1]

    def extend(self, logp: Tensor) -> None:
        """One more token each, of logp [B * N, V]. Particles in a dead end are given up."""
        tokens, chance, ok = [], Chance(), self.how.ok
        for row, answer in enumerate(self.ids[:, self.prompt :].tolist()):
            draw = Draw(self.pad, 0.0)
            if self.live[row]:
                check = lambda token, answer=answer: bool(ok([*answer, token]))
                draw = awrs(logp[row], check, chance, self.how.estimator, self.how.accepts)
            self.weights[row] += draw.log_weight
            self.live[row] &= draw.token is not None
            tokens.append(self.pad if draw.token is None else draw.token)
        dead = self.weights.view(-1, self.how.particles).amax(1).isneginf()
        if dead.any():
            row = int(dead.nonzero()[0]) * self.how.particles
            raise InvalidValue(f"All particles are in a dead end. {dead_end(self.ids[row, self.prompt :].tolist())}")
        self.ids = torch.cat([self.ids, torch.tensor(tokens, device=self.ids.device)[:, None]], 1)

    def resample(self) -> None:
        """Draw the particles of a prompt anew, by weight, where few of them have most of it."""
        n = self.how.particles
        shares = self.weights.view(-1, n).softmax(1)  # [B, N]
        few = 1 / shares.square().sum(1) < self.how.ess * n
        if not few.any():
            return
        # systematic: N equal steps through the shares, with one random start
        steps = (torch.arange(n) + torch.rand(len(shares), 1, dtype=torch.float64)) / n
        drawn = torch.searchsorted(shares.cumsum(1), steps).clamp_max(n - 1)
        chosen = torch.where(few[:, None], drawn, torch.arange(n))
        rows = (chosen + n * torch.arange(len(shares))[:, None]).flatten()  # [B * N]
        means = self.weights.view(-1, n).logsumexp(1, keepdim=True) - math.log(n)
        self.weights = torch.where(few[:, None], means, self.weights.view(-1, n)).flatten()
        self.live, self.ids = self.live[rows], self.ids[rows.to(self.ids.device)]
        cache_in(self.kwargs).reorder_cache(rows.to(self.ids.device))
