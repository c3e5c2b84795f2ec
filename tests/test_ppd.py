"""Parallel prompt decoding: trees against brute force, tokens against plain `generate`, prompts that are trained."""

import itertools
import math

import pytest
import torch
from contract import batch, language_model, picture, tiny

import vtok
from vtok.engine.cache import cache_in
from vtok.errors import InvalidValue, Unsupported
from vtok.text.decoding.ppd import PPD, Hits, Prompting
from vtok.text.decoding.ppd_train import loss, train
from vtok.text.decoding.ppd_tree import (
    best_paths,
    best_templates,
    ends,
    expected,
    extended,
    gain,
    stationary,
    transitions,
    value,
)

ACCURACY = ((0.6, 0.2, 0.1), (0.4, 0.3, 0.05), (0.3, 0.1, 0.1))
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9]])


# ---- trees -----------------------------------------------------------------------------------------------------------
def test_the_best_paths_are_the_best_trees():
    """Against all sets of paths that have their beginnings."""
    every = [path for depth in (1, 2, 3) for path in itertools.product(range(3), repeat=depth)]
    for n in (0, 1, 2, 3, 4):
        found = best_paths(ACCURACY, n)
        assert len(found) == n and all(path[:-1] in ((), *found) for path in found)
        closed = (s for s in itertools.combinations(every, n) if all(path[:-1] in ((), *s) for path in s))
        assert gain(ACCURACY, found) == pytest.approx(max(gain(ACCURACY, some) for some in closed))
    assert best_paths(ACCURACY, 1) == ((0,),) and len(best_paths(ACCURACY, 99)) == len(every)
    swapped = (ACCURACY[0][::-1], *ACCURACY[1:])
    assert best_paths(swapped, 1) == ((2,),)


def test_ends_are_a_distribution():
    """Simulated: each depth's right rank is drawn, and the deepest path that has them all is the end."""
    paths = best_paths(ACCURACY, 7)
    found = dict.fromkeys(ends(ACCURACY, paths), 0.0)
    outcomes = [(*range(3), None)] * 3
    for right in itertools.product(*outcomes):
        row = [(*values, 1 - sum(values)) for values in ACCURACY]
        likely = math.prod(row[d][3 if rank is None else rank] for d, rank in enumerate(right))
        end = ()
        while (*end, right[len(end)]) in paths if len(end) < 3 else False:
            end = (*end, right[len(end)])
        found[end] += likely
    assert found == pytest.approx(ends(ACCURACY, paths))
    assert value(ACCURACY, (1, 0)) == pytest.approx(0.08)


def test_the_long_run():
    """A chain of states worked out by hand, and by walking."""
    moves = torch.tensor([[0.0, 1.0], [0.25, 0.75]], dtype=torch.float64)
    assert stationary(moves).tolist() == pytest.approx([0.2, 0.8])
    templates = best_templates(ACCURACY, 14)
    moves = transitions(ACCURACY, templates)
    assert moves.sum(1).tolist() == pytest.approx([1.0] * 4)
    walked = torch.full((4,), 0.25, dtype=torch.float64) @ torch.linalg.matrix_power(moves, 500)
    torch.testing.assert_close(stationary(moves), walked)
    gains = [gain(ACCURACY, template.paths) for template in templates]
    assert expected(ACCURACY, templates) == pytest.approx(sum(p * g for p, g in zip(walked.tolist(), gains)))


@pytest.mark.parametrize("budget", [4, 7, 12, 20])
def test_prompts_fit_the_budget(budget):
    """Against all ways to give prompt tokens to the nodes, at equal numbers."""
    templates = best_templates(ACCURACY, budget)
    assert templates[0].paths == () and (budget < 7 or all(template.paths for template in templates[1:]))
    for template in templates:
        assert len(template) <= budget and template.prompts.keys() == {(), *template.paths}
        assert all(1 <= count <= 3 for count in template.prompts.values())
    gains = [0.0, 0.9, 1.3, 1.4]
    paths = best_paths(ACCURACY, 3)
    template = extended(ACCURACY, paths, gains, 1 + 3 + 8)
    last = ends(ACCURACY, paths)
    worth = lambda prompts: sum(last[path] * gains[count] for path, count in prompts.items())
    every = (dict(zip(last, counts)) for counts in itertools.product((1, 2, 3), repeat=4) if sum(counts) == 8)
    assert worth(template.prompts) == pytest.approx(max(map(worth, every)))
    assert extended(ACCURACY, paths, gains, 7) is None and len(extended(ACCURACY, paths, gains, 8)) == 8


def test_hits():
    hits = Hits(2, 3)
    for _ in range(99):
        hits.note(0, [7, 8, 9], 8)
        hits.note(1, [7, 8, 9], 3)
    assert hits.accuracy[0][1] > 0.98 and max(hits.accuracy[1]) < 0.01
    assert hits.renewed() and not hits.renewed()
    assert all(sum(row) <= 1 for row in hits.accuracy)


# ---- decoding --------------------------------------------------------------------------------------------------------
def text_model(kind="Llama", seed=0, vocabulary=40, scale=4.0):
    return language_model(vocabulary, seed=seed, scale=scale, norms=False, kind=kind)


def random_prompts(n=3, width=32):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model():
    return text_model()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_random_prompts_are_lossless(kind, n):
    model = text_model(kind, seed=1, vocabulary=12)
    decoder = PPD(prompts=random_prompts(n), nodes=16, top=4, adapt=False)
    expected = model.generate(PROMPT, max_new_tokens=30)
    for _ in range(2):
        assert torch.equal(model.generate(PROMPT, max_new_tokens=30, custom_generate=decoder), expected)
    assert decoder.stats.accepted > 0  # of so few tokens some guess is right


def test_prompt_tokens_leave_nothing_behind(model):
    """The cache is that of plain decoding."""
    decoder = PPD(prompts=random_prompts(), nodes=16, top=4, adapt=False)
    how = {"max_new_tokens": 12, "return_dict_in_generate": True}
    plain, ours = (cache_in(model.generate(PROMPT, **how, **more)) for more in ({}, {"custom_generate": decoder}))
    for a, b in zip(plain.layers, ours.layers):
        torch.testing.assert_close(b.keys, a.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(b.values, a.values, atol=1e-4, rtol=1e-4)


def test_guesses_are_those_of_the_prompt_tokens(monkeypatch):
    """Logits at the prompt tokens behind the last accepted node, against a forward with them behind the text."""
    model = text_model(seed=1, vocabulary=12)
    decoder, checked = PPD(prompts=random_prompts(), nodes=16, top=4, adapt=False), []
    plain = Prompting.learn

    def learn(self, tree, logits, verdict):
        plain(self, tree, logits, verdict)
        if self.guesses:
            text = self.target.ids[:, :-1]  # up to the last accepted node
            n = len(self.guesses)
            embeds = torch.cat([model.get_input_embeddings()(text), self.prompts[None, :n]], 1)
            with torch.no_grad():
                expected = model(inputs_embeds=embeds).logits[0, -n:].topk(4, -1).indices.tolist()
            assert self.guesses == expected
            checked.append((n, len(verdict.route)))

    monkeypatch.setattr(Prompting, "learn", learn)
    model.generate(PROMPT, max_new_tokens=40, custom_generate=decoder)
    assert len({n for n, _ in checked}) > 1 and max(route for _, route in checked) > 1


def test_hits_are_what_was_accepted():
    """With one guess a step, which always is a candidate, hits and accepted drafts are the same."""
    model = text_model(seed=1, vocabulary=12)
    decoder = PPD(prompts=random_prompts(1), nodes=4, top=1, adapt=False)
    model.generate(PROMPT, max_new_tokens=60, custom_generate=decoder)
    hits = decoder._learned.hits
    assert hits.hits[0][0] - 0.5 == decoder.stats.accepted > 3
    assert decoder.stats.accepted < hits.seen[0] - 1 <= decoder.stats.steps


def test_sampling_is_plain_sampling():
    """Three tokens, by chi-square."""
    model = text_model(vocabulary=4, scale=2.5, seed=5)
    decoder = PPD(prompts=random_prompts(), nodes=10, top=4, adapt=False)
    prompt, n, expected = [1, 2, 3], 120, {}
    for text in itertools.product(range(4), repeat=3):
        likely = 1.0
        for i, token in enumerate(text):
            with torch.no_grad():
                top = model(torch.tensor([[*prompt, *text[:i]]])).logits[0, -1].topk(2)
            likely *= dict(zip(top.indices.tolist(), (top.values / 1.5).softmax(-1).tolist())).get(token, 0.0)
        if likely:
            expected[text] = n * likely
    counts = dict.fromkeys(expected, 0)
    torch.manual_seed(3)
    how = {"max_new_tokens": 3, "do_sample": True, "top_k": 2, "temperature": 1.5}
    for _ in range(n):
        counts[tuple(model.generate(torch.tensor([prompt]), **how, custom_generate=decoder)[0, 3:].tolist())] += 1
    assert len(expected) == 8
    assert sum((counts[text] - wanted) ** 2 / wanted for text, wanted in expected.items()) < 24.3


def test_typical_acceptance_takes_the_longest(model):
    """Of a tree and its distributions, by hand: greedy calls stay exact."""
    from vtok.text.decoding.tree import Tree, shape

    tree = Tree(shape((-1, 0, 0, 1, 2, 2)), (9, 1, 2, 3, 1, -1))
    rows = {0: (0.0, 0.5, 0.4, 0.1), 1: (0.97, 0.01, 0.01, 0.01), 2: (0.1, 0.8, 0.05, 0.05)}

    class Scores:
        sample = True
        probabilities = staticmethod(lambda node: torch.tensor(rows[node]))
        choose = staticmethod(lambda node: node + 100)

    drafter = Prompting.__new__(Prompting)
    drafter.how = PPD(prompts=random_prompts(), accept="typical")
    verdict = drafter.verify(tree, Scores())
    assert verdict.route == (0, 2, 4) and verdict.last == 104  # below node 1 the draft is not typical
    decoder = PPD(prompts=random_prompts(), nodes=16, top=4, adapt=False, accept="typical")
    assert torch.equal(
        model.generate(PROMPT, max_new_tokens=20, custom_generate=decoder), model.generate(PROMPT, max_new_tokens=20)
    )
    out = model.generate(PROMPT, max_new_tokens=20, do_sample=True, custom_generate=decoder)
    assert out.shape == (1, 26)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_pictures(family):
    model, processor = tiny(family)
    inputs = {**batch(processor, ["# what?"], [picture(56, 84)]), "max_new_tokens": 12, "do_sample": False}
    width = model.get_input_embeddings().weight.shape[1]
    decoder = PPD(prompts=random_prompts(width=width), nodes=12, adapt=False)
    assert torch.equal(model.generate(**inputs, custom_generate=decoder), model.generate(**inputs))
    with vtok.patch(model, "divprune", keep=0.5):
        assert torch.equal(model.generate(**inputs, custom_generate=decoder), model.generate(**inputs))
    assert decoder.stats.drafted > 0


def test_what_is_refused(model):
    for wrong in (
        {"prompts": torch.randn(3)},
        {"nodes": 3},
        {"nodes": 1},
        {"accept": "all"},
        {"prompts": torch.randn(0, 4)},
    ):
        with pytest.raises(InvalidValue, match=next(iter(wrong))):
            PPD(**{"prompts": random_prompts(), **wrong})
    with pytest.raises(Unsupported, match="width 16, not 32"):
        model.generate(PROMPT, max_new_tokens=4, custom_generate=PPD(prompts=random_prompts(width=16)))
    assert vtok.PPD is PPD


# ---- training --------------------------------------------------------------------------------------------------------
def test_the_loss_is_its_formula(model):
    """Each place by a forward of its own."""
    ids, prompts = torch.randint(0, 40, (1, 12)), random_prompts()
    places, total = torch.tensor([0, 4, 8]), 0.0
    with torch.no_grad():
        teacher = model(ids).logits[0].log_softmax(-1)
        for t in places.tolist():
            embeds = torch.cat([model.get_input_embeddings()(ids[:, : t + 1]), prompts[None]], 1)
            student = model(inputs_embeds=embeds).logits[0, t + 1 :].log_softmax(-1)
            for i in (1, 2, 3):
                true = teacher[t + i]
                total += 0.8**i * (true.exp() * (true - student[i - 1])).sum().item() / 3 / len(places)
    assert loss(model, prompts, ids, places).item() == pytest.approx(total, rel=1e-4)
    with pytest.raises(InvalidValue, match="0 to 8 of 12"):
        loss(model, prompts, ids, torch.tensor([9]))


def test_training_lowers_the_loss():
    """Texts that count; on some that were not trained on."""
    model = text_model(seed=1, scale=1.0)
    texts = [(torch.arange(24) + start)[None] % 40 for start in range(40)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for i in range(40):
        some = torch.cat(texts[i % 5 :: 5])
        optimizer.zero_grad()
        model(some, labels=some).loss.backward()
        optimizer.step()
    model.zero_grad()
    before = [p.clone() for p in model.parameters()]
    held = texts[::8]
    trained = train(
        model, [text for text in texts if all(text is not x for x in held)] * 4, steps=60, accumulate=2, lr=0.1
    )
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters()))
    begin = train(model, texts, steps=1, accumulate=1, lr=0.0)
    with torch.no_grad():
        of = lambda prompts: sum(loss(model, prompts, text, torch.arange(20)).item() for text in held) / len(held)
        assert of(trained) < 0.85 * of(begin)
    with pytest.raises(InvalidValue, match="texts longer than 3 tokens"):
        train(model, [torch.tensor([[1, 2]])])
