"""CoreMatching: the FFN neurons that a prompt uses choose the visual tokens to keep and do the decoding alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

from vtok.compressor import Compressor
from vtok.errors import InvalidValue
from vtok.options import AtLeast1, Depth, Keep, Share
from vtok.safe_layer import AtSafeLayer, LastFull
from vtok.stages.decode import Decode
from vtok.types import Activations, ranks

PAPER = "CoreMatching: A Co-adaptive Sparse Inference Framework for VLMs, arXiv 2505.19235"
BLOCK = 256  # tokens whose strongest neurons are found at once
Voters = Literal["all", "text", "last"]
Quota = Literal["token", "mean"]
OFFICIAL_TOKEN = 4  # tokens before the prompt's last one: where "ASSISTANT:" begins in the official prompt


def votes(values: Tensor, voters: Tensor, rho: float, quota: str = "token", block: int = BLOCK) -> Tensor:
    """How many tokens have each neuron among their strongest, [B, F] long (CoreInfer, Equations 1 and 2).

    values: [B, L, F] activations. voters: [B, L] bool, whose strongest neurons count. rho: in (0, 1].
    quota: "token", each has the strongest `floor(rho * n)` of its n positive activations; "mean", all have as many,
        with n the mean over the voters, which for a token with few positive ones reaches into the others.
    Of equal activations the lower neurons come first. NaN is the weakest of all.
    """
    b, length, f = values.shape
    positive = (values > 0).sum(-1) * voters  # [B, L]
    if quota == "mean":
        mean = positive.sum(1).double() / voters.sum(1).clamp(min=1)
        positive = mean[:, None].expand(-1, length)
    # 0.2 * 15 is 3, not 2.9999
    quotas = (positive.double() * rho + 1e-9).floor().long() * voters  # [B, L]
    most = max(1, math.floor(f * rho + 1e-9))
    counts = torch.zeros(b, f, dtype=torch.long, device=values.device)
    for start in range(0, length, block):
        x, q = values[:, start : start + block].nan_to_num(-torch.inf), quotas[:, start : start + block, None]
        weakest = x.topk(most, dim=-1).values.gather(-1, (q - 1).clamp(min=0))  # [B, b, 1] of those chosen
        above, equal = (x > weakest) & (q > 0), x == weakest
        missing = q - above.sum(-1, keepdim=True)
        counts += (above | (equal & (equal.cumsum(-1) <= missing))).sum(1)
    return counts


def core_neurons(counts: Tensor, beta: float) -> Tensor:
    """[B, K] long, ascending: the `floor(beta * F)` neurons, at least one, with the most of the votes `counts` [B, F]
    (CoreInfer, Equation 3). Of equal ones the lower come first."""
    k = max(1, math.floor(counts.shape[1] * beta + 1e-9))
    return counts.argsort(dim=1, descending=True, stable=True)[:, :k].sort(1).values


def coactivation(values: Tensor, reference: Tensor) -> Tensor:
    """[B, L] long: how many neurons of `reference` [B, F] bool each token of `values` [B, L, F] activates, above 0."""
    return ((values > 0) & reference[:, None]).sum(-1)


def elbow(counts: Tensor, members: Tensor, inclusive: bool = True) -> Tensor:
    """How many members lie above the elbow of their sorted counts, [G] long (Section 3 of the paper).

    counts: [G, L] long, members: [G, L] bool. Sorted downwards, the n counts of a group are points (i, v_i); the elbow
    is the one farthest from the line through the first and the last point, the first of several. As many are counted
    as are at least its value, or above it where `inclusive` is false. All are where no point leaves the line.
    """
    last = (members.sum(1) - 1).clamp(min=0)  # [G], n - 1
    lowest = torch.iinfo(torch.long).min
    v = counts.masked_fill(~members, lowest).sort(1, descending=True).values
    place = torch.arange(v.shape[1], device=v.device)
    inside = place <= last[:, None]
    v = v.masked_fill(~inside, 0)
    first, final = v[:, :1], v.gather(1, last[:, None])
    # the distance times a constant, in integers: rounding must not make an elbow of a straight line
    gap = (last[:, None] * (v - first) - place * (final - first)).abs().masked_fill(~inside, 0)
    threshold = v.gather(1, gap.argmax(1, keepdim=True))
    taken = members & ((counts >= threshold) if inclusive else (counts > threshold))
    return torch.where(gap.any(1), taken.sum(1), members.sum(1))


def core_tokens(
    counts: Tensor, members: Tensor, inclusive: bool = True, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """[G, L] bool: the members with the highest `counts` [G, L], as many as `elbow` says, but at least `low` [G] and
    at most `high` [G]. Of equal counts the earlier come first."""
    n = elbow(counts, members, inclusive)
    n = n if low is None else n.maximum(low)
    n = n if high is None else n.minimum(high)
    return members & (ranks(counts.masked_fill(~members, -1)) < n[:, None])


def _find_core(activations: Activations, rho: float, beta: float, quota: str, voters: str) -> Tensor:
    """[B, K] core neurons of each prompt, by the votes of all its tokens, of its text or of its last token."""
    who = activations.prompt
    if voters == "text":
        who = who & ~activations.visual
    elif voters == "last":
        who = torch.zeros_like(who).scatter_(1, activations.anchor[:, None], True)
    return core_neurons(votes(activations.values, who, rho, quota), beta)


@dataclass(frozen=True, kw_only=True)
class CoreTokens(AtSafeLayer):
    """Keep the visual tokens that activate many of the prompt's core neurons, after an early decoder layer.

    rho, beta: a token votes for the strongest rho of its positive FFN activations; the beta of the layer's neurons with
        the most votes are the core.
    layer: l, the layer (from 0) whose FFN decides, or a fraction of the depth; those behind it see core tokens only.
        "auto": the layer that a `probe` found safe. Ours: the paper names none, and the released code acts in layers 5
        to 18 of 32. Earlier the activations do not tell yet what the question is about.
    inclusive: whether counts equal to the elbow's are kept; the official code drops them.
    reference: what a token's active neurons are counted against: "core", the core neurons; "last", the active ones of
        the prompt's last token; "official", of the token four before it, as the released code does. "last" is the
        default since the core, to which picture tokens contribute most votes, ranks what an answer needs behind other
        tokens: docs/probe.md compares the two, and the layers.
    voters: "all" tokens of the prompt, its "text", or its "last" token. Ours: the paper does not say.
    quota: see `votes`; "mean" is what CoreInfer's code does.
    per: one elbow a "sample", over all its pictures, or a "picture".
    min_keep, max_keep: bounds on what the elbow keeps: fractions of the visual tokens, or counts a picture. None is no
        bound. min_keep=1.0 keeps all, and the model runs untouched.
    anchor: where the prompt ends, see `InLLM`; later tokens have no vote.
    Differs from the paper: the layers up to l keep the keys and values of all tokens. The released code holds no core
    neurons, takes image tokens from fixed places and zeroes cached keys in 14 layers, after which the zeros still
    draw attention; here dropped tokens are gone. Where the sorted counts are a straight line, all tokens stay.
    """

    name = probed = "core_tokens"
    before = False
    needs = frozenset({"ffn"})
    paper = PAPER
    adaptive = True
    several_turns = False  # all tokens of the prompt vote
    examples = ({"layer": 1, "max_keep": 0.6},)

    keep: float = field(default=1.0, init=False, repr=False)  # the elbow says it
    rho: Share = 0.2
    beta: Share = 0.4
    layer: LastFull = 0.45
    inclusive: bool = True
    reference: Literal["core", "last", "official"] = "last"
    voters: Voters = "all"
    quota: Quota = "token"
    per: Literal["sample", "picture"] = "sample"
    min_keep: Keep | None = None
    max_keep: Keep | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.min_keep, self.max_keep
        if low is not None and high is not None and isinstance(low, int) == isinstance(high, int) and low > high:
            raise InvalidValue(f"min_keep must be at most max_keep, got {low} and {high}")

    @property
    def is_identity(self) -> bool:
        return isinstance(self.min_keep, float) and self.min_keep == 1.0

    def at(self, n_layers: int) -> int:
        """The layer that decides, of so many."""
        layer = self.layer if isinstance(self.layer, int) else round(self.layer * n_layers)
        if layer >= n_layers - 1:
            raise InvalidValue(
                f"layer must be below the last of {n_layers} decoder layers, {n_layers - 1}, for a layer to see fewer "
                f"tokens; got {self.layer}."
            )
        return layer

    def schedule(self, n_layers: int) -> dict[int, float | int | None]:
        return {self.at(n_layers): None}

    def rank(self, activations: Activations) -> Tensor:
        """[B, L] long: how many neurons of the reference each token activates."""
        values = activations.values
        reference = torch.zeros_like(values[:, 0], dtype=torch.bool)  # [B, F]
        if self.reference == "core":
            core = _find_core(activations, self.rho, self.beta, self.quota, self.voters)
            reference = reference.scatter_(1, core, True)
        else:
            at = activations.anchor - (OFFICIAL_TOKEN if self.reference == "official" else 0)
            at = at.maximum(activations.prompt.to(torch.uint8).argmax(1))  # a prompt may be shorter
            reference = values.gather(1, at[:, None, None].expand(-1, 1, values.shape[2])).squeeze(1) > 0
        return coactivation(values, reference)

    def score(self, activations: Activations) -> Tensor:
        """[B, L] bool: the core tokens."""
        visual, picture = activations.visual, activations.picture
        b, length = visual.shape
        counts, members = self.rank(activations)[:, None], visual[:, None]  # [B, 1, L]
        pictures = (picture.amax(1, keepdim=True) + 1).clamp(min=1)  # [B, 1]
        if self.per == "picture":
            members = members & (picture[:, None] == torch.arange(activations.pictures, device=picture.device)[:, None])
            counts, pictures = counts.expand_as(members), torch.ones_like(members[..., 0], dtype=torch.long)
        counts, members, pictures = counts.reshape(-1, length), members.reshape(-1, length), pictures.reshape(-1)
        n = members.sum(1)
        low, high = _bound(self.min_keep, n, pictures), _bound(self.max_keep, n, pictures)
        return core_tokens(counts, members, self.inclusive, low, high).view(b, -1, length).any(1)

    def with_budget(self, budget: float, n_layers: int) -> CoreTokens:
        """`max_keep` such that the mean is within the budget, whatever the elbow says, at the latest layer up to
        `layer` behind which at least a quarter of the budget is left; no other than `layer` where a probe found it."""
        last = self.at(n_layers)
        for layer in range(last, -1 if self.probe is None else last - 1, -1):
            most = (budget * n_layers - layer - 1) / (n_layers - layer - 1)
            if most >= budget / 4:
                return replace(self, layer=layer, max_keep=min(1.0, most))
        raise InvalidValue(
            f"{layer + 1} of {n_layers} layers see all tokens, so a budget of {budget} cannot be met: it leaves next "
            f"to nothing for the others. Raise it, or compress before the language model."
        )


def _bound(keep: float | int | None, n: Tensor, pictures: Tensor) -> Tensor | None:
    """[G] how many of n [G] tokens of so many pictures [G] `keep` means."""
    if keep is None:
        return None
    return n.minimum(keep * pictures) if isinstance(keep, int) else (n.double() * keep + 1e-9).floor().long()


@dataclass(frozen=True, kw_only=True)
class CoreNeurons(Decode):
    """Decode with the core neurons of the prompt alone: beta of the FFN in the layers start <= l < end.

    rho, beta, voters, quota: as in `CoreTokens`; each layer has its own core, of the tokens present there.
    start, end: fractions of the depth, or layers (int). The defaults are CoreInfer's, layers 6 to 26 of 32.
    min_tokens: a prompt with fewer tokens has no stable core and stays dense. Ours.
    A forward that holds a completion too (training, a rollout's log-probabilities) treats its tokens as decoding
    would. Later text goes through the same neurons until a prompt brings another picture, which has its own; text
    without a picture is dense. beta=1.0 is the identity. All visual tokens stay: `trace.mean_keep` is 1.
    Weights are not changed; the core's are copied for as long as the cache lives (`trace.copied_bytes`). A batch in
    which some samples are dense, and decoding with gradients, computes all neurons and zeroes the others.
    Differs from the paper: there are always beta neurons, those without votes last; sets belong to a sample, and the
    samples of a batch do not share one.
    """

    name = "core_neurons"
    slow = True
    needs = frozenset({"ffn"})
    paper = PAPER
    examples = ({"min_tokens": 1},)

    keep: float = field(default=1.0, init=False, repr=False)  # drops no token
    rho: Share = 0.2
    beta: Share = 0.4
    start: Depth = 6 / 32
    end: Depth = 27 / 32
    voters: Voters = "all"
    quota: Quota = "token"
    min_tokens: AtLeast1 = 32

    @property
    def is_identity(self) -> bool:
        return self.beta == 1

    def sparse_layers(self, n_layers: int) -> range:
        first, end = (v if isinstance(v, int) else round(v * n_layers) for v in (self.start, self.end))
        if not first < end <= n_layers:
            raise InvalidValue(
                f"Of {n_layers} layers, start={self.start} is layer {first} and end={self.end} layer {end}: the end "
                f"must come after the start and not after the last layer."
            )
        return range(first, end)

    def neurons(self, activations: Activations) -> Tensor:
        return _find_core(activations, self.rho, self.beta, self.quota, self.voters)

    def with_budget(self, budget: float, n_layers: int) -> CoreNeurons:
        if budget < 1:
            raise InvalidValue(f"core_neurons drops no visual token: it cannot meet a budget of {budget}.")
        return self


@dataclass(frozen=True, kw_only=True)
class CoreMatching(CoreTokens):
    """`CoreTokens` in the prefill and `CoreNeurons` in decoding, with the parameters of both.

    start, end, min_tokens: of the sparse layers, see `CoreNeurons`.
    Differs from the paper: see the two.
    """

    name = "corematching"
    slow = True
    stage = "llm+decode"
    examples = ({"layer": 1, "max_keep": 0.6, "min_tokens": 1},)

    start: Depth = 6 / 32
    end: Depth = 27 / 32
    min_tokens: AtLeast1 = 32

    def parts(self) -> tuple[Compressor, ...]:
        return tuple(
            cls(**{f.name: getattr(self, f.name) for f in fields(cls) if f.init}) for cls in (CoreTokens, CoreNeurons)
        )
