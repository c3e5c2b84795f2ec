"""Couplings of drafts with a target: by all outcomes, not by samples; the optimum by a linear programme."""

import itertools
import math

import numpy as np
import pytest
import torch
from outcomes import outcomes
from scipy.optimize import linprog

from vtok.errors import InvalidValue
from vtok.text.decoding import coupling
from vtok.text.decoding.coupling import (
    Chance,
    kseq,
    kseq_chains,
    kseq_rho,
    kseq_rule,
    recursive,
    typical,
)

P, Q = (0.6, 0.3, 0.1), (0.2, 0.3, 0.5)
PAIRS = [
    (P, Q),
    ((0.25, 0.25, 0.25, 0.25), (0.7, 0.1, 0.15, 0.05)),
    ((0.5, 0.5, 0.0), (0.0, 0.3, 0.7)),  # half of each is strange to the other
    ((1.0, 0.0, 0.0), (0.0, 0.4, 0.6)),  # nothing in common
    ((0.2, 0.3, 0.5), (0.2, 0.3, 0.5)),  # the same
    ((1.0, 0.0, 0.0), (0.3, 0.4, 0.3)),  # one token is all that p draws
]


def vector(x):
    return torch.tensor(x, dtype=torch.float64)


def sampled_without_replacement(p, k):
    """ordered tuples of k different tokens -> probability."""
    found = {(): 1.0}
    for _ in range(k):
        longer = {}
        for drawn, likely in found.items():
            rest = 1 - sum(p[i] for i in drawn)
            for i, x in enumerate(p):
                if i not in drawn and x > 0 and rest > 1e-12:
                    longer[*drawn, i] = likely * x / rest
        found = longer or found
    return found


def marginal(results, size):
    total = np.zeros(size)
    for result, likely in results:
        total[result] += likely
    return total


def optimum(p, q, k):
    """The largest probability that the output is among k i.i.d. drafts, the output being distributed as q."""
    tuples, n = list(itertools.product(range(len(p)), repeat=k)), len(q)
    cost = [-float(y in drafts) for drafts in tuples for y in range(n)]
    rows = np.kron(np.eye(len(tuples)), np.ones(n))
    columns = np.kron(np.ones(len(tuples)), np.eye(n))
    mass = [math.prod(p[i] for i in drafts) for drafts in tuples]
    done = linprog(cost, A_eq=np.vstack([rows, columns]), b_eq=[*mass, *q], bounds=(0, None))
    return -done.fun


@pytest.mark.parametrize(
    ("k", "best", "reached", "rho"), [(1, 0.6, 0.6, 1), (2, 0.69, 0.658, 1.584), (3, 0.771, 0.71, 2.1)]
)
def test_golden_numbers_of_kseq(k, best, reached, rho):
    rule = kseq_rule(vector(P), vector(Q), k)
    assert optimum(P, Q, k) == pytest.approx(best, abs=5e-4)
    assert rule.any_accepted.item() == pytest.approx(reached, abs=5e-4)
    assert rule.rho.item() == pytest.approx(rho, abs=6e-4)


@pytest.mark.parametrize(("p", "q"), PAIRS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_kseq_gives_the_target(p, q, k):
    total, accepted = np.zeros(len(p)), 0.0
    for drafts in itertools.product(range(len(p)), repeat=k):
        drawn = math.prod(p[i] for i in drafts)
        if drawn == 0:
            continue
        found = outcomes(lambda chance, drafts=drafts: kseq(vector(p), vector(q), drafts, chance))
        assert sum(found.values()) == pytest.approx(1, abs=1e-12)
        for choice, likely in found.items():
            total[choice.token] += drawn * likely
            accepted += drawn * likely * (choice.draft is not None)
            assert choice.draft is None or drafts[choice.draft] == choice.token
    np.testing.assert_allclose(total, q, atol=1e-12)
    best = optimum(p, q, k)
    assert (1 - 1 / math.e) * best - 1e-9 <= accepted <= best + 1e-9
    assert accepted == pytest.approx(kseq_rule(vector(p), vector(q), k).any_accepted.item(), abs=1e-12)


def test_rho_below_the_root_has_no_residual():
    """Why rho is not 1: the mass that is missing would be negative somewhere."""
    p, q = vector(P), vector(Q)
    for k in (2, 3):
        root = kseq_rho(p, q, k)
        for rho, valid in ((root - 1e-3, False), (root, True)):
            beta = torch.minimum(p, q / rho).sum()
            rest = q - torch.minimum(p, q / rho) * (1 - (1 - beta) ** k) / beta
            assert (rest.min() >= -1e-12) == valid
    with pytest.raises(InvalidValue, match="at least 1"):
        kseq_rho(p, q, 0)


def test_chains_give_the_target(monkeypatch):
    """K = 2 chains of L = 2 drafts: the joint distribution of the next tokens, by all drafts and all decisions."""
    torch.manual_seed(0)
    size, length, n = 3, 2, 2
    key = lambda p, q, k: (*p.tolist(), *q.tolist(), k)
    rules = {}

    def once(p, q, k):  # the same few pairs come back for all drafts
        if key(p, q, k) not in rules:
            rules[key(p, q, k)] = kseq_rule(p, q, k)
        return rules[key(p, q, k)]

    monkeypatch.setattr(coupling, "kseq_rule", once)
    draft = torch.softmax(2 * torch.randn(1 + size, size, dtype=torch.float64), -1)  # behind nothing, behind token i
    target = torch.softmax(2 * torch.randn(1 + size + size**2, size, dtype=torch.float64), -1)
    of = lambda table, *before: table[
        [0, 1, 1 + size][len(before)] + sum(t * size**i for i, t in enumerate(before[::-1]))
    ]
    total, longest = {}, 0.0
    for tokens in itertools.product(range(size), repeat=n * length):
        chains = torch.tensor(tokens).view(n, length)
        p = torch.stack([torch.stack([of(draft), of(draft, a)]) for a, b in chains.tolist()])
        q = torch.stack([torch.stack([of(target), of(target, a), of(target, a, b)]) for a, b in chains.tolist()])
        drawn = math.prod(p[c, i, chains[c, i]].item() for c in range(n) for i in range(length))

        def rule(chance, chains=chains, p=p, q=q):
            taken, chain = kseq_chains(chains, p, q, chance)
            assert chains[chain, : len(taken) - 1].tolist() == taken[:-1]
            return tuple(taken)

        for taken, likely in outcomes(rule).items():
            total[taken] = total.get(taken, 0.0) + drawn * likely
            longest += drawn * likely * (len(taken) == 3)
    for a, b in itertools.product(range(size), repeat=2):  # what is not there yet is drawn of the target later
        here = sum(likely for taken, likely in total.items() if taken[:2] == (a, b))
        here += total.get((a,), 0.0) * of(target, a)[b].item()
        assert here == pytest.approx(of(target)[a].item() * of(target, a)[b].item(), abs=1e-12)
        for c in range(size):
            third = total.get((a, b, c), 0.0) + total.get((a, b), 0.0) * of(target, a, b)[c].item()
            third += total.get((a,), 0.0) * of(target, a)[b].item() * of(target, a, b)[c].item()
            assert third == pytest.approx((of(target)[a] * of(target, a)[b] * of(target, a, b)[c]).item(), abs=1e-12)
    assert 0 < longest < 1


@pytest.mark.parametrize(("p", "q"), PAIRS)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_recursive_rejection_gives_the_target(p, q, k):
    total, accepted = np.zeros(len(p)), 0.0
    for drafts, drawn in sampled_without_replacement(p, k).items():
        for choice, likely in outcomes(lambda chance, d=drafts: recursive(vector(q), d, vector(p), chance)).items():
            total[choice.token] += drawn * likely
            accepted += drawn * likely * (choice.draft is not None)
    np.testing.assert_allclose(total, q, atol=1e-12)
    if k == 1:
        assert accepted == pytest.approx(np.minimum(p, q).sum())


def test_what_p_cannot_draw_is_never_accepted():
    """A tree may hold more siblings than p has tokens: the early stop."""
    for choice in outcomes(lambda chance: recursive(vector((0.3, 0.4, 0.3)), (0, 1), vector((1.0, 0.0, 0.0)), chance)):
        assert choice.draft in (0, None)


@pytest.mark.parametrize("drafts", [(), (0,), (2, 0), (1, 1, 2), (0, 1, 2)])
def test_chosen_drafts_give_the_target(drafts):
    q = vector(Q)
    found = outcomes(lambda chance: recursive(q, drafts, None, chance))
    np.testing.assert_allclose(marginal([(c.token, x) for c, x in found.items()], 3), Q, atol=1e-12)
    accepted = sum(likely for choice, likely in found.items() if choice.draft is not None)
    assert accepted == pytest.approx(sum(Q[i] for i in set(drafts)))
    certain = outcomes(lambda chance: recursive(vector((0.0, 1.0, 0.0)), (0, 1), None, chance))
    assert certain == {(1, 1): 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies_in_low_precision(dtype):
    """In fp32 too no residual is negative, and half precision is not summed as such."""
    torch.manual_seed(1)
    p, q = (torch.softmax(3 * torch.randn(50_000), 0).to(dtype) for _ in range(2))
    for k in (1, 4):
        rule = kseq_rule(p, q, k)
        assert rule.residual.dtype == torch.float32 and rule.residual.min() >= 0
        assert rule.residual.sum().item() == pytest.approx(1, abs=1e-5)
        exact = kseq_rule(p.double(), q.double(), k)
        torch.testing.assert_close(rule.residual.double(), exact.residual, atol=1e-7, rtol=1e-5)
    chance = Chance(torch.Generator().manual_seed(0))
    drafts = torch.multinomial(p.float(), 8).tolist()
    assert 0 <= recursive(q, drafts, p, chance).token < 50_000


def test_the_chance_is_what_it_says():
    chance = Chance(torch.Generator().manual_seed(0))
    assert not any(chance.happens(0.0) for _ in range(50)) and all(chance.happens(1.0) for _ in range(50))
    n = 4000
    assert abs(sum(chance.happens(0.3) for _ in range(n)) - 0.3 * n) < 4 * math.sqrt(n * 0.21)
    drawn = np.bincount([chance.draw(torch.tensor([0.0, 1.0, 3.0])) for _ in range(n)], minlength=3)
    assert drawn[0] == 0 and abs(drawn[2] - 0.75 * n) < 4 * math.sqrt(n * 0.1875)


def test_typical_acceptance():
    """Uniform over 4: exp(-H) = 1/4, so the threshold is min(.09, .075). Peaked: it is epsilon."""
    uniform = vector((0.25, 0.25, 0.25, 0.25))
    assert typical(uniform, [0, 3]) == [True, True]
    assert typical(uniform, [0], epsilon=0.9, alpha=1.01) == [False]
    peaked = vector((0.9, 0.08, 0.02, 0.0))  # exp(-H) = 0.6765...
    entropy = -sum(x * math.log(x) for x in (0.9, 0.08, 0.02))
    assert typical(peaked, [0, 1, 2, 3]) == [True, False, False, False]
    bar = 0.1 * math.exp(-entropy)
    assert 0.02 < bar < 0.08 and typical(peaked, [1, 2], alpha=0.1) == [True, False]
