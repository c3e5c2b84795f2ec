"""AWRS: tokens and weights by all outcomes; texts against the model's own distribution, by enumeration."""

import itertools
import math
import random
from unittest.mock import Mock

import pytest
import torch
from contract import batch, language_model, picture, tiny
from outcomes import outcomes

import vtok
from vtok.errors import InvalidValue, Unsupported
from vtok.text.decoding.awrs import AWRS, AWRSProcessor, Weighted, awrs, first_accepted, geometric
from vtok.text.decoding.coupling import Chance

P, OK = (0.5, 0.2, 0.15, 0.1, 0.05), {1, 2, 4}
logs = lambda p: torch.tensor(p, dtype=torch.float64).log()
EOS = 5  # of the tiny model


@pytest.fixture(scope="module")
def model():
    return language_model(6, hidden=16, ffn=32, scale=8.0, eos=EOS)


def moments(found):
    """token -> E[w; token], and the standard deviation of w."""
    means = {}
    for (token, log_weight), likely in found.items():
        means[token] = means.get(token, 0.0) + likely * math.exp(log_weight)
    mean = sum(means.values())
    return means, math.sqrt(sum(likely * math.exp(2 * w) for (_, w), likely in found.items()) - mean**2)


@pytest.mark.parametrize(("estimator", "deviation"), [("recursive", 0.268), ("two_pass", 0.2873)])
def test_weights_are_unbiased(estimator, deviation):
    """The case of the specification: E[w; x] = p(x) ok(x), by all orders of the tokens."""
    means, spread = moments(outcomes(lambda chance: awrs(logs(P), OK.__contains__, chance, estimator)))
    assert means == pytest.approx({1: 0.2, 2: 0.15, 4: 0.05}, abs=1e-12)
    assert spread == pytest.approx(deviation, abs=6e-4)


def test_geometric_weights_are_unbiased():
    """With little that is rejected, five phantom rejections and more do not count."""
    p = (0.5, 0.06, 0.4, 0.04)
    means, _ = moments(outcomes(lambda chance: geometric(logs(p), {0, 2}.__contains__, chance, 2), tail=5))
    assert means == pytest.approx({0: 0.5, 2: 0.4}, abs=1e-5)


@pytest.mark.parametrize(("accepts", "deviation"), [(2, 0.290), (5, 0.156)])
def test_geometric_weights_vary_as_they_should(accepts, deviation):
    chance, n = Chance(torch.Generator().manual_seed(accepts)), 4000
    draws = [geometric(logs(P), OK.__contains__, chance, accepts) for _ in range(n)]
    weights = torch.tensor([draw.log_weight for draw in draws], dtype=torch.float64).exp()
    assert abs(weights.mean() - 0.4) < 4 * deviation / math.sqrt(n)
    assert weights.std().item() == pytest.approx(deviation, abs=0.015)
    first = sum(draw.token == 1 for draw in draws) / n
    assert abs(first - 0.5) < 4 * math.sqrt(0.25 / n)


@pytest.mark.parametrize("estimator", ["auto", "recursive", "two_pass", "geometric"])
def test_edges(estimator):
    """All accepted: weight 1. None: dead. A single token, and a token that is all the mass."""
    draw = lambda p, ok: outcomes(lambda chance: awrs(logs(p), ok.__contains__, chance, estimator))
    assert all(w == pytest.approx(0, abs=1e-12) for _, w in draw((0.3, 0.3, 0.4), {0, 1, 2}))
    assert {x.token: x.log_weight for x in draw((0.3, 0.3, 0.4), set())} == {None: -math.inf}
    assert {x.token: x.log_weight for x in draw((1.0, 0.0), {0})} == {0: 0.0}
    assert {token for token, _ in draw((1.0, 0.0), {1})} == {None}


def test_auto_and_calls():
    """Where a token has 2/3 of the mass one call often does; no token is asked for twice."""
    asked = []
    check = lambda token: asked.append(token) or token in OK
    for seed in range(50):
        asked.clear()
        awrs(logs((0.01, 0.9, 0.05, 0.03, 0.01)), check, Chance(torch.Generator().manual_seed(seed)), accepts=2)
        assert len(asked) == len(set(asked))
    mean = lambda p, estimator: sum(calls * x for calls, x in outcomes(counted(p, estimator)).items())
    assert mean((0.02, 0.9, 0.08), "auto") == mean((0.02, 0.9, 0.08), "geometric") < 2
    assert mean((0.3, 0.4, 0.3), "auto") == mean((0.3, 0.4, 0.3), "recursive") >= 2


def counted(p, estimator):
    def rule(chance):
        asked = []
        awrs(logs(p), lambda token: asked.append(token) or token == 1, chance, estimator)
        return len(asked)

    return rule


def test_the_first_accepted_is_the_masked_model():
    found = outcomes(lambda chance: first_accepted(logs(P), OK.__contains__, chance))
    assert found == pytest.approx({1: 0.5, 2: 0.375, 4: 0.125})


def test_orders_are_draws_without_replacement():
    """Gumbel noise, against the product of conditional probabilities; and far beyond what is looked at first."""
    chance, p, n = Chance(torch.Generator().manual_seed(0)), (0.5, 0.3, 0.2), 6000
    orders = [tuple(token for token, _ in chance.order(logs(p))) for _ in range(n)]
    for a, b, c in itertools.permutations(range(3)):
        expected = p[a] * p[b] / (1 - p[a])
        assert abs(orders.count((a, b, c)) / n - expected) < 4 * math.sqrt(expected / n)
    wide = torch.full((300,), -math.inf)
    wide[::2] = math.log(1 / 150)
    drawn = list(chance.order(wide))
    assert sorted(token for token, _ in drawn) == list(range(0, 300, 2))
    assert all(x == pytest.approx(1 / 150) for _, x in drawn)


# ---- texts -----------------------------------------------------------------------------------------------------------
def viable(ids):
    """Of tokens 0 to 4, at most one 0, no 1 behind a 2, and whole only with an odd sum: dead ends are seen late."""
    *body, last = ids
    if last == EOS:
        return sum(body) % 2 == 1
    return ids.count(0) <= 1 and (2, 1) not in itertools.pairwise(ids)


def exact(model, prompt, length, ok):
    """answer -> probability that the model generates it, for those that ok accepts on the way; and their sum."""
    found, waiting = {}, [((), 0.0)]
    while waiting:
        answer, likely = waiting.pop()
        with torch.no_grad():
            logp = model(torch.tensor([[*prompt, *answer]])).logits[0, -1].double().log_softmax(-1)
        for token in range(6):
            longer = (*answer, token)
            if ok(list(longer)):
                if token == EOS or len(longer) == length:
                    found[longer] = math.exp(likely + logp[token])
                else:
                    waiting.append((longer, likely + logp[token].item()))
    return found


@pytest.mark.parametrize(("estimator", "ess"), [("auto", 0.0), ("recursive", 1.0), ("two_pass", 0.5)])
def test_particles_are_the_models_valid_texts(model, estimator, ess):
    """Weighted frequencies against enumeration; masking alone would be far off, as is checked too."""
    torch.manual_seed(1)
    prompt, length, n = [1, 2, 3], 3, 1500
    truth = exact(model, prompt, length, viable)
    total = sum(truth.values())
    how = AWRS(viable, particles=n, ess=ess, estimator=estimator)
    out = model.generate(
        torch.tensor([prompt]), do_sample=True, top_k=0, max_new_tokens=length, custom_generate=how,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert isinstance(out, Weighted) and out.sequences.shape == (n, len(prompt) + length)
    weights = out.log_weights.exp()
    assert weights.mean().item() == pytest.approx(total, rel=0.12)
    shares, found, plain = weights / weights.sum(), dict.fromkeys(truth, 0.0), dict.fromkeys(truth, 0.0)
    for row, share in zip(out.sequences[:, len(prompt) :].tolist(), shares.tolist()):
        answer = tuple(row[: row.index(EOS) + 1] if EOS in row else row)
        found[answer] += share
        plain[answer] += 1 / n
    distance = lambda a: sum(abs(a[x] - truth[x] / total) for x in truth) / 2
    assert distance(found) < 0.06
    if ess == 0:
        assert distance(plain) > 2 * distance(found)


def test_resampling_keeps_rows_together(model):
    """Caches follow their particles: the log-probabilities that were drawn from are those of a full recompute."""
    torch.manual_seed(0)
    seen = []

    def note(input_ids, scores):
        seen.append((input_ids.clone(), scores.clone()))
        return scores

    prompts = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    how = AWRS(lambda ids: EOS not in ids and sum(ids) % 3 != 1, particles=6, ess=1.0)
    out = model.generate(
        prompts, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=6, custom_generate=how,
        logits_processor=[note],
    )  # fmt: skip
    assert out.shape == (2, 10) and torch.equal(out[:, :4], prompts)
    for ids, scores in seen:
        assert len(ids) == 12
        rows = mask.repeat_interleave(6, 0)
        full = torch.cat([rows, rows.new_ones(12, ids.shape[1] - 4)], 1)
        with torch.no_grad():
            positions = (full.cumsum(1) - 1).clamp_min(0)
            expected = model(ids, attention_mask=full, position_ids=positions).logits[:, -1]
        torch.testing.assert_close(scores, expected, atol=2e-4, rtol=1e-4)


def test_dead_ends(model):
    ids, sample = torch.tensor([[1, 2]]), {"do_sample": True, "top_k": 0, "max_new_tokens": 4}
    with pytest.raises(InvalidValue, match="All particles are in a dead end.*behind"):
        model.generate(ids, **sample, custom_generate=AWRS(lambda ids: EOS not in ids and len(ids) < 3))
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    logits[EOS] = -math.inf
    good, bad = logits.topk(2).indices.tolist()
    half = AWRS(lambda ids: ids[0] == good or ids == [bad], particles=64, ess=0)
    out = model.generate(ids, **sample, custom_generate=half, return_dict_in_generate=True)
    dead = out.log_weights.isneginf()
    assert dead.any() and not dead.all() and (out.sequences[~dead, 2] == good).all()
    for _ in range(5):
        assert model.generate(ids, **sample, custom_generate=half)[0, 2] == good
    with pytest.raises(Unsupported, match="do_sample"):
        model.generate(ids, custom_generate=half)
    for asked, reason in (
        ({"streamer": Mock()}, "no streamer"),
        ({"prompt_lookup_num_tokens": 3}, "no assistant"),
        ({"return_dict_in_generate": True, "output_logits": True}, "leave output_logits off"),
        ({"cache_implementation": "static"}, "a DynamicCache for its particles, not a StaticCache"),
    ):
        with pytest.raises(Unsupported, match=reason):
            model.generate(ids, **sample, custom_generate=half, **asked)
    for wrong in ({"particles": 0}, {"ess": 1.5}, {"accepts": 1}, {"estimator": "exact"}):
        with pytest.raises(InvalidValue, match=next(iter(wrong))):
            AWRS(len, **wrong)


def test_pictures():
    """A patched vision-language model, M-RoPE and all: the model's own mass of the valid texts."""
    model, processor = tiny("qwen2_5_vl")
    inputs = batch(processor, ["# what?", "a longer prompt: #"], [picture(56, 84), picture(56, 56)])
    valid = lambda ids: all(i % 2 == 0 for i in ids)
    torch.manual_seed(0)
    with vtok.patch(model, "fastv", keep=0.5, layer=1):
        out = model.generate(
            **inputs, do_sample=True, max_new_tokens=4, top_k=0, custom_generate=AWRS(valid, particles=4)
        )
    answers = out[:, inputs["input_ids"].shape[1] :].tolist()
    assert [len(row) for row in answers] == [4, 4] and all(valid(row) for row in answers)


# ---- the processor ---------------------------------------------------------------------------------------------------
def test_the_processor_is_a_mask(model):
    """Greedy: the same as masking the vocabulary. Sampling: each step's frequencies are the masked model's."""
    prompt, ok = torch.tensor([[1, 2, 3]]), lambda ids: ids[-1] in (0, 1, 2) and len(set(ids)) == len(ids)

    def masked(input_ids, scores):
        allowed = [ok([*input_ids[0, 3:].tolist(), token]) for token in range(6)]
        return scores.masked_fill(~torch.tensor(allowed), -math.inf)

    greedy = model.generate(prompt, max_new_tokens=3, logits_processor=[AWRSProcessor(ok, 3, temperature=0)])
    assert torch.equal(greedy, model.generate(prompt, max_new_tokens=3, logits_processor=[masked]))
    torch.manual_seed(0)
    logits, n = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.0, 0.0]]), 3000
    processor = AWRSProcessor(ok, 3, temperature=2.0)
    drawn = [processor(prompt, logits).argmax().item() for _ in range(n)]
    expected = masked(prompt, logits / 2).softmax(-1)[0]
    for token in range(6):
        p = expected[token].item()
        assert abs(drawn.count(token) / n - p) <= 4 * math.sqrt(p * (1 - p) / n)
    scores = processor(prompt, logits)
    assert scores.isfinite().sum() == 1 and logits.isfinite().all()


def test_rows_of_the_processor(model):
    """A row that ended is left alone; one that cannot go on is told."""
    ok, prompts = (lambda ids: ids[-1] in (0, EOS)), torch.tensor([[1, 2], [3, 4]])
    random.seed(0)
    processor = AWRSProcessor(ok, 2, eos_token_id=EOS)
    out = model.generate(prompts, do_sample=True, max_new_tokens=12, logits_processor=[processor])
    answers = [row[: row.index(EOS) + 1] if EOS in row else row for row in out[:, 2:].tolist()]
    assert all(set(answer) <= {0, EOS} for answer in answers)
    ended, scores = torch.tensor([[1, 2, EOS], [3, 4, 0]]), torch.randn(2, 6)
    assert torch.equal(processor(ended, scores)[0], scores[0])
    with pytest.raises(InvalidValue, match="No token is accepted behind"):
        model.generate(prompts, max_new_tokens=3, logits_processor=[AWRSProcessor(lambda ids: len(ids) < 2, 2)])
