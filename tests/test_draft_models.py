"""Drafts of a second model: the target's distribution by all outcomes, and the tokens of plain `generate`."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from contract import batch, language_model, picture, tiny
from outcomes import outcomes

import vtok
from vtok.errors import InvalidValue, Unsupported
from vtok.text.decoding import second
from vtok.text.decoding.coupling import Chance
from vtok.text.decoding.dyspec import DySpec, Growing, Likeliest, by_budget, by_threshold
from vtok.text.decoding.payoff import Payoff, Rates
from vtok.text.decoding.second import Accepted, Ahead
from vtok.text.decoding.spectr import Chains, SpecTr


def table(seed, size, text, sharp=2.0):
    """[size] a distribution that depends on all of a text."""
    number = seed + sum((token + 1) * 13**i for i, token in enumerate(text))
    noise = torch.randn(size, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return (sharp * noise).softmax(-1)


class Tables:
    """In place of the draft model."""

    step = 1.0

    def __init__(self, size):
        self.size = size

    def read(self, ids):
        return table(1, self.size, [])[None]

    def look(self, tree, nodes):
        return torch.stack([table(1, self.size, tree.text(node)) for node in nodes])


class Truth:
    """In place of the target."""

    sample = True

    def __init__(self, tree, size):
        self.tree, self.size = tree, size

    def probabilities(self, node):
        return table(2, self.size, self.tree.text(node))


def emitted(drafter, size, depth, nodes=99):
    """What one step emits, as a rule of the drafter's chance."""

    def rule(chance):
        drafter.chance = chance
        tree = drafter.draft(torch.tensor([[0]]), depth, nodes)
        assert max(tree.shape.depths) <= depth
        return tuple(drafter.verify(tree, Truth(tree, size)).tokens(tree))

    return rule


def check_distribution(found, size, length):
    """Of what is emitted, and then drawn of the target up to a length: the target's own joint distribution."""
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    for text in itertools.product(range(size), repeat=length):
        total = 0.0
        for tokens, likely in found.items():
            if tokens[:length] == text[: len(tokens)]:
                rest = range(len(tokens), length)
                total += likely * math.prod(table(2, size, text[:i])[text[i]].item() for i in rest)
        expected = math.prod(table(2, size, text[:i])[text[i]].item() for i in range(length))
        assert total == pytest.approx(expected, abs=1e-12), text


@pytest.mark.parametrize(("chains", "length", "size"), [(1, 2, 3), (2, 1, 3), (3, 1, 3), (2, 2, 2)])
def test_spectr_gives_the_target(chains, length, size):
    found = outcomes(emitted(Chains(Tables(size), chains, length, None, Rates(0.5)), size, length))
    check_distribution(found, size, length + 1)
    assert {len(tokens) for tokens in found} == set(range(1, length + 2))


def growing(how, size):
    drafter = Growing.__new__(Growing)
    drafter.how, drafter.ahead, drafter.p = how, Tables(size), {}
    return drafter


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"threshold": 0.2, "depth": 2}, 3),
        ({"threshold": 0.05, "depth": 1}, 3),
        ({"threshold": 0.05, "depth": 2, "nodes": 3}, 3),
        ({"form": "budget", "nodes": 3, "depth": 2}, 3),
        ({"form": "budget", "nodes": 4, "depth": 3}, 2),
    ],
)
def test_dyspec_gives_the_target(options, size):
    how = DySpec(draft=torch.nn.Identity(), **options)
    found = outcomes(emitted(growing(how, size), size, how.depth, how.nodes))
    check_distribution(found, size, how.depth + 1)
    assert max(map(len, found)) > 1


def grown(by, seed, **limits):
    size = 8
    look = lambda tree, nodes: torch.stack([table(seed, size, tree.text(node)) for node in nodes])
    return by(0, look, Chance(torch.Generator().manual_seed(seed)), **limits), size


@pytest.mark.parametrize("seed", range(4))
def test_places_of_a_tree(seed):
    """Values by the formula: the path's, times what siblings left, times the share of it; no token is there twice."""
    for by, limits in (
        (by_threshold, {"threshold": 0.05, "nodes": 40, "depth": 4}),
        (by_budget, {"nodes": 20, "depth": 4}),
    ):
        tree, size = grown(by, seed, **limits)
        assert len(tree.tokens) - 1 <= limits["nodes"] and max(tree.tree.shape.depths) <= 4
        slots = {}
        for node, children in enumerate(tree.tree.shape.children):
            tokens = [tree.tokens[child] for child in children]
            assert len(set(tokens)) == len(tokens)
            p, left, value = table(seed, size, tree.tree.text(node)), 1.0, tree.values[node]
            for child, token in zip(children, tokens):
                slots[child] = value
                share = p[token].item() / left
                assert tree.values[child] == pytest.approx(value * share)
                value, left = value * (1 - share), left - p[token].item()
            slots[node, "next"] = value
        if by is by_threshold:
            assert all(slots[child] >= 0.05 for child in range(1, len(tree.tokens)))
            for node, d in enumerate(tree.tree.shape.depths):  # none is missing
                if d < 4 and tree.values[node] >= 0.05:
                    assert slots[node, "next"] < 0.05 or len(tree.tree.shape.children[node]) == size
        else:
            order = [slots[child] for child in range(1, len(tree.tokens))]
            assert len(order) == 20 and all(a >= b - 1e-12 for a, b in itertools.pairwise(order))


def test_the_likeliest_come_first():
    p = torch.tensor([0.1, 0.6, 0.0, 0.3])
    assert [token for token, _ in Likeliest().order(p.log())] == [1, 3, 0]
    assert next(Likeliest().order(p.log()))[1] == pytest.approx(0.6)


# ---- models ----------------------------------------------------------------------------------------------------------
def model(seed, layers=2, vocabulary=60, scale=4.0, sharp=4.0):
    model = language_model(vocabulary, layers, seed=seed, scale=scale, norms=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    return model


def near(model, noise):
    """A draft model that is often right: the same one, disturbed."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    return other


@pytest.fixture(scope="module")
def target():
    return model(0, layers=3)


DECODERS = {
    "spectr": lambda draft, **more: SpecTr(draft=draft, adapt=False, chains=3, length=3, **more),
    "dyspec": lambda draft, **more: DySpec(draft=draft, adapt=False, threshold=0.05, depth=4, **more),
    "budget": lambda draft, **more: DySpec(draft=draft, adapt=False, form="budget", nodes=8, depth=4, **more),
}
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9]])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("noise", [0.02, 10.0])
def test_greedy_is_plain_greedy(target, name, noise):
    decoder = DECODERS[name](near(target, noise))
    expected = target.generate(PROMPT, max_new_tokens=24)
    for _ in range(2):
        assert torch.equal(target.generate(PROMPT, max_new_tokens=24, custom_generate=decoder), expected)
    if noise < 1:
        assert decoder.stats.tokens_a_step > 1.3
    eos = expected[0, 20].item()
    stopped = {"eos_token_id": eos, "max_new_tokens": 24}
    assert torch.equal(target.generate(PROMPT, **stopped, custom_generate=decoder), target.generate(PROMPT, **stopped))


@pytest.mark.parametrize("name", DECODERS)
def test_a_draft_model_that_is_the_target_is_always_right(target, name):
    """At temperature 1 of both: nothing of the first chain is rejected, so each step emits all of a route."""
    decoder = DECODERS[name](near(target, 0.0), temperature=1.0)
    torch.manual_seed(0)
    out = target.generate(PROMPT, max_new_tokens=24, do_sample=True, top_k=0, custom_generate=decoder)
    assert out.shape[1] == 30
    longest = 4 if name == "spectr" else 2  # tokens of the shortest route, with the one behind it
    assert decoder.stats.steps <= 2 + 24 / longest


def test_drafts_are_looked_at_as_the_model_would(target, monkeypatch):
    """Probabilities of a look ahead, after several steps with accepted drafts, against full forwards."""
    draft, checked = near(target, 0.02), []
    plain_read, plain_look = Ahead.read, Ahead.look

    def expected(ids, text):
        with torch.no_grad():
            full = torch.cat([ids, torch.tensor([text], dtype=torch.long)], 1)
            return (draft(full).logits[0, -1] / 0.6).softmax(-1)

    def read(self, ids):
        self.ids, found = ids, plain_read(self, ids)
        torch.testing.assert_close(found[0], expected(ids, []), atol=1e-4, rtol=1e-3)
        return found

    def look(self, tree, nodes):
        found = plain_look(self, tree, nodes)
        for node, row in zip(nodes, found):
            torch.testing.assert_close(row, expected(self.ids, tree.text(node)), atol=1e-4, rtol=1e-3)
            checked.append(tree.shape.depths[node])
        return found

    monkeypatch.setattr(Ahead, "read", read)
    monkeypatch.setattr(Ahead, "look", look)
    decoder = DECODERS["dyspec"](draft)
    target.generate(PROMPT, max_new_tokens=16, custom_generate=decoder)
    assert max(checked) >= 2 and decoder.stats.accepted > 3


@pytest.mark.parametrize("name", DECODERS)
def test_sampling_is_plain_sampling(name):
    """Three tokens of real models, processors and all, by chi-square."""
    target = model(5, vocabulary=4, scale=2.5, sharp=1.0)
    decoder = DECODERS[name](near(target, 0.5), temperature=1.0)
    prompt, n = [1, 2, 3], 80
    how = {"max_new_tokens": 3, "do_sample": True, "top_k": 2, "temperature": 1.5}
    expected = {}
    for text in itertools.product(range(4), repeat=3):
        likely = 1.0
        for i, token in enumerate(text):
            with torch.no_grad():
                top = target(torch.tensor([[*prompt, *text[:i]]])).logits[0, -1].topk(2)
            shares = dict(zip(top.indices.tolist(), (top.values / 1.5).softmax(-1).tolist()))
            likely *= shares.get(token, 0.0)
        if likely:
            expected[text] = n * likely
    torch.manual_seed(3)
    counts = dict.fromkeys(expected, 0)
    for _ in range(n):
        counts[tuple(target.generate(torch.tensor([prompt]), **how, custom_generate=decoder)[0, 3:].tolist())] += 1
    assert len(expected) == 8
    chi = sum((counts[text] - wanted) ** 2 / wanted for text, wanted in expected.items())
    assert chi < 24.3  # 0.1 % of 7 degrees


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_pictures(family, name):
    """The draft model sees the picture too, on fewer tokens: it is patched, as the target may be."""
    target, processor = tiny(family)
    draft, _ = tiny(family, layers=3)
    inputs = {**batch(processor, ["# what?"], [picture(56, 84)]), "max_new_tokens": 12, "do_sample": False}
    expected = target.generate(**inputs)
    decoder = DECODERS[name](draft)
    assert torch.equal(target.generate(**inputs, custom_generate=decoder), expected)
    vtok.patch(draft, "divprune", keep=0.5)
    assert torch.equal(target.generate(**inputs, custom_generate=decoder), expected)
    with vtok.patch(target, "fastv", keep=0.5, layer=2):
        assert torch.equal(target.generate(**inputs, custom_generate=decoder), target.generate(**inputs))
    assert decoder.stats.drafted > 0


def test_placeholders_are_not_drafted():
    target, processor = tiny("llava")
    draft, _ = tiny("llava", layers=3)
    image = target.config.image_token_id
    with torch.no_grad():
        draft.get_output_embeddings().weight[image] = 100 * draft.get_output_embeddings().weight[5].sign()
    inputs = {**batch(processor, ["# what?"], [picture(56, 84)]), "max_new_tokens": 8, "do_sample": False}
    drafted = []

    class Watch(DySpec):
        pass

    plain = Growing.draft
    try:
        Growing.draft = lambda self, *args: drafted.append(plain(self, *args)) or drafted[-1]
        target.generate(**inputs, custom_generate=Watch(draft=draft, adapt=False))
    finally:
        Growing.draft = plain
    assert sum(len(tree) for tree in drafted) > len(drafted)
    assert all(image not in tree.tokens for tree in drafted)


@pytest.mark.parametrize("name", DECODERS)
def test_processors_of_the_call_are_those_of_drafts(target, name):
    """What the call forbids is not drafted: a draft model that is the target stays right. And a forced token, which
    only the caller's own processor knows, costs a draft, no more."""
    draft, greedy = near(target, 0.0), {"max_new_tokens": 24, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    decoder = DECODERS[name](draft)
    expected = target.generate(PROMPT, **greedy)
    assert torch.equal(target.generate(PROMPT, **greedy, custom_generate=decoder), expected)
    if name != "spectr":  # whose drafts are drawn
        assert decoder.stats.tokens_a_step > 1.9
    torch.manual_seed(0)
    sample = {"max_new_tokens": 24, "do_sample": True, "top_k": 3, "temperature": 0.5, "repetition_penalty": 1.5}
    target.generate(PROMPT, **sample, custom_generate=decoder)
    assert decoder.stats.tokens_a_step > 1.9
    force = lambda ids, scores: torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)
    out = target.generate(PROMPT, max_new_tokens=8, logits_processor=[force], custom_generate=decoder)
    assert (out[0, 6:] == 7).all()


def test_tables_of_different_lengths(target):
    wide, narrow = model(1, vocabulary=64), model(1, vocabulary=48)
    for name, make in DECODERS.items():
        for draft, told in ((wide, 60), (narrow, 48)):
            rare = {"max_new_tokens": 12, "suppress_tokens": list(range(told, 60))}  # ids that are no tokens
            with pytest.raises(Unsupported, match=r"vocabulary=len\(tokenizer\)"):
                target.generate(PROMPT, max_new_tokens=4, custom_generate=make(draft))
            out = target.generate(PROMPT, **rare, custom_generate=make(draft, vocabulary=told))
            assert torch.equal(out, target.generate(PROMPT, **rare)), name
            torch.manual_seed(0)
            sampled = target.generate(PROMPT, **rare, do_sample=True, custom_generate=make(draft, vocabulary=told))
            assert sampled.shape == out.shape


@pytest.mark.parametrize("kind", [SpecTr, DySpec])
def test_drafts_follow_what_pays(target, kind, monkeypatch):
    """By a clock in which drafts cost next to nothing, and one in which they cost much: the text is that of plain
    decoding."""
    monkeypatch.setattr(second, "weights", lambda model, head=False: 1000 if model is target else 1)

    def decode(cost):
        decoder = kind(draft=near(target, 0.02))

        class Clocked(Payoff):
            def stop(self, drafts, emitted, kind=""):
                self.time += 1 + cost * drafts
                super().stop(drafts, emitted, kind)

        clocked = Clocked(clock=lambda: clocked.time)
        clocked.time = 0.0
        decoder._running.payoff = clocked
        for _ in range(2):
            out = target.generate(PROMPT, max_new_tokens=80, custom_generate=decoder)
            assert torch.equal(out, target.generate(PROMPT, max_new_tokens=80))
        return decoder.stats

    cheap, dear = decode(0.001), decode(2.0)
    assert cheap.steps < 70 and cheap.drafted > 2 * dear.drafted
    assert dear.plain > 60


@pytest.mark.parametrize("kind", [SpecTr, DySpec])
def test_a_prompt_is_read_by_a_draft_model_once_that_is_affordable(target, kind):
    """By a clock that forwards move on: one of the target's takes 1 a token of a prompt and 1 a step, the draft model's
    for a prompt `dear` times as much. What it takes is known from the weights, and then from the call before."""
    draft, clock = near(target, 0.02), SimpleNamespace(now=0.0)

    def passes(model, dear):
        def hook(module, args, kwargs):
            tokens = kwargs["input_ids"].shape[1]
            read.append((model is draft, tokens, clock.now))
            clock.now += dear * max(1, tokens - 20)

        return model.register_forward_pre_hook(hook, with_kwargs=True)

    def decode(dear, tokens):
        read.clear()
        handles = passes(target, 1.0), passes(draft, dear)
        try:
            target.generate(long, max_new_tokens=tokens, custom_generate=decoder)
        finally:
            [handle.remove() for handle in handles]
        began = read[0][2]
        return [at - began for own, n, at in read if own and n >= 60], clock.now - began

    read: list = []
    long = torch.randint(2, 30, (1, 80), generator=torch.Generator().manual_seed(1))
    decoder = kind(draft=draft)
    decoder._running.payoff = Payoff(clock=lambda: clock.now)
    when, took = decode(1.0, 30)
    assert not when and took == 60 + 29  # as many weights as the target has: it pays after 2,000 steps
    decoder._reading.share = 0.01
    (at,), _ = decode(0.3, 60)
    assert at * 0.03 >= 0.01 * 60  # it was believed to be cheap, and was not
    assert decoder._reading.share == pytest.approx(0.3)
    when, took = decode(0.3, 60)
    assert not when and took == 60 + 59


def test_sizes_begin_small():
    accepted = Accepted(20)
    sizes = accepted.sizes()
    assert [n for n, _ in sizes] == [4, 8, 16, 20] and sizes == sorted(sizes)
    for _ in range(200):
        accepted.note(8, 3)
    assert dict(accepted.sizes())[8] == pytest.approx(3, abs=0.1) and dict(accepted.sizes())[4] == sizes[0][1]


def test_options():
    for wrong in ({"threshold": 1.0}, {"nodes": 0}, {"form": "heap"}, {"temperature": 0.0}, {"draft": "small"}):
        with pytest.raises(InvalidValue, match=next(iter(wrong))):
            DySpec(**{"draft": torch.nn.Identity(), **wrong})
    with pytest.raises(InvalidValue, match="chains"):
        SpecTr(draft=torch.nn.Identity(), chains=0)
    assert vtok.DySpec is DySpec and vtok.SpecTr is SpecTr
