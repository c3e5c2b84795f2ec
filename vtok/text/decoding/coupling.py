"""Couplings of drafted tokens with the distribution that the output must have. Pure functions on probabilities.

A draft model proposes tokens, the target model has the say. Each rule here takes some drafts or none, such that what
comes out has exactly the target's distribution, whatever the drafts are worth:

- k-SEQ, for k drafts drawn independently of one distribution (SpecTr, https://arxiv.org/abs/2310.15141);
- recursive rejection, for drafts drawn without replacement (DySpec, https://arxiv.org/abs/2410.11744), or chosen with
  no draw at all (one-hot drafts, as those of Token Recycling).

`typical` is none of them: it takes what is likely enough, and the output is no longer the target's.

Differs from the papers: where DySpec prints a normal variable for the acceptance test, a uniform one, without which the
output is biased; and where drafts and target have nothing in common (beta = 0) k-SEQ draws from the target.
Not for temperature 0: i.i.d. drafts are all the same there, and k-SEQ is a waste of them.

`p` is what drafts were drawn of, `q` the target: probabilities, [V], behind all processors (temperature, top-p), the
same ones on both sides. Half precision is computed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vtok.errors import InvalidValue


@dataclass(frozen=True)
class Chance:
    """Where decisions are drawn. generator: of the device of the probabilities; None is torch's own, as in `generate`.

    A rule that draws by this alone can be tested by all its outcomes instead of by samples."""

    generator: torch.Generator | None = None

    def happens(self, probability: float) -> bool:
        """True with this probability; always at 1 and above, never at 0."""
        device = None if self.generator is None else self.generator.device
        return torch.rand((), generator=self.generator, device=device, dtype=torch.float64).item() < probability

    def draw(self, weights: Tensor) -> int:
        """An index of weights [V], by weight."""
        return int(torch.multinomial(weights, 1, generator=self.generator))

    def order(self, logp: Tensor) -> Iterator[tuple[int, float]]:
        """The tokens of log-probabilities [V] and their probabilities, drawn one behind the other without replacement.

        All at once, by the order of log p + Gumbel noise; what is needed first comes to the host first."""
        noise = torch.empty(logp.shape, dtype=torch.float64, device=logp.device).exponential_(generator=self.generator)
        keys = logp.double() - noise.log()  # [V]
        for first, last in ((0, min(64, len(keys))), (64, len(keys))):
            if first < last:
                tokens = keys.topk(last).indices[first:]
                yield from ((i, math.exp(x)) for i, x in zip(tokens.tolist(), logp[tokens].tolist()) if x > -math.inf)

    def failures(self, success: float) -> int:
        """How often something fails before it first succeeds, of independent trials: geometric, from 0."""
        if success >= 1:
            return 0
        device = None if self.generator is None else self.generator.device
        waited = torch.empty((), dtype=torch.float64, device=device).exponential_(generator=self.generator).item()
        return int(waited / -math.log1p(-success))


class Choice(NamedTuple):
    """The next token, and which of the drafts it is: an index into them, or None where all were rejected."""

    token: int
    draft: int | None


def probabilities(x: Tensor) -> Tensor:
    """At least fp32: sums over a vocabulary in bf16 are off by percents."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def normalised(weights: Tensor, otherwise: Tensor) -> Tensor:
    """Weights [V] as probabilities; `otherwise` where nothing is left of them, a case that only rounding reaches."""
    mass = weights.sum()
    return torch.where(mass > 0, weights / torch.where(mass > 0, mass, 1), otherwise)


def fitted(p: Tensor, q: Tensor) -> Tensor:
    """p where q is and as long as q: tokens that the draft model does not have were never drawn."""
    return torch.nn.functional.pad(p.to(q.device, q.dtype), (0, q.shape[-1] - p.shape[-1]))


# ---- k-SEQ: k drafts drawn independently of p ------------------------------------------------------------------------
@dataclass(frozen=True)
class KSeq:
    """The rule for one pair of distributions and one k (Algorithm 2 of SpecTr).

    rho: scalar tensor. acceptance: [V], with what probability a draft of this token is taken, each on its own.
    any_accepted: scalar, that one of k is. residual: [V], of what to draw when none is."""

    rho: Tensor
    acceptance: Tensor
    any_accepted: Tensor
    residual: Tensor


def overlap(p: Tensor, q: Tensor, rho: Tensor | float) -> Tensor:
    """beta(rho): that one draft is accepted, a scalar."""
    return torch.minimum(p, q / rho).sum()


def kseq_rho(p: Tensor, q: Tensor, k: int, steps: int = 60) -> Tensor:
    """The least rho in [1, k] at which the residual is a distribution: 1 - (1 - beta)^k = rho beta. A scalar tensor.

    The difference of both sides changes sign once. The upper end of the bisection is returned: below the root the
    residual would be negative, which is why rho = 1 does for k = 1 alone."""
    if k < 1:
        raise InvalidValue(f"k is a number of drafts, at least 1, got {k}.")
    low, high = p.new_tensor(1.0), p.new_tensor(float(k))
    for _ in range(steps):
        middle = (low + high) / 2
        beta = overlap(p, q, middle)
        valid = 1 - (1 - beta) ** k <= middle * beta
        low, high = torch.where(valid, low, middle), torch.where(valid, middle, high)
    return high


def kseq_rule(p: Tensor, q: Tensor, k: int) -> KSeq:
    """p, q: [V]. k = 1 is classic speculative sampling: rho = 1, acceptance min(1, q / p), residual max(q - p, 0)."""
    p, q = probabilities(p), probabilities(q)
    rho = kseq_rho(p, q, k)
    beta = overlap(p, q, rho)
    accepted = 1 - (1 - beta) ** k
    share = torch.where(beta > 0, accepted / beta.clamp_min(torch.finfo(beta.dtype).tiny), 0)
    residual = (q - torch.minimum(p, q / rho) * share).clamp_min(0)
    # a token that p never draws is never asked for: any acceptance will do
    acceptance = torch.where(p > 0, q / (rho * p.clamp_min(torch.finfo(p.dtype).tiny)), 1).clamp_max(1)
    return KSeq(rho, acceptance, accepted, normalised(residual, otherwise=q))


def kseq(p: Tensor, q: Tensor, drafts: Sequence[int], chance: Chance) -> Choice:
    """The next token, given drafts that were drawn independently of p: distributed as q, [V]."""
    rule = kseq_rule(p, q, len(drafts))
    for i, (token, accepted) in enumerate(zip(drafts, rule.acceptance[list(drafts)].tolist())):
        if chance.happens(accepted):
            return Choice(token, i)
    return Choice(chance.draw(rule.residual), None)


def kseq_chains(chains: Tensor, p: Tensor, q: Tensor, chance: Chance) -> tuple[list[int], int]:
    """The next tokens, given K chains of drafts that were drawn independently (Algorithm 3 of SpecTr).

    chains: [K, L] token ids. p: [K, L, V], p[c, i] is what token i of chain c was drawn of, behind the i before it.
    q: [K, L + 1, V] likewise of the target. At each place the chains that share the tokens taken so far take part, so k
    falls along the way. Returns the tokens, one more than were accepted, and a chain that begins with the accepted."""
    live, taken = list(range(chains.shape[0])), []
    for i in range(chains.shape[1]):
        tokens = chains[live, i].tolist()
        choice = kseq(p[live[0], i], q[live[0], i], tokens, chance)
        taken.append(choice.token)
        if choice.draft is None:
            return taken, live[0]
        live = [chain for chain, token in zip(live, tokens) if token == choice.token]
    return [*taken, chance.draw(probabilities(q[live[0], -1]))], live[0]


# ---- recursive rejection: drafts without replacement, or chosen with no draw -----------------------------------------
def recursive(q: Tensor, drafts: Sequence[int], p: Tensor | None, chance: Chance) -> Choice:
    """The next token, given drafts in the order in which they were drawn of p without replacement: distributed as q.

    q, p: [V]. p None: the drafts were not drawn but chosen, by whatever looks at neither q nor this call's chance; then
    token y is accepted with the probability that it has, given that those before it were not. A draft that has no mass
    left in p cannot have been drawn, and is passed over."""
    rest = probabilities(q)
    left = None if p is None else probabilities(p)
    for i, token in enumerate(drafts):
        if left is None:
            accepted = float(rest[token])
        else:
            drawn = float(left[token])
            if drawn == 0:
                continue
            accepted = float(rest[token]) / drawn
        if chance.happens(accepted):
            return Choice(token, i)
        if left is None:
            without = rest.index_fill(0, torch.tensor(token, device=rest.device), 0)
            rest = normalised(without, otherwise=rest)
        else:
            rest = normalised((rest - left).clamp_min(0), otherwise=rest)
            left = left.index_fill(0, torch.tensor(token, device=left.device), 0)
            if (mass := float(left.sum())) <= 0:
                break  # p could draw no other token: what follows was not drawn of it
            left = left / mass
    return Choice(chance.draw(rest), None)


# ---- typical acceptance: lossy ---------------------------------------------------------------------------------------
def typical(q: Tensor, drafts: Sequence[int], epsilon: float = 0.09, alpha: float = 0.3) -> list[bool]:
    """Which drafts are likely enough to be taken as they are: q(y) > min(epsilon, alpha exp(-H(q))), H in nats.

    q: [V]. The defaults are those of PPD (https://arxiv.org/abs/2405.18628). The output is not distributed as q: it
    leans to what was drafted, the more so where q is flat."""
    q = probabilities(q)
    entropy = torch.special.entr(q).sum()
    threshold = (alpha * torch.exp(-entropy)).clamp_max(epsilon)
    return (q[list(drafts)] > threshold).tolist()
