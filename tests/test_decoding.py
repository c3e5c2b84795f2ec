"""Decoding with drafts gives what plain `generate` gives; trees, caches, processors, sampling, and when drafts stop."""

import itertools
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from contract import INSIDE, batch, encoder, example, picture, tiny
from test_stages import last  # noqa: F401 - a fixture
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtok
from vtok.engine.cache import cache_in, tree_mask
from vtok.text.decoding import attention, products, token_recycling
from vtok.text.decoding.loop import Scores
from vtok.text.decoding.ngram import Index
from vtok.text.decoding.payoff import Payoff
from vtok.text.decoding.self_speculation import View
from vtok.text.decoding.token_recycling import NONE, TEMPLATE, Recycler, Table
from vtok.text.decoding.tree import Shape, Tree, Verdict, follow
from vtok.text.decoding.view import compressed

VOCABULARY = 97
TEXT = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}


def text_model(kind="llama", **options) -> nn.Module:
    config, cls, own = TEXT[kind]
    torch.manual_seed(3)
    named = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "num_key_value_heads": 2}
    model = cls(config(**{"vocab_size": VOCABULARY, **SIZES, **named, **own, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(3)  # random weights are so small that logits would hardly depend on the context
    return model


def prompt(length=12, seed=0):
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def decoder(**options):
    """Drafts at each step, whatever they cost."""
    return vtok.TokenRecycling(**{"adapt": False, **options})


def same(model, inputs, decoder, times=2, **how):
    """Plain and drafted output of `generate`, several times with one decoder, which then is hot."""
    how = {"max_new_tokens": 40, "do_sample": False, **how}
    expected = model.generate(**inputs, **how)
    for _ in range(times):
        assert torch.equal(model.generate(**inputs, **how, custom_generate=decoder), expected)
    return expected


# ---- trees ---------------------------------------------------------------------------------------------------------
def test_the_papers_template():
    shape = Shape.of_paths(TEMPLATE)
    assert [shape.depths.count(d) for d in range(7)] == [1, 8, 21, 25, 15, 8, 3]
    assert len(shape) == 81 and max(shape.ranks) == 7
    seen = shape.ancestors.long()
    assert torch.equal((seen @ seen) > 0, shape.ancestors)  # above what is above is above
    for route in shape.routes:
        for i, node in enumerate(route):
            assert shape.ancestors[node].nonzero().flatten().tolist() == list(route[: i + 1])
    assert shape.upto(2).depths == tuple(d for d in shape.depths if d <= 2)


def test_a_template_with_a_gap_is_refused():
    for paths in ([(1,)], [(0,), (0, 0, 0)], [(0,), (0, 1)]):
        with pytest.raises(vtok.VtokError, match="comes before it"):
            Shape.of_paths(paths)
    with pytest.raises(vtok.VtokError, match="9 children"):
        vtok.TokenRecycling(template=tuple((i,) for i in range(9)))


def test_texts_share_their_beginnings():
    tree = Tree.of_texts(7, [(1, 2, 3), (1, 4), (5,)])
    assert tree.tokens == (7, 1, 2, 3, 4, 5) and tree.shape.parents == (-1, 0, 1, 2, 1, 0)
    assert tree.text(4) == [1, 4] and tree.upto(1).tokens == (7, 1, 5)


def test_going_down_a_tree():
    tree = Tree.of_texts(7, [(1, 2, 3), (1, 4, 9), (5,)])
    wants = {0: 1, 1: 4, 4: 6}
    verdict = follow(tree, wants.__getitem__)
    assert verdict == Verdict((0, 1, 4), 6) and verdict.tokens(tree) == [1, 4, 6]
    assert verdict.cut(tree, 2) == Verdict((0, 1), 4) and verdict.cut(tree, 2).tokens(tree) == [1, 4]


def test_what_a_tree_sees():
    valid = torch.tensor([[False, True, True, True, True, True]])
    mask = tree_mask(Shape((-1, 0, 0)).ancestors, valid, torch.float32)
    assert mask.shape == (1, 1, 3, 6)
    expected = [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1]]
    assert (mask[0, 0] == 0).long().tolist() == expected


# ---- the output is plain generate's --------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "attention"), [*((kind, "sdpa") for kind in TEXT), ("llama", "eager")])
def test_text_models(kind, attention):
    model = text_model(kind)
    model.set_attn_implementation(attention)
    hot = decoder()
    same(model, {"input_ids": prompt()}, hot)
    same(model, {"input_ids": prompt(seed=1)}, hot, times=1)
    assert hot.stats.accepted > 5 and hot.stats.tokens == 40  # else this has tested little
    same(model, {"input_ids": prompt()}, vtok.TokenRecycling(), times=1)
    same(model, {"input_ids": prompt()}, decoder(nodes=5, seed=0, template=((0,), (1,), (0, 0))))


@pytest.fixture
def folded(monkeypatch):
    """Short caches, too, are read by `tree_attention`. Gives the calls of it."""
    calls, inner = [], attention.tree_attention
    monkeypatch.setattr(attention, "SHORT", 0)
    monkeypatch.setattr(attention, "tree_attention", lambda *args: calls.append(args) or inner(*args))
    return calls


def test_products_of_their_own(monkeypatch):
    """On a CPU all layers of each check are multiplied so, a single row as ever; then the model is what it was."""
    layer, x = nn.Linear(48, 40), torch.randn(2, 3, 48)
    with torch.no_grad():
        assert torch.allclose(products.product(layer, x), layer(x), atol=1e-6)
        assert torch.allclose(products.product(layer, x.transpose(0, 1)), layer(x.transpose(0, 1)), atol=1e-6)
        assert torch.equal(products.product(layer, x[:1, :1]), layer(x[:1, :1]))
    assert products.product(layer, x).requires_grad
    calls, inner = [], products.product
    monkeypatch.setattr(products, "product", lambda module, x: calls.append(x.shape[-2]) or inner(module, x))
    model, hot = text_model(), decoder()
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    layers[0].forward = given = layers[0].forward  # as accelerate replaces it
    same(model, {"input_ids": prompt()}, hot, times=1)
    checks = hot.stats.steps - 1 - hot.stats.plain
    assert sum(rows > 1 for rows in calls) == (len(layers) - 1) * checks > 0
    assert layers[0].forward is given and not any("forward" in vars(layer) for layer in layers[1:])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_attention_of_their_own(implementation, folded):
    """All layers of each check go through it, and the registry is what it was."""
    model = text_model()
    model.set_attn_implementation(implementation)
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    hot = decoder()
    same(model, {"input_ids": prompt()}, hot, times=1)
    assert len(folded) == 3 * (hot.stats.steps - 1 - hot.stats.plain) > 0
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == before
    vlm, processor = tiny("qwen3_vl", implementation)
    inputs = batch(processor, ["a # What colour is it?"], [picture(70, 112)])
    with vtok.patch(vlm, "fastv", keep=0.5):
        folded.clear()
        same(vlm, inputs, hot := decoder(), max_new_tokens=24, times=1)
    assert len(folded) == 4 * (hot.stats.steps - 1 - hot.stats.plain) > 0


@pytest.mark.parametrize("family", INSIDE)
def test_families(family):
    """M-RoPE, DeepStack, several pictures; not patched, and patched at each kind of stage."""
    model, processor = tiny(family)
    inputs = batch(processor, ["a # What colour is it? and # no"], [picture(70, 112), picture(56, 56, 1)])
    hot = decoder()
    same(model, inputs, hot, max_new_tokens=24)
    with vtok.patch(model, example(model, "fastv")):
        same(model, inputs, hot, max_new_tokens=24, times=1)
    assert hot.stats.accepted > 2


@pytest.mark.parametrize("label", ["divprune", "core_neurons", "aim"])
def test_stages(label):
    """Before the language model, in it, neurons behind the prompt; and a text prompt on a patched model."""
    model, processor = tiny("qwen2_5_vl")
    hot = decoder()
    with vtok.patch(model, example(model, label)):
        same(model, batch(processor, ["a # What colour is it?"], [picture(70, 112)]), hot, max_new_tokens=24)
        assert hot.stats.accepted > 2
        same(model, processor.tokenizer(["no picture at all"], return_tensors="pt"), hot, max_new_tokens=24)


def test_padding_on_the_left(folded):
    model = text_model()
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt()], 1)
    same(model, {"input_ids": ids, "attention_mask": (ids != 0).long()}, decoder())


def test_a_prompt_of_embeddings():
    model = text_model()
    embeds = model.get_input_embeddings()(prompt()).detach()
    for drafted in (decoder(), vtok.NGram(adapt=False)):
        assert same(model, {"inputs_embeds": embeds}, drafted, max_new_tokens=24).shape == (1, 24)
        assert drafted.stats.accepted > 2


def test_a_conversation_goes_on_with_its_cache():
    model = text_model()
    how = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    outputs = []
    for custom in (None, decoder()):
        first = model.generate(prompt(), **how, custom_generate=custom)
        ids = torch.cat([first.sequences, prompt(4, seed=1)], 1)
        again = {"cache" if "cache" in first else "past_key_values": cache_in(first)}
        outputs.append(model.generate(ids, **how, **again, custom_generate=custom).sequences)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("method", [None, "divprune", "fastv"])
def test_the_cache_is_that_of_plain_decoding(method):
    model, processor = tiny("qwen2_5_vl")
    inputs = batch(processor, ["a # What colour is it?"], [picture(70, 112)])
    how = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    if method is not None:
        vtok.patch(model, method, keep=0.5)
    hot = decoder()
    model.generate(**inputs, **how, custom_generate=hot)
    plain, drafted = (cache_in(model.generate(**inputs, **how, custom_generate=c)) for c in (None, hot))
    assert hot.stats.accepted > 2
    assert plain.get_seq_length() == drafted.get_seq_length() == inputs["input_ids"].shape[1] + 23
    for ours, theirs in zip(drafted.layers, plain.layers):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)


def test_positions_of_text_go_on_in_all_rows():
    """M-RoPE: a picture's tokens take fewer positions than columns."""
    model, processor = tiny("qwen2_5_vl")
    inputs = batch(processor, ["a # What colour is it?"], [picture(140, 140)])
    seen = []
    note = lambda module, args, kwargs: seen.append(kwargs["position_ids"])
    hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    hot = decoder()
    for _ in range(2):
        seen.clear()
        model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=hot)
    hook.remove()
    behind = seen[0][..., -1:] + 1
    assert int(behind[-1].max()) < inputs["input_ids"].shape[1]
    tree = seen[1]
    assert tree.shape[0] in (3, 4) and tree.shape[-1] > 8
    depths = (tree - behind)[:, 0]
    assert (depths == depths[:1]).all() and depths[0, 0] == 0 and set(depths[0].tolist()) >= {0, 1, 2}


class Stop(StoppingCriteria):
    """Stops behind a number of tokens, and notes all that it is asked about."""

    def __init__(self, length):
        self.length, self.asked = length, []

    def __call__(self, ids, scores, **kwargs):
        self.asked.append(ids[0].tolist())
        return torch.tensor([ids.shape[1] >= self.length])


class Pull(LogitsProcessor):
    """What is likely depends on the whole text so far."""

    def __call__(self, ids, scores):
        return scores.roll(int(ids.sum()) % 5, -1)


PROCESSED = {
    "repetition": {"repetition_penalty": 1.7},
    "ngrams": {"no_repeat_ngram_size": 2},
    "minimum": {"min_new_tokens": 20},
    "own": {"logits_processor": [Pull()]},
}


@pytest.mark.parametrize("label", PROCESSED)
def test_processors_see_the_text_of_their_route(label):
    model = text_model()
    how = {"max_new_tokens": 40, "do_sample": False}
    bare = model.generate(prompt(), **how)
    how |= {"pad_token_id": 0, **PROCESSED[label]}
    if label == "minimum":
        how["eos_token_id"] = int(bare[0, 18])
    hot = decoder()
    out = same(model, {"input_ids": prompt()}, hot, times=3, **how)
    assert not torch.equal(out, bare)
    if label != "own":  # whose text nothing foresees
        assert hot.stats.accepted > 0


def test_the_end_of_the_text():
    """In the middle of an accepted route, too: at an end token, a length, a criterion of one's own."""
    model = text_model()
    plain = model.generate(prompt(), max_new_tokens=40, do_sample=False)[0, 12:]
    hot = decoder()
    same(model, {"input_ids": prompt()}, hot)
    for at in (1, 2, 3, 5, 6, 8, 11):
        same(model, {"input_ids": prompt()}, hot, times=1, eos_token_id=int(plain[at]), pad_token_id=0)
        same(model, {"input_ids": prompt()}, hot, times=1, max_new_tokens=at)
        asked = []
        for custom in (None, hot):
            stop = Stop(12 + at)
            own = {"stopping_criteria": StoppingCriteriaList([stop]), "do_sample": False, "max_new_tokens": 40}
            model.generate(prompt(), **own, custom_generate=custom)
            asked.append(stop.asked)
        assert asked[0] == asked[1] and len(asked[0]) == at


class Note:
    def __init__(self):
        self.got = []

    def put(self, tokens):
        self.got.append(tokens.tolist())

    def end(self):
        self.got.append("end")


def test_a_streamer_gets_each_token_and_the_end():
    model, got = text_model(), []
    for custom in (None, decoder()):
        streamer = Note()
        model.generate(prompt(), max_new_tokens=15, do_sample=False, streamer=streamer, custom_generate=custom)
        got.append(streamer.got)
    assert got[0] == got[1] and got[0][-1] == "end"


def test_scores_and_logits():
    model = text_model()
    how = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "repetition_penalty": 1.3}
    how |= {"output_scores": True, "output_logits": True}
    hot = decoder()
    plain, _, drafted = (model.generate(prompt(), **how, custom_generate=c) for c in (None, hot, hot))
    assert hot.stats.accepted > 0
    for name in ("scores", "logits"):
        assert len(plain[name]) == len(drafted[name]) == 20
        torch.testing.assert_close(torch.cat(plain[name]), torch.cat(drafted[name]), atol=2e-4, rtol=1e-4)


# ---- sampling ------------------------------------------------------------------------------------------------------
def test_sampling_draws_what_plain_sampling_draws():
    """One draw a token, in the same order: with one seed the text is the same, not its distribution alone."""
    model, hot, accepted = text_model(), decoder(), 0
    how = {"max_new_tokens": 40, "do_sample": True, "temperature": 0.3, "top_k": 20, "top_p": 0.9}
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model.generate(prompt(), **how)
        torch.manual_seed(seed)
        assert torch.equal(model.generate(prompt(), **how, custom_generate=hot), expected)
        accepted += hot.stats.accepted
    assert accepted > 10


def test_the_distribution_is_the_models():
    """All texts of two tokens over three, with drafts below each other and beside: by counting, against the product."""
    torch.manual_seed(0)
    tree = Tree.of_texts(0, [(0, 1), (0, 2), (2, 2)])
    logits = torch.randn(len(tree), 3)
    first = logits.softmax(-1)
    counts, n = torch.zeros(3, 4), 6000
    for _ in range(n):
        scores = Scores(tree, logits, torch.zeros(1, 1, dtype=torch.long), lambda ids, x: x, sample=True)
        text = follow(tree, scores.choose).tokens(tree)
        counts[text[0], text[1] if len(text) > 1 else 3] += 1
    expected = torch.zeros(3, 4)
    for token in range(3):
        node = tree.child(0, token)
        if node is None:
            expected[token, 3] = first[0, token]
        else:
            expected[token, :3] = first[0, token] * first[node]
    there = expected > 0
    assert (counts[~there] == 0).all()
    chi = ((counts - n * expected)[there] ** 2 / (n * expected[there])).sum()
    assert float(chi) < 27.9  # of 9 degrees of freedom: 1 in 1000


# ---- the table -----------------------------------------------------------------------------------------------------
def test_the_later_row_stays():
    table = Table(6, 2)
    logits = torch.tensor([[0.0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 9, 0, 8, 0, 0]])
    table.write([NONE] * 3, [2, 3, 2], logits, frozenset())
    assert table.rows.tolist() == [[-1, -1], [-1, -1], [1, 3], [0, 1], [-1, -1], [-1, -1]]
    template = Shape.of_paths([(0,), (1,), (0, 0), (1, 0), (1, 1)])
    filled = {0: 2, 1: 1, 2: 3, 4: 0, 5: 1}  # nothing is known behind 1
    assert table.fill(template, [1, 2, 3, 4, 5], NONE, 2, 9) == filled
    assert table.fill(template, [1, 3, 2, 4, 5], NONE, 2, 3) == {
        0: 2,
        1: 1,
        2: 3,
        4: 0,
    }  # what is unknown takes no place


def test_followers_of_a_pair_come_first(monkeypatch):
    table, template = Table(6, 3), Shape.of_paths([(0,), (1,), (2,), (0, 0)])
    table.write([4, 5], [2, 2], torch.tensor([[0.0, 9, 8, 7, 0, 1], [6.0, 5, 0, 0, 4, 0]]), frozenset())
    fill = lambda before: list(table.fill(template, [1, 2, 3, 4], before, 2, 9).values())[1:4]
    assert fill(5) == fill(NONE) == [0, 1, 4] and fill(4) == [1, 2, 3]  # of the token alone what came last
    table.follow([4, 2, 5, 3], frozenset())
    assert fill(4) == [5, 1, 2] and fill(5) == [0, 1, 4] and fill(0) == [5, 0, 1]
    monkeypatch.setattr(token_recycling, "PAIRS", len(table.pairs))
    table.follow([0, 1, 2], frozenset())  # (0, 1) is new, and the oldest goes
    assert fill(5) == [5, 0, 1] and fill(4) == [5, 1, 2]


def test_the_accepted_route_has_the_last_word():
    """Of a token that is in a tree twice, the row from the place where it really stands is remembered."""
    hot = decoder(template=((0,), (1,), (0, 0)))
    recycler = Recycler(hot, SimpleNamespace(placeholders=frozenset(), ids=torch.tensor([[1]])))
    recycler.places = [0, 1, 2, 3]
    tree, logits = Tree(Shape((-1, 0, 0, 1)), (1, 2, 3, 3)), torch.eye(9)[:4] * 9
    recycler.learn(tree, logits, Verdict((0, 1, 3), 4))
    assert hot._learned.table.rows[[1, 2, 3], 0].tolist() == [0, 1, 3]
    recycler.learn(tree, logits, Verdict((0, 2), 4))
    assert hot._learned.table.rows[3, 0] == 2


def test_placeholders_are_not_drafted():
    model, processor = tiny("llava")
    token = model.config.image_token_id
    with torch.no_grad():
        model.lm_head.weight[token] = model.lm_head.weight.abs().sum(0)  # likely at every place
    inputs = batch(processor, ["a # What colour is it?"], [picture(70, 112)])
    hot = decoder()
    model.generate(**inputs, max_new_tokens=20, do_sample=False, custom_generate=hot)
    rows = hot._learned.table.rows
    assert (rows >= 0).any() and not (rows == token).any()
    assert (rows[token] == -1).all()  # and nothing was learned from the picture's own rows


def test_the_prompt_teaches():
    """Behind a token comes what followed it at its last place in the prompt, then what the model found likely there."""
    model, hot = text_model(), decoder(seed=5)
    model.generate(prompt(), max_new_tokens=2, do_sample=False, custom_generate=hot)
    with torch.no_grad():
        best = model(prompt()).logits[0].topk(8, -1).indices.tolist()
    tokens, rows = prompt()[0].tolist(), hot._learned.table.rows.tolist()
    assert len(set(tokens)) == 12  # each has one place
    for place, token in enumerate(tokens):
        known = best[place] if place >= 7 else []
        real = tokens[place + 1 : place + 2]
        expected = [*real, *(other for other in known if other not in real)]
        assert rows[token] == (expected + [-1] * 8)[:8]
    assert sum(row[0] >= 0 for row in rows) == 13  # and the answer's first token


def test_a_prompt_puts_what_follows_first():
    table = Table(6, 3)
    table.write([NONE], [1], torch.tensor([[0.0, 1, 2, 3, 4, 5]]), frozenset())
    table.follow([1, 4, 1, 2, 5, 0], banned=frozenset({5}))
    assert table.rows.tolist() == [[-1] * 3, [2, 4, 5], [-1] * 3, [-1] * 3, [1, -1, -1], [-1] * 3]


# ---- how many drafts -----------------------------------------------------------------------------------------------
class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def simulate(a, b, rate, tokens=400, payoff=None, disturbed=()):
    """Decoding where a step takes a + b n, or a * b[n], and n drafts are accepted at a rate, one behind the other; five
    times as long at steps that are disturbed. Returns the time in plain steps, and the mean number of drafts in the
    last quarter."""
    payoff = Payoff(clock=Clock()) if payoff is None else payoff
    clock, done, drafts = payoff.clock, 1, []
    clock.now = 0.0
    expected = [(n, sum(rate**i for i in range(1, n + 1))) for n in (1, 2, 4, 8)]
    payoff.begin()
    debt = 0.0
    while done < tokens:
        payoff.start()
        n = payoff.choose(expected)
        took = a * b[n] if isinstance(b, dict) else a + b * n
        clock.now += took * (5 if len(drafts) in disturbed else 1)
        debt += dict(expected).get(n, 0.0)
        emitted = 1 + int(debt)
        debt -= emitted - 1
        payoff.stop(n, emitted)
        done += emitted
        drafts.append(n)
    tail = drafts[-len(drafts) // 4 :]
    return clock.now / (tokens * a), sum(tail) / len(tail)


def test_drafts_that_do_not_pay_are_switched_off():
    for a, b, rate in itertools.product((1.0, 0.01), (2.0, 0.5), (0.0, 0.2, 0.4)):
        time, _ = simulate(a, b * a, rate)
        assert time < 1.05, (a, b, rate, time)


def test_what_is_wrongly_believed_in_is_switched_off():
    """A former call accepted all drafts, this one accepts none: what it loses counts, whatever was expected."""
    payoff, cost = Payoff(clock=Clock()), {0: 1.0, 8: 2.0}
    payoff.begin()
    tokens = 100
    for step in range(2 * tokens):
        payoff.start()
        drafts = payoff.choose([(8, 8.0)] if step < tokens else [(8, 4.0)])
        payoff.clock.now += cost[drafts]
        payoff.stop(drafts, 1 + drafts * (step < tokens))
        if step == tokens:
            payoff.begin()
            began = payoff.clock.now
    assert payoff.clock.now - began < 1.05 * (tokens - 1)


def test_drafts_that_take_long_to_make_are_tried_late():
    """Half a step each: one is not tried before it would be a loss of 3 %, where one that costs nothing is at once."""
    for making, first in ((0.5, 0.5625 / 0.03), (0.0, 0.0625 / 0.03)):
        payoff, steps = Payoff(clock=Clock()), 0
        payoff.begin()
        while True:
            payoff.start()
            if payoff.choose([(1, 0.5)], making=making):
                break
            payoff.clock.now += 1.0
            payoff.stop(0, 1)
            steps += 1
        assert steps == math.ceil(first)


def test_drafts_that_pay_are_used():
    time, drafts = simulate(1.0, 0.02, 0.8)
    assert time < 0.4 and drafts > 6
    time, drafts = simulate(1.0, 0.3, 0.8)  # a step of 8 takes 3.4 for 4.3 tokens, one of 2 takes 1.6 for 2.4
    assert time < 0.8 and 1 <= drafts <= 4


def test_times_that_jump():
    """Four drafts take longer than eight, as they do where a product of matrices is made for some sizes."""
    jumps = {0: 1.0, 1: 1.05, 2: 1.1, 4: 2.6, 8: 1.9}
    for rate, best in ((0.95, 8), (0.4, 2)):
        time, drafts = simulate(1.0, jumps, rate)
        ideal = min(cost / sum(rate**i for i in range(n + 1)) for n, cost in jumps.items())
        assert drafts == pytest.approx(best, abs=0.3) and time < 1.1 * ideal, (rate, time, ideal)


def test_a_disturbed_step_is_not_believed_for_long():
    """What was slow once, while something else ran, is tried again: in the next call at the latest."""
    payoff = Payoff(clock=Clock())
    quiet, _ = simulate(1.0, 0.02, 0.8)
    first, _ = simulate(1.0, 0.02, 0.8, payoff=payoff, disturbed=(2, 3, 4))
    again, drafts = simulate(1.0, 0.02, 0.8, payoff=payoff)
    assert first < 1.25 * quiet and again < 1.05 * quiet and drafts > 6


# ---- what is refused -----------------------------------------------------------------------------------------------
def refused(message, model, inputs=None, **how):
    with pytest.raises(vtok.VtokError, match=message):
        model.generate(
            prompt() if inputs is None else inputs, max_new_tokens=4, **{"custom_generate": decoder(), **how}
        )


def test_what_drafts_cannot_do_is_refused():
    model = text_model()
    refused("num_beams", model, num_beams=2)
    refused("one prompt a call, here are 2", model, prompt().repeat(2, 1))
    refused("one prompt a call, here are 3", model, do_sample=True, num_return_sequences=3)
    refused("not both", model, assistant_model=text_model())
    refused("not both", model, prompt_lookup_num_tokens=3)
    refused("this is contrastive search", model, penalty_alpha=0.6, top_k=4)
    refused("plain DynamicCache, not a StaticCache", model, cache_implementation="static")
    refused("leave use_cache on", model, use_cache=False)
    refused("output_attentions", model, output_attentions=True, return_dict_in_generate=True)
    refused("sliding windows", text_model("mistral", sliding_window=8))
    vlm, _ = tiny("qwen2_5_vl")
    with vtok.patch(vlm, "divprune") as handle:
        handle.compile(backend="eager")
        refused("This model is compiled", vlm)
    known = decoder()
    model.generate(prompt(), max_new_tokens=4, custom_generate=known)
    refused("97 tokens, and the model has 55", text_model(vocab_size=55), prompt() % 50, custom_generate=known)
    with pytest.raises(vtok.VtokError, match="generate with this decoder first"):
        _ = decoder().stats


def test_two_threads_need_two_objects():
    model, hot, caught = text_model(), decoder(), []

    class Meanwhile(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            def other():
                try:
                    model.generate(prompt(), max_new_tokens=4, custom_generate=hot)
                except vtok.VtokError as error:
                    caught.append(str(error))

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            return torch.tensor([True])

    criteria = StoppingCriteriaList([Meanwhile()])
    model.generate(prompt(), max_new_tokens=9, stopping_criteria=criteria, custom_generate=hot)
    assert len(caught) == 1 and "an object of its own" in caught[0]
    same(model, {"input_ids": prompt()}, hot)  # and it is free again


# ---- n-grams -------------------------------------------------------------------------------------------------------
def test_what_came_behind_the_same_words():
    index = Index(3, frozenset({9}))
    index.extend([1, 2, 3, 4, 1, 2, 3, 5, 7, 2, 3])
    assert index.continuations(3) == (2, [[5, 7, 2]])  # 2 3 was there twice, 7 2 3 never
    assert index.continuations(2, most=3) == (2, [[5, 7], [4, 1]])
    index.extend([9, 3])
    assert index.continuations(3) == (1, [[5, 7, 2]])  # what begins with a banned token is none
    index.extend([3, 3])
    assert index.continuations(4) == (2, [[3, 3, 3, 3]])  # a circle goes on
    assert Index(3).continuations(3) == (0, [])


def test_n_gram_drafts():
    model, found = text_model(), vtok.NGram(adapt=False)
    same(model, {"input_ids": prompt(60)}, found, max_new_tokens=50, times=1)
    assert found.stats.tokens_a_step > 1.5  # its text runs in circles
    several = vtok.NGram(adapt=False, texts=3, length=4)
    same(model, {"input_ids": prompt(60)}, several, max_new_tokens=50, times=1)
    same(model, {"input_ids": prompt(60)}, vtok.NGram(), max_new_tokens=50, times=1)
    vlm, processor = tiny("qwen2_5_vl")
    inputs = batch(processor, ["a # what what what colour is it?"], [picture(70, 112)])
    same(vlm, inputs, found, max_new_tokens=40, times=1)


# ---- self-speculation ----------------------------------------------------------------------------------------------
def state(model, inputs):
    """All that a patch could leave behind. transformers puts hooks of its own on at the first forward."""
    model.generate(**inputs, max_new_tokens=2)
    names = ("_forward_hooks", "_forward_pre_hooks")
    hooks = {k: [len(getattr(m, name)) for name in names] for k, m in model.named_modules()}
    return hooks, {k: sorted(vars(m)) for k, m in model.named_modules()}, dict(ALL_ATTENTION_FUNCTIONS._local_mapping)


def view(draft, **options):
    return vtok.SelfSpeculation(**{"draft": draft, "adapt": False, "ngram": False, **options})


@pytest.mark.parametrize("family", INSIDE)
def test_self_speculation(family, monkeypatch):
    """The dense model's text, and nothing stays on the model."""
    model, processor = tiny(family)
    inputs = batch(processor, ["a # What colour is it? and # no"], [picture(70, 112), picture(56, 56, 1)])
    before = state(model, inputs)
    views, kept, follow_ = [], [], View._follow
    monkeypatch.setattr(View, "_follow", lambda self: follow_(self) or views.append(self.kept))
    for draft in ("fastv", [vtok.DivPrune(keep=0.5)]):
        drafted = view(draft, length=3)
        same(model, inputs, drafted, times=1, max_new_tokens=20)
        assert drafted.stats.drafted > 15 and drafted.stats.accepted > 0
        with vtok.patch(model, draft) as handle, torch.no_grad():
            model(**inputs, use_cache=True)
            kept.append(len(handle.trace.positions_at(handle.trace.shapes.layers - 1)[0]))
        assert views[-1] == [kept[-1]] * 4
        assert state(model, inputs) == before


def test_self_speculation_with_all_else(folded):
    """N-gram drafts, sampling, processors, left padding; sizes by measured times."""
    model, processor = tiny("qwen2_5_vl")
    inputs = batch(processor, ["a # What colour is it? What colour is it?"], [picture(70, 112)])
    same(model, inputs, vtok.SelfSpeculation(draft="fastv"), times=1, max_new_tokens=20)
    same(model, inputs, view("fastv", ngram=True), times=1, max_new_tokens=20, repetition_penalty=1.2)
    both = batch(processor, ["# yes", "a much longer prompt with # here"], [picture(70, 112), picture(70, 112, 1)])
    grid = both["image_grid_thw"]
    left = {k: v[: len(v) // 2] for k, v in both.items()} | {"image_grid_thw": grid[:1]}
    assert left["attention_mask"][0, 0] == 0
    same(model, left, view("fastv"), times=1, max_new_tokens=12)
    same(model, processor.tokenizer(["no picture"], return_tensors="pt"), view("fastv"), times=1, max_new_tokens=6)
    how = {"max_new_tokens": 16, "do_sample": True, "temperature": 0.5}
    drafted = view("fastv")
    for seed in range(2):
        torch.manual_seed(seed)
        expected = model.generate(**inputs, **how)
        torch.manual_seed(seed)
        assert torch.equal(model.generate(**inputs, **how, custom_generate=drafted), expected)


class Turn(LogitsProcessor):
    """Another token each time than the model would take."""

    def __call__(self, ids, scores):
        return scores.roll(1, -1)


def test_drafts_heed_processors():
    """Else a model that wants to end its answer, and may not, would draft nothing but ends."""
    model, processor = tiny("qwen2_5_vl")
    inputs = batch(processor, ["a # What colour is it?"], [picture(70, 112)])
    drafted = view("fastv")
    same(model, inputs, drafted, times=1, max_new_tokens=24, logits_processor=[Turn()])
    assert drafted.stats.accepted > 5


@pytest.mark.parametrize(("method", "runs"), [("divprune", 1), ("fastv", 1), ("downsample", 2), ("visionzip", 2)])
def test_pictures_are_encoded_anew_only_for_methods_that_look_there(method, runs):
    model, processor = tiny("llava_next" if method == "visionzip" else "qwen2_5_vl")
    inputs, calls = batch(processor, ["a # What colour is it?"], [picture(70, 112)]), []
    hook = encoder(model).register_forward_pre_hook(lambda *args: calls.append(args))
    model.generate(**inputs, max_new_tokens=4, do_sample=False, custom_generate=view(method))
    hook.remove()
    assert len(calls) == runs


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_the_view_is_a_part_of_the_cache(method, monkeypatch):
    """The columns that the compressor keeps, and behind them the text's so far: never one of a rejected draft."""
    model, processor = tiny("qwen2_5_vl")
    inputs = batch(processor, ["a # What colour is it?"], [picture(140, 112)])
    with vtok.patch(model, method) as handle, torch.no_grad():
        model(**inputs, use_cache=True)
        kept = handle.trace.positions_at(handle.trace.shapes.layers - 1)[0]
    assert 0 < len(kept) < inputs["input_ids"].shape[1]
    learn, seen = View.learn, []

    def check(self, *args):
        learn(self, *args)
        if self.small is not None:
            length = self.target.cache.get_seq_length()
            columns = torch.cat([kept, torch.arange(inputs["input_ids"].shape[1], length)])
            for ours, theirs in zip(self.small.cache.layers, self.target.cache.layers):
                assert torch.equal(ours.keys, theirs.keys[:, :, columns])
                assert torch.equal(ours.values, theirs.values[:, :, columns])
            assert torch.equal(self.small.ids, self.target.ids)
            seen.append(length)

    monkeypatch.setattr(View, "learn", check)
    model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=view(method))
    assert len(seen) > 3


def test_choosing_a_view_runs_what_it_needs(monkeypatch):
    """A compressor before the language model needs none of its layers; and an error leaves no patch behind."""
    model, processor = tiny("llava")
    inputs = batch(processor, ["a # What colour is it?"], [picture(70, 112)])
    calls, before = [], state(model, inputs)
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda *args: calls.append(args))
    with torch.no_grad():
        dense = cache_in(model(**inputs, use_cache=True))
        assert 0 < compressed(model, "divprune", dict(inputs), {}, dense).get_seq_length() < dense.get_seq_length()
        assert len(calls) == 1  # of the dense prompt
        compressed(model, "fastv", dict(inputs), {}, dense)
    assert len(calls) == 2
    hook.remove()

    def broken(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(vtok.DivPrune, "select", broken)
    with pytest.raises(RuntimeError, match="broken"):
        model.generate(**inputs, max_new_tokens=9, custom_generate=view("divprune"))
    assert state(model, inputs) == before


def test_a_view_of_an_evicting_cache(last, monkeypatch):  # noqa: F811
    """What a stage leaves of the prompt, layer by layer, is what drafts see of it."""
    model, processor = tiny("qwen2_5_vl")
    inputs = batch(processor, ["a # What colour is it?"], [picture(70, 112)])
    seen, follow_ = [], View._follow
    monkeypatch.setattr(View, "_follow", lambda self: follow_(self) or seen.append((self.kept, self.prompt)))
    drafted = view([last(keep=6)])
    same(model, inputs, drafted, times=1, max_new_tokens=20)
    assert seen[0] == ([6] * 4, inputs["input_ids"].shape[1]) and drafted.stats.accepted > 0


def test_what_self_speculation_refuses():
    model, processor = tiny("llava")
    inputs = batch(processor, ["a # What colour is it?"], [picture(70, 112)])
    with vtok.patch(model, "fastv"), pytest.raises(vtok.VtokError, match="already patched"):
        model.generate(**inputs, max_new_tokens=4, custom_generate=view("fastv"))
    with pytest.raises(vtok.VtokError, match="acts on pictures"):
        text_model().generate(prompt(), max_new_tokens=4, custom_generate=view("fastv"))
    with pytest.raises(vtok.VtokError, match="Did you mean 'fastv'"):
        model.generate(**inputs, max_new_tokens=4, custom_generate=view("fastw"))
    embeds = model.get_input_embeddings()(prompt())
    with pytest.raises(vtok.VtokError, match="no inputs_embeds"):
        model.generate(inputs_embeds=embeds, max_new_tokens=4, custom_generate=view("fastv"))
