"""CoreMatching: its mathematics against loops and the golden numbers; on models against the dense FFN with the other
neurons silenced, and against masking."""

import dataclasses
import functools
import gc
import math
import random
import weakref
from fractions import Fraction

import pytest
import torch
from contract import ADAPTERS, Entered, Masked, batch, decoder, mixed, noise, picture, placeholder_ids, tiny
from drafts import right_and_wrong
from torch import nn
from torch._dynamo.utils import counters

import vtok
from vtok.compressors.corematching import coactivation, core_neurons, core_tokens, elbow, votes
from vtok.engine.cache import cache_in
from vtok.errors import InvalidValue, PatchStateError, Unsupported
from vtok.types import Activations

GATED = [family for family, adapter in ADAPTERS.items() if "ffn" in adapter.provides]

# ---- the mathematics -----------------------------------------------------------------------------------------------


def slow_votes(values, voters, rho, quota):
    """[[votes of each neuron]] of each sample, by sorting each token's neurons."""
    result = []
    for rows, who in zip(values.float().tolist(), voters.tolist()):
        rows = [[-math.inf if math.isnan(v) else v for v in row] for row, yes in zip(rows, who) if yes]
        positive = [sum(v > 0 for v in row) for row in rows]
        share = Fraction(str(rho))
        if quota == "mean":
            quotas = [math.floor(share * Fraction(sum(positive), max(1, len(rows))))] * len(rows)
        else:
            quotas = [math.floor(share * n) for n in positive]
        counts = [0] * values.shape[2]
        for row, q in zip(rows, quotas):
            for n in sorted(range(len(row)), key=lambda n: (-row[n], n))[:q]:
                counts[n] += 1
        result.append(counts)
    return result


def slow_core(counts, beta):
    k = max(1, math.floor(Fraction(str(beta)) * len(counts)))
    return sorted(sorted(range(len(counts)), key=lambda n: (-counts[n], n))[:k])


def slow_elbow(counts, inclusive=True):
    """How many of the counts are at (or above) the point farthest from the chord, by exact arithmetic."""
    v = sorted(counts, reverse=True)
    n = len(v)
    if n < 3:
        return n
    dx, dy = n - 1, v[-1] - v[0]
    # the distance of (i, v_i) from the line through (0, v_0) and (n-1, v_(n-1)), squared
    squared = [Fraction((dy * i - dx * (x - v[0])) ** 2, dx * dx + dy * dy) for i, x in enumerate(v)]
    if max(squared) == 0:
        return n
    threshold = v[squared.index(max(squared))]
    return sum(x >= threshold if inclusive else x > threshold for x in v)


@pytest.mark.parametrize("quota", ["token", "mean"])
@pytest.mark.parametrize("rho", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("kind", ["normal", "ties", "sparse", "bfloat16", "nan", "equal", "negative"])
def test_votes(kind, rho, quota):
    torch.manual_seed(0)
    values = torch.randn(3, 11, 37)
    values = {
        "normal": lambda: values,
        "ties": lambda: (values * 2).round(),
        "sparse": lambda: values.relu() * (torch.rand_like(values) < 0.1),
        "bfloat16": lambda: values.bfloat16(),
        "nan": lambda: values.masked_fill(torch.rand_like(values) < 0.2, torch.nan),
        "equal": lambda: torch.ones_like(values),
        "negative": lambda: -values.abs(),
    }[kind]()
    voters = torch.rand(3, 11) < 0.7
    voters[1] = False
    expected = slow_votes(values, voters, rho, quota)
    for block in (1, 4, 256):
        assert votes(values, voters, rho, quota, block).tolist() == expected
    for b in range(3):
        assert votes(values[b : b + 1], voters[b : b + 1], rho, quota).tolist() == [expected[b]]
        for beta in (0.01, 0.4, 1.0):
            assert core_neurons(torch.tensor([expected[b]]), beta)[0].tolist() == slow_core(expected[b], beta)


def test_rounding_takes_no_neuron_away():
    """A fifth of 15 positive activations is 3."""
    values = torch.full((1, 1, 20), -1.0)
    values[..., :15] = 1.0
    assert votes(values, torch.ones(1, 1, dtype=torch.bool), 0.2).sum() == 3


def test_what_coreinfer_gives():
    """The golden numbers of the specification, of its own code's rule: q = 2, and the votes of the 8 neurons."""
    torch.manual_seed(0)
    values = torch.randn(1, 6, 20)
    assert int(0.2 * int((values > 0).sum()) / 6) == 2
    counts = votes(values, torch.ones(1, 6, dtype=torch.bool), 0.2, "mean")
    assert counts.sum() == 6 * 2
    core = core_neurons(counts, 0.4)
    assert counts[0, core[0]].sort(descending=True).values.tolist() == [3, 2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("inclusive", [True, False])
def test_elbow(inclusive):
    random.seed(0)
    curves = [[random.randint(0, top) for _ in range(n)] for n in range(1, 40) for top in (1, 3, 30, 10**6)]
    width = max(map(len, curves)) + 3
    counts = torch.full((len(curves), width), 10**7)  # what is no member may hold anything
    members = torch.zeros(len(curves), width, dtype=torch.bool)
    for row, (curve, places) in enumerate((c, random.sample(range(width), len(c))) for c in curves):
        counts[row, places], members[row, places] = torch.tensor(curve), True
    expected = [slow_elbow(curve, inclusive) for curve in curves]
    assert elbow(counts, members, inclusive).tolist() == expected
    if inclusive:
        for factor, shift in ((1000, 0), (1, 77), (3, -5)):
            assert elbow(counts * factor + shift, members, inclusive).tolist() == expected


def test_elbow_where_there_is_none():
    every = lambda *counts: (torch.tensor([counts]), torch.ones(1, len(counts), dtype=torch.bool))
    for counts in ((5,), (5, 5, 5, 5), (9, 2), (10, 8, 6, 4, 2, 0), (3, 6, 9, 12, 15, 18, 21)):
        assert elbow(*every(*counts)).tolist() == [len(counts)]
        assert elbow(*every(*counts), inclusive=False).tolist() == [len(counts)]
    nobody = torch.zeros(1, 4, dtype=torch.bool)
    assert elbow(torch.tensor([[1, 2, 3, 4]]), nobody).tolist() == [0]


def test_ties_at_the_elbow():
    """300 of 576 tokens are tied at the elbow and none is above: the code's strict rule keeps none of them."""
    counts = torch.tensor([[100] * 300 + [0] * 276])
    members = torch.ones_like(counts, dtype=torch.bool)
    assert elbow(counts, members).tolist() == [300]
    assert elbow(counts, members, inclusive=False).tolist() == [0]
    assert core_tokens(counts, members).sum() == 300


def test_a_curve_above_its_chord_keeps_many():
    """The distance has no sign."""
    counts = torch.tensor([[int(10**6 * math.sqrt(1 - (i / 575) ** 2)) for i in range(576)]])
    kept = elbow(counts, torch.ones_like(counts, dtype=torch.bool)).item()
    assert kept == slow_elbow(counts[0].tolist())
    assert 400 < kept < 420


def test_bounds_and_ties():
    counts = torch.tensor([[9, 1, 9, 1, 8, 1, 1, 9], [5, 5, 5, 5, 5, 5, 5, 5]])
    members = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 1, 0, 1, 1]], dtype=torch.bool)
    kept = lambda **bounds: [
        row.nonzero().flatten().tolist()
        for row in core_tokens(counts, members, **{name: torch.tensor(v) for name, v in bounds.items()})
    ]
    assert kept() == [[0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 4, 6, 7]]  # the elbow is the first 1, so all ones are in
    assert kept(high=[2, 3]) == [[0, 2], [0, 2, 3]]
    assert kept(high=[5, 9]) == [[0, 1, 2, 3, 4], [0, 2, 3, 4, 6, 7]]
    counts[0] = torch.tensor([90, 60, 90, 0, 80, 50, 40, 99])
    assert kept() == [[0, 1, 2, 4, 5, 6], [0, 2, 3, 4, 6, 7]]
    counts[0] = torch.tensor([900, 20, 900, 20, 800, 10, 0, 999])
    assert kept() == [[0, 1, 2, 3, 4], [0, 2, 3, 4, 6, 7]]
    assert kept(low=[6, 9]) == [[0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 6, 7]]
    assert kept(low=[0, 0], high=[0, 1]) == [[], [0]]


def test_coactivation_counts():
    torch.manual_seed(1)
    values, reference = torch.randn(2, 5, 9).round(), torch.rand(2, 9) < 0.5
    for b in range(2):
        for i in range(5):
            expected = sum(1 for n in range(9) if values[b, i, n] > 0 and reference[b, n])
            assert coactivation(values, reference)[b, i] == expected
    many = torch.ones(1, 1, 4096, dtype=torch.float16)  # half precision cannot count so far
    assert coactivation(many, torch.ones(1, 4096, dtype=torch.bool)).item() == 4096


def scene(pad=2, after=3):
    """Two samples of ragged prompts, the first with padding in front, both with a completion behind."""
    torch.manual_seed(3)
    length, f = 24, 30
    values = torch.randn(2, length, f)
    values[:, -after:] *= 100  # would change everything if it had a vote
    values[0, :pad] = torch.nan
    prompt = torch.zeros(2, length, dtype=torch.bool)
    prompt[0, pad:-after] = prompt[1, : -after - 4] = True
    picture = torch.full((2, length), -1)
    picture[0, 4:12], picture[0, 13:18], picture[1, 1:13] = 0, 1, 0
    anchor = torch.tensor([length - after - 1, length - after - 5])
    return Activations(values, prompt, picture >= 0, picture, 2, anchor)


def slow_score(c, a):
    """The kept tokens of each sample."""
    result = []
    for b in range(len(a.values)):
        prompt, visual = a.prompt[b].tolist(), a.visual[b].tolist()
        where = [i for i in range(len(prompt)) if prompt[i]]
        who = {
            "all": where,
            "text": [i for i in where if not visual[i]],
            "last": [int(a.anchor[b])],
        }[c.voters]
        counts = slow_votes(a.values[b, who][None], torch.ones(1, len(who), dtype=torch.bool), c.rho, c.quota)[0]
        positive = [[v > 0 for v in row] for row in a.values[b].tolist()]
        if c.reference == "core":
            reference = slow_core(counts, c.beta)
        else:
            at = max(where[0], int(a.anchor[b]) - (4 if c.reference == "official" else 0))
            reference = [n for n, yes in enumerate(positive[at]) if yes]
        m = {i: sum(positive[i][n] for n in reference) for i in range(len(prompt)) if visual[i]}
        groups = [list(m)]
        if c.per == "picture":
            groups = [[i for i in m if a.picture[b, i] == p] for p in range(2)]
        kept = set()
        for group in filter(None, groups):
            n = slow_elbow([m[i] for i in group], c.inclusive)
            images = len({int(a.picture[b, i]) for i in group})
            low, high = (
                keep * images if isinstance(keep, int) else math.floor(len(group) * (keep or edge) + 1e-9)
                for keep, edge in ((c.min_keep, 0), (c.max_keep, 1))
            )
            n = min(max(n, min(len(group), low)), high)
            kept |= set(sorted(group, key=lambda i: (-m[i], i))[:n])
        result.append(sorted(kept))
    return result


OPTIONS = [
    {},
    {"reference": "last"},
    {"reference": "official"},
    {"voters": "text"},
    {"voters": "last", "rho": 0.5},
    {"quota": "mean"},
    {"per": "picture"},
    {"per": "picture", "max_keep": 2},
    {"max_keep": 2},
    {"max_keep": 0.3},
    {"min_keep": 0.9},
    {"min_keep": 5, "per": "picture"},
    {"inclusive": False},
    {"rho": 1.0, "beta": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_core_tokens_against_loops(options):
    compressor, activations = vtok.CoreTokens(**options), scene()
    kept = compressor.score(activations)
    assert [row.nonzero().flatten().tolist() for row in kept] == slow_score(compressor, activations)
    changed = activations.values.clone()
    changed[~activations.prompt] = 7.0
    again = dataclasses.replace(activations, values=changed)
    assert torch.equal(compressor.score(again), kept)  # neither padding nor completion has a vote
    for b in range(2):
        part = slice(b, b + 1)
        alone = Activations(*(x[part] if torch.is_tensor(x) else x for x in vars(activations).values()))
        assert torch.equal(compressor.score(alone)[0], kept[b])


def test_the_references_differ():
    kept = {name: vtok.CoreTokens(reference=name).score(scene()) for name in ("core", "last", "official")}
    assert not torch.equal(kept["core"], kept["last"])
    assert not torch.equal(kept["last"], kept["official"])


def test_core_neurons_against_loops():
    activations = scene()
    for options in ({}, {"quota": "mean"}, {"voters": "text"}, {"rho": 0.5, "beta": 0.2}):
        compressor = vtok.CoreNeurons(**options)
        for b, core in enumerate(compressor.neurons(activations).tolist()):
            who = activations.prompt[b] & (~activations.visual[b] if compressor.voters == "text" else True)
            counts = slow_votes(activations.values[b : b + 1], who[None], compressor.rho, compressor.quota)[0]
            assert core == slow_core(counts, compressor.beta)


# ---- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rho": 0},
        {"rho": 1.5},
        {"beta": True},
        {"beta": math.nan},
        {"layer": -1},
        {"layer": 2.0},
        {"inclusive": 1},
        {"reference": "minus5"},
        {"voters": "none"},
        {"quota": "x"},
        {"per": "batch"},
        {"anchor": "last"},
        {"min_keep": 0},
        {"max_keep": 1.5},
        {"min_keep": 0.5, "max_keep": 0.4},
        {"start": -1},
        {"end": 2.0},
        {"min_tokens": 0},
    ],
    ids=str,
)
def test_bad_parameters(options):
    with pytest.raises(InvalidValue, match=next(iter(options))):
        vtok.CoreMatching(**options)


def test_defaults_are_the_papers():
    whole = vtok.CoreMatching()
    assert (whole.rho, whole.beta) == (0.2, 0.4)
    assert [whole.parts()[0].at(n) for n in (4, 8, 30, 32)] == [2, 4, 14, 14]
    assert list(vtok.CoreNeurons().sparse_layers(32)) == list(range(6, 27))
    assert [type(part).__name__ for part in whole.parts()] == ["CoreTokens", "CoreNeurons"]
    parts = vtok.CoreMatching(rho=0.3, beta=0.5, layer=1, start=1, end=2, voters="text").parts()
    assert parts == (
        vtok.CoreTokens(rho=0.3, beta=0.5, layer=1, voters="text"),
        vtok.CoreNeurons(rho=0.3, beta=0.5, start=1, end=2, voters="text"),
    )


def test_layers_that_there_are_not():
    for layer in (3, 4, 40):
        with pytest.raises(InvalidValue, match="last of 4 decoder layers"):
            vtok.CoreTokens(layer=layer).schedule(4)
    for start, end in ((2, 2), (3, 1), (0, 5), (4, 6)):
        with pytest.raises(InvalidValue, match="Of 4 layers"):
            vtok.CoreNeurons(start=start, end=end).sparse_layers(4)


def test_budgets():
    solved = vtok.CoreTokens(layer=2).with_budget(0.5, 32)
    assert (3 + 29 * solved.max_keep) / 32 == pytest.approx(0.5)
    assert vtok.CoreMatching().with_budget(1.0, 32).max_keep == 1.0
    earlier = vtok.CoreTokens().with_budget(0.5, 8)  # layer 4 would leave nothing, layer 2 a fifth
    assert (earlier.layer, earlier.max_keep) == (2, pytest.approx(0.2))
    with pytest.raises(InvalidValue, match="cannot be met"):
        vtok.CoreTokens(layer=2).with_budget(0.03, 32)
    with pytest.raises(InvalidValue, match="drops no visual token"):
        vtok.CoreNeurons().with_budget(0.5, 32)
    model, processor = tiny("llava_next")
    with vtok.patch(model, "core_tokens", budget=0.8, layer=0) as patch, torch.no_grad():
        model(**mixed(processor), use_cache=True)
    assert 0.25 < patch.trace.mean_keep <= 0.8


# ---- on models -----------------------------------------------------------------------------------------------------


class Silenced(Masked):
    """`Masked`, and in the layers that have a core the other neurons give 0 for all tokens behind the prompt."""

    def __init__(self, model, trace, prompt_length, embeds=None):
        super().__init__(model, trace, embeds)
        self.prompt_length = prompt_length

    def __enter__(self):
        super().__enter__()
        lm = decoder(self.model)
        layers = lm.layers
        self.behind = None
        self.hooks.append(lm.register_forward_pre_hook(self._where, with_kwargs=True))
        for layer, index in self.trace.parts["decode"].core.index.items():
            hook = functools.partial(self._silence, index)
            self.hooks.append(layers[layer].mlp.down_proj.register_forward_pre_hook(hook))

    def _where(self, module, args, kwargs):
        cache, length = cache_in(kwargs), kwargs["inputs_embeds"].shape[1]
        past = cache.get_seq_length() if cache is not None else 0
        self.behind = torch.arange(past, past + length) >= self.prompt_length

    def _silence(self, index, module, args):
        values = args[0].clone()
        for b, core in enumerate(index.tolist()):
            if self.trace.parts["decode"].core.rows[b]:
                silent = sorted(set(range(values.shape[2])).difference(core))
                for i in self.behind.nonzero().flatten().tolist():
                    values[b, i, silent] = 0.0
        return (values,)


SETTINGS = {
    "core_neurons": lambda: [vtok.CoreNeurons(min_tokens=1)],
    "all layers": lambda: [vtok.CoreNeurons(min_tokens=1, start=0, end=4, beta=0.2)],
    "corematching": lambda: [vtok.CoreMatching(layer=1, min_tokens=1)],
    "with others": lambda: [vtok.Uniform(keep=0.5), vtok.FastV(keep=0.5), vtok.CoreNeurons(min_tokens=1)],
}
SOME = ["llava", "qwen3_vl"]  # where the family changes little; tests/test_contract.py has the rest for `core_tokens`
HOW = {"greedy": {}, "beams": {"num_beams": 3}, "samples": {"do_sample": True, "num_return_sequences": 3}}
CELLS = [
    pytest.param(family, method, text_row, how, id=f"{family}-{method}-{'some' if text_row else 'all'}-{how}")
    for family in GATED
    for method in SETTINGS
    for text_row in (False, True)
    for how in HOW
    if family == "llava" or (method == "corematching" and text_row == (how == "beams") and how != "samples")
]


def questions(processor, text_row, side="left"):
    """A ragged batch, whole or with a row that has no picture."""
    prompts = ["a # What colour is it?", "two # and # yes", *(["no picture at all"] if text_row else []), "last 0 #"]
    sizes = [(70, 112), (56, 56), (112, 70), (56, 140)]
    return noise(processor, prompts, sizes, side)


def run(model, inputs, **extra):
    with torch.no_grad():
        return model(**inputs, **{"use_cache": True, **extra})


@pytest.mark.parametrize(("family", "method", "text_row", "how"), CELLS)
def test_decoding_is_the_dense_model_with_silenced_neurons(family, method, text_row, how):
    model, processor = tiny(family)
    inputs = questions(processor, text_row)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= HOW[how]
    torch.manual_seed(0)
    with vtok.patch(model, SETTINGS[method]()) as patch, Entered(model, patch) as entered:
        ours = model.generate(**inputs, **options)
    trace = patch.trace
    assert trace.parts["decode"].core.whole == (not text_row)
    torch.manual_seed(0)
    with Silenced(model, trace, inputs["input_ids"].shape[1], entered.embeds):
        theirs = model.generate(**inputs, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with Masked(model, trace, entered.embeds):  # the oracle is not vacuous
        torch.manual_seed(0)
        dense = model.generate(**inputs, **options)
    assert torch.equal(ours.logits[0], dense.logits[0]) or torch.allclose(ours.logits[0], dense.logits[0], atol=1e-4)
    assert not torch.allclose(ours.logits[1], dense.logits[1], atol=1e-2)


@pytest.mark.parametrize("per", ["sample", "picture"])
def test_the_models_own_activations_choose(per):
    """What is kept is what loops over the input of `down_proj` say, whatever the padding."""
    model, processor = tiny("llava_next")
    inputs = questions(processor, True)
    compressor = vtok.CoreTokens(layer=1, per=per)
    seen = []
    hook = model.model.language_model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    run(model, inputs)
    hook.remove()
    length = inputs["input_ids"].shape[1]
    with vtok.patch(model, compressor) as patch:
        run(model, inputs)
    trace = patch.trace
    which = torch.full((len(inputs["input_ids"]) * length,), -1)
    for i, part in enumerate(trace.pictures):
        which[part.tokens] = trace.samples[:i].count(trace.samples[i])
    which = which.view(-1, length)
    anchor = torch.full((len(which),), length - 1)
    activations = Activations(seen[0], inputs["attention_mask"].bool(), which >= 0, which, 2, anchor)
    for row, kept in enumerate(slow_score(compressor, activations)):
        here = trace.positions_at(2)[row]
        assert here[which[row, here] >= 0].tolist() == kept


@pytest.mark.parametrize("family", GATED)
def test_a_batch_is_its_samples(family):
    model, processor = tiny(family)
    prompts = ["a # What colour is it?", "two # and # yes", "no picture at all"]
    pictures = [picture(70, 112, 1), picture(56, 56, 2), picture(112, 70, 3)]
    options = {"max_new_tokens": 6, "do_sample": False}
    with vtok.patch(model, [vtok.CoreMatching(layer=1, min_tokens=1)]) as patch:
        inputs = batch(processor, prompts, pictures)
        together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        core, kept = patch.trace.parts["decode"].core, patch.trace.n_kept_at(3)
        alone_kept = []
        for i, part in enumerate([pictures[:1], pictures[1:], []]):
            inputs = batch(processor, [prompts[i]], part)
            alone = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
            assert torch.equal(alone[0], together[i])
            if part:
                alone_kept += patch.trace.n_kept_at(3)
                for layer, index in patch.trace.parts["decode"].core.index.items():
                    assert torch.equal(index[0], core.index[layer][i])
    assert core.rows.tolist() == [True, True, False]
    assert kept == alone_kept


@pytest.mark.parametrize("family", SOME)
def test_settings_that_keep_all_are_the_identity(family):
    model, processor = tiny(family)
    inputs = questions(processor, False)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    dense, tokens = run(model, inputs).logits, model.generate(**inputs, **options)
    for method in (
        vtok.CoreTokens(min_keep=1.0),
        vtok.CoreNeurons(beta=1.0),
        vtok.CoreMatching(min_keep=1.0, beta=1.0, rho=1.0),
    ):
        with vtok.patch(model, method) as patch:
            assert torch.equal(run(model, inputs).logits, dense)
            ours = model.generate(**inputs, **options)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, tokens.logits))
        assert patch.trace.mean_keep == 1.0
        assert patch.trace.copied_bytes == 0


def test_the_prefill_alone_sees_all_neurons():
    model, processor = tiny("llava")
    inputs = batch(processor, ["# what?"], [picture(56, 56)])
    dense = run(model, inputs).logits
    with vtok.patch(model, [vtok.CoreNeurons(min_tokens=1)]) as patch:
        assert torch.equal(run(model, inputs).logits, dense)
        assert patch.trace.n_kept == patch.trace.n_visual


def test_short_prompts_and_prompts_without_a_picture_stay_dense():
    model, processor = tiny("llava")
    text = processor.tokenizer(["no picture in this"], return_tensors="pt")
    short = batch(processor, ["# what?"], [picture(56, 56)])
    n = short["input_ids"].shape[1]
    for inputs, method in ((text, vtok.CoreNeurons(min_tokens=1)), (short, vtok.CoreNeurons(min_tokens=n + 1))):
        dense = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        with vtok.patch(model, method):
            assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), dense)
    with vtok.patch(model, vtok.CoreNeurons(min_tokens=n)) as patch:
        model.generate(**short, max_new_tokens=5, do_sample=False)
    assert patch.trace.parts["decode"].core.whole


# ---- state -----------------------------------------------------------------------------------------------------------


def copies_of(cache):
    return cache.states["decode"].copies[0]


def test_weights_are_copied_counted_and_freed():
    model, processor = tiny("llava")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    inputs = questions(processor, False)
    with vtok.patch(model, [vtok.CoreNeurons(min_tokens=1)]) as patch:
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache = output.past_key_values
        k = math.floor(0.4 * 128)
        assert patch.trace.neurons == {1: k, 2: k}
        assert copies_of(cache).nbytes == patch.trace.copied_bytes == 3 * (2 * 3 * k * 64) * 4
        assert patch.trace.to_dict()["copied_bytes"] == copies_of(cache).nbytes
        flops = patch.trace.flops()
        saved = 3 * 2 * (2 * 3 * 64 * (128 - k))  # 3 samples, 2 layers
        assert flops["dense"]["decode"] - flops["compressed"]["decode"] == saved
        assert flops["dense"]["prefill"] == flops["compressed"]["prefill"]
        beams = model.generate(**inputs, num_beams=3, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        assert copies_of(beams.past_key_values).nbytes == patch.trace.copied_bytes == copies_of(cache).nbytes  # shared
        copies = weakref.ref(copies_of(cache))
        del output, cache
        gc.collect()
        assert copies() is None  # though the trace is still here
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def prefilled(model, processor, **extra):
    inputs = questions(processor, False)
    positions = inputs["attention_mask"].cumsum(1)
    return run(model, inputs, use_cache=True, **extra).past_key_values, positions[:, -1:]


def test_cores_follow_their_sequences():
    """Reordered, repeated and selected rows decode as the rows that they came from."""
    model, processor = tiny("llava")
    tokens = torch.tensor([[40], [50], [60]])
    with vtok.patch(model, [vtok.CoreMatching(layer=1, min_tokens=1)]):

        def step(change, order):
            cache, positions = prefilled(model, processor)
            run(model, {"input_ids": tokens, "position_ids": positions}, past_key_values=cache)
            assert copies_of(cache) is not None
            change(cache)
            more = {"input_ids": tokens[order], "position_ids": positions[order] + 1}
            return run(model, more, past_key_values=cache).logits, cache

        plain, kept = step(lambda cache: cache.reorder_cache(torch.arange(3)), [0, 1, 2])
        assert copies_of(kept) is not None  # equal neurons: nothing was copied again
        for change, order in (
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        ):
            logits, _ = step(change, order)
            torch.testing.assert_close(logits, plain[order], atol=1e-5, rtol=1e-5)
        cache, _ = prefilled(model, processor)
        cache.reset()
        assert not cache.states


def test_equal_neighbours_share_their_copies():
    from vtok.engine.ffn import Core

    core = lambda *rows: Core(torch.ones(len(rows)), True, {0: torch.tensor(rows), 1: torch.tensor(rows)})
    assert core([1, 2]).repeats() == 1
    assert core([1, 2], [1, 2]).repeats() == 2
    assert core([1, 2], [1, 2], [3, 4], [3, 4]).repeats() == 2
    assert core([1, 2], [1, 2], [3, 4]).repeats() == 1
    assert core([1, 2], [3, 4], [1, 2]).repeats() == 1
    mixed_layers = Core(torch.ones(2), True, {0: torch.tensor([[1], [1]]), 1: torch.tensor([[1], [2]])})
    assert mixed_layers.repeats() == 1


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_second_picture_brings_its_own_core(family):
    """The second turn's neurons are those of its prompt; text between goes through the first's."""
    model, processor = tiny(family)
    first = batch(processor, ["a # What colour is it?"], [picture(70, 112, 1)])
    second = batch(processor, [" yes and # now?"], [picture(112, 70, 2)])
    n1, n2 = first["input_ids"].shape[1], second["input_ids"].shape[1]
    text = {"input_ids": torch.tensor([[40, 50, 60]])}
    positions = lambda start, n: torch.arange(start, start + n)[None].expand(3 if family != "llava" else 1, 1, -1)
    shape = lambda x: x if family != "llava" else x[0]
    where = torch.ones(1, n2, dtype=torch.bool)
    prompt = lambda values: Activations(values, where, ~where, torch.full((1, n2), -1), 0, torch.tensor([n2 - 1]))
    layers = model.model.language_model.layers
    with vtok.patch(model, [vtok.CoreNeurons(min_tokens=1)]) as patch:
        cache = run(model, first, use_cache=True).past_key_values
        one = patch.trace.parts["decode"].core
        seen = {}
        hooks = [
            layers[i].mlp.down_proj.register_forward_pre_hook(lambda m, a, i=i: seen.setdefault(i, a[0]))
            for i in (1, 2)
        ]
        text["position_ids"] = shape(positions(n1, 3))
        run(model, text, past_key_values=cache)
        assert not seen  # the text went through copies
        second["attention_mask"] = torch.ones(1, n1 + 3 + n2, dtype=torch.long)
        second["position_ids"] = shape(positions(n1 + 3, n2))
        run(model, second, past_key_values=cache)
        for hook in hooks:
            hook.remove()
        two = patch.trace.parts["decode"].core
        assert cache.states["decode"].core is two is not one
        for layer in (1, 2):
            assert torch.equal(two.index[layer], vtok.CoreNeurons().neurons(prompt(seen[layer])))
            assert not torch.equal(two.index[layer], one.index[layer])


def test_a_turn_in_which_only_some_have_a_picture():
    """Rows without one go on with the core that they have, as if alone."""
    model, processor = tiny("llava")
    one = batch(processor, ["a # What colour is it?", "b # Which colour is it?"], [picture(70, 112, i) for i in (1, 2)])
    two = batch(processor, [" yes and # now?", " thanks, go on"], [picture(112, 70, 3)])
    n1 = one["input_ids"].shape[1]
    two["attention_mask"] = torch.cat([one["attention_mask"], two["attention_mask"]], 1)
    two["position_ids"] = two["attention_mask"].cumsum(1)[:, n1:] - 1
    one["position_ids"] = (one["attention_mask"].cumsum(1) - 1).clamp(min=0)
    step = lambda rows: {"input_ids": torch.full((rows, 1), 40), "position_ids": two["position_ids"][:rows, -1:] + 1}
    with vtok.patch(model, [vtok.CoreNeurons(min_tokens=1)]) as patch:
        cache = run(model, one, use_cache=True).past_key_values
        before = patch.trace.parts["decode"].core
        logits = run(model, two, past_key_values=cache).logits
        after = cache.states["decode"].core
        assert after.whole
        run_on = run(model, step(2), past_key_values=cache).logits
        # the second row alone: its second turn is text
        alone = {k: v[1:] for k, v in one.items() if k != "pixel_values"} | {"pixel_values": one["pixel_values"][1:]}
        cache = run(model, alone, use_cache=True).past_key_values
        pads = int((two["attention_mask"][1, n1:] == 0).sum())
        text = {
            "input_ids": two["input_ids"][1:, pads:],
            "position_ids": two["position_ids"][1:, pads:],
        }
        expected = run(model, text, past_key_values=cache).logits
        last = {"input_ids": torch.full((1, 1), 40), "position_ids": two["position_ids"][1:, -1:] + 1}
        expected_on = run(model, last, past_key_values=cache).logits
    for layer in before.index:
        assert torch.equal(after.index[layer][1], before.index[layer][1])
        assert not torch.equal(after.index[layer][0], before.index[layer][0])
    torch.testing.assert_close(logits[1, pads:], expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run_on[1], expected_on[0], atol=1e-4, rtol=1e-4)


def test_caches_of_another_patch_are_refused():
    model, processor = tiny("llava")
    step = {"input_ids": torch.full((3, 1), 40)}
    with vtok.patch(model, [vtok.CoreNeurons(min_tokens=1)]):
        cache, positions = prefilled(model, processor)
    for method in (vtok.Uniform(keep=0.5), vtok.CoreNeurons(start=0, end=4)):
        with vtok.patch(model, method), pytest.raises(PatchStateError, match="another patch"):
            run(model, step, past_key_values=cache, position_ids=positions)


@pytest.mark.parametrize("family", SOME)
def test_assisted_decoding(family):
    """Several tokens at once on the cache go the way that they would go one by one."""
    model, processor = tiny(family)
    inputs = batch(processor, ["a # What colour is it?"], [picture(70, 112)])
    options = {"max_new_tokens": 12, "do_sample": False}
    with vtok.patch(model, [vtok.CoreMatching(layer=1, min_tokens=1)]):
        plain = model.generate(**inputs, **options)
        with right_and_wrong(plain):
            assert torch.equal(model.generate(**inputs, prompt_lookup_num_tokens=3, **options), plain)


# ---- training --------------------------------------------------------------------------------------------------------


def with_completion(inputs, completion):
    ones, inputs = torch.ones_like(completion), dict(inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completion], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * ones], 1)
    labels = inputs["input_ids"].clone()
    labels[:, : -completion.shape[1]] = -100
    return inputs, labels


@pytest.mark.parametrize(("family", "text_row"), [*((family, True) for family in GATED), ("llava", False)])
def test_rollout_and_training_agree(family, text_row):
    """Contract 11: the log-probabilities of sampled tokens are those of the training forward, whose completion goes
    through the core as well."""
    model, processor = tiny(family)
    inputs = questions(processor, text_row)
    torch.manual_seed(0)
    with vtok.patch(model, [vtok.CoreMatching(layer=1, min_tokens=1)]) as patch:
        options = {"do_sample": True, "top_k": 0, "suppress_tokens": placeholder_ids(model)}
        rollout = model.generate(
            **inputs, **options, max_new_tokens=6, output_logits=True, return_dict_in_generate=True
        )
        core, kept = patch.trace.parts["decode"].core, patch.trace.n_kept_at(3)
        completion = rollout.sequences[:, inputs["input_ids"].shape[1] :]
        logprobs = lambda logits: logits.float().log_softmax(-1).gather(-1, completion[..., None]).squeeze(-1)
        sampled = logprobs(torch.stack(rollout.logits, 1))
        full, labels = with_completion(inputs, completion)
        trained = logprobs(model(**full, labels=labels).logits[:, -7:-1])
        assert patch.trace.n_kept_at(3) == kept
        for layer, index in patch.trace.parts["decode"].core.index.items():
            assert torch.equal(index, core.index[layer])
    torch.testing.assert_close(sampled, trained.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_loss_and_gradients(family):
    model, processor = tiny(family)
    inputs, labels = with_completion(questions(processor, True), torch.tensor([[40, 50, 60]]).repeat(4, 1))
    watched = {
        "embeddings": model.get_input_embeddings().weight,
        "gate": model.model.language_model.layers[1].mlp.gate_proj.weight,
        "down": model.model.language_model.layers[2].mlp.down_proj.weight,
    }

    def grads(loss):
        model.zero_grad()
        loss.backward()
        return {name: weight.grad.clone() for name, weight in watched.items()}

    with vtok.patch(model, [vtok.CoreMatching(layer=1, min_tokens=1)]) as patch:
        output = model(**inputs, labels=labels)
        ours = grads(output.loss)
    with Silenced(model, patch.trace, inputs["input_ids"].shape[1] - 3):
        expected = model(**inputs, labels=labels)
        theirs = grads(expected.loss)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    for name in watched:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


def test_gradient_checkpointing_replays_the_same_neurons():
    model, processor = tiny("llava")
    inputs, labels = with_completion(questions(processor, True), torch.tensor([[40, 50, 60]]).repeat(4, 1))
    weight = model.model.language_model.layers[1].mlp.gate_proj.weight
    model.train()
    grads = []
    with vtok.patch(model, [vtok.CoreMatching(layer=1, min_tokens=1)]):
        for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
            if options is not None:
                model.gradient_checkpointing_enable(options)
            model.zero_grad()
            losses = [model(**inputs, labels=labels).loss for _ in range(2)]  # two passes are open at once
            sum(losses).backward()
            grads.append(weight.grad.clone())
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grads[0], grads[2], atol=1e-6, rtol=1e-5)


def test_decoding_with_gradients_reaches_the_weights():
    model, processor = tiny("llava")
    weight = model.model.language_model.layers[1].mlp.up_proj.weight
    step = {"input_ids": torch.tensor([[40], [50], [60]])}
    with vtok.patch(model, [vtok.CoreNeurons(min_tokens=1)]) as patch:
        cache, positions = prefilled(model, processor)
        step["position_ids"] = positions
        logits = model(**step, past_key_values=cache).logits
        logits.sum().backward()
        core = patch.trace.parts["decode"].core.index[1]
    used = set(core.flatten().tolist())
    unused = [n for n in range(128) if n not in used]
    assert weight.grad[sorted(used)].abs().sum(1).min() > 0
    assert unused and (weight.grad[unused] == 0).all()


def test_a_training_forward_without_labels():
    model, processor = tiny("llava")
    inputs = questions(processor, False)
    model.train()
    with vtok.patch(model, [vtok.CoreTokens(layer=1)]), pytest.raises(Unsupported, match="after_visual"):
        model(**inputs)
    with vtok.patch(model, [vtok.CoreTokens(layer=1, anchor="after_visual")]):
        model(**inputs).logits.sum().backward()
    with vtok.patch(model, [vtok.CoreNeurons()]), pytest.raises(Unsupported) as error:
        model(**inputs)
    assert "labels" in str(error.value) and "after_visual" not in str(error.value)


def test_generate_without_a_cache():
    model, processor = tiny("llava")
    inputs = questions(processor, True)
    options = {"max_new_tokens": 5, "do_sample": False}
    with vtok.patch(model, [vtok.CoreMatching(layer=1, min_tokens=1)]):
        cached = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, use_cache=False, **options), cached)


def test_bfloat16():
    model, processor = tiny("qwen2_5_vl")
    model = model.to(torch.bfloat16)
    inputs = questions(processor, False)
    with vtok.patch(model, [vtok.CoreMatching(layer=1, min_tokens=1)]) as patch:
        output = model.generate(**inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
        assert copies_of(output.past_key_values).nbytes == patch.trace.copied_bytes
    assert all(logits.isfinite().all() for logits in output.logits)


# ---- installing ------------------------------------------------------------------------------------------------------


def seams(model):
    """What is on each decoder layer's attention and FFN."""
    return [
        (len(layer.self_attn._forward_pre_hooks), "forward" in layer.mlp.__dict__, len(layer._forward_pre_hooks))
        for layer in model.model.language_model.layers
    ]


def test_seams_only_where_somebody_asks():
    model, _ = tiny("llava")
    nothing = [(0, False, 0)] * 4
    assert seams(model) == nothing
    cases = {
        vtok.Uniform(keep=0.5): nothing,
        vtok.FastV(): [(0, False, 1)] * 4,
        vtok.CoreTokens(layer=1): [(int(i == 1), i == 1, 1) for i in range(4)],
        vtok.CoreNeurons(start=2, end=4): [(int(i > 1), i > 1, 1) for i in range(4)],
        vtok.CoreMatching(layer=0, start=2, end=4): [(int(i != 1), i != 1, 1) for i in range(4)],
        vtok.CoreMatching(min_keep=1.0, beta=1.0): nothing,
    }
    for method, expected in cases.items():
        with vtok.patch(model, method):
            assert seams(model) == expected
        assert seams(model) == nothing


@pytest.mark.parametrize("family", SOME)
def test_undo_is_exact(family):
    model, processor = tiny(family)
    inputs = questions(processor, True)
    dense, state = run(model, inputs).logits, {k: id(v) for k, v in model.named_modules()}
    dicts = {name: set(module.__dict__) for name, module in model.named_modules()}
    patch = vtok.patch(model, [vtok.CoreMatching(layer=1, min_tokens=1)])
    model.generate(**inputs, max_new_tokens=3)

    def boom(*args):
        raise RuntimeError("boom")

    hook = model.model.language_model.layers[1].mlp.down_proj.register_forward_pre_hook(boom)
    with pytest.raises(RuntimeError, match="boom"):
        run(model, inputs)
    hook.remove()
    text = processor.tokenizer(["no picture"], return_tensors="pt")
    assert run(model, text).logits.isfinite().all()
    gone = weakref.ref(patch._engine)
    patch.remove()
    patch.remove()
    assert seams(model) == [(0, False, 0)] * 4
    assert {k: id(v) for k, v in model.named_modules()} == state
    after = {name: set(module.__dict__) - {"rope_deltas"} for name, module in model.named_modules()}
    assert after == {name: names - {"rope_deltas"} for name, names in dicts.items()}
    assert torch.equal(run(model, inputs).logits, dense)
    del patch
    gc.collect()
    assert gone() is None


def test_a_forward_that_somebody_replaced_stays():
    """accelerate does, where a device map spreads a model: ours stands in front, and goes away again."""
    model, processor = tiny("llava")
    inputs = questions(processor, False)
    mlp, calls = model.model.language_model.layers[1].mlp, []
    inner = mlp.forward

    def wrapped(x):
        calls.append(x.shape)
        return inner(x)

    mlp.forward = wrapped
    with vtok.patch(model, [vtok.CoreNeurons(min_tokens=1)]):
        calls.clear()
        text = processor.tokenizer(["no picture"], return_tensors="pt")
        run(model, text)
        assert len(calls) == 1
        model.generate(**inputs, max_new_tokens=3)
    assert mlp.__dict__["forward"] is wrapped
    del mlp.forward
    patch = vtok.patch(model, [vtok.CoreNeurons(min_tokens=1)])
    ours = mlp.forward
    mlp.forward = lambda x: ours(x)
    dense = run(model, text).logits
    patch.remove()  # what stands in front of ours is not touched, and ours does nothing any more
    assert torch.equal(run(model, text).logits, dense)
    del mlp.forward
    assert seams(model) == [(0, False, 0)] * 4


class Biased(nn.Module):
    def __init__(self, mlp, **changes):
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj", "act_fn"):
            setattr(self, name, changes.get(name, getattr(mlp, name)))

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Scaled(Biased):
    def forward(self, x):
        return super().forward(x) * 0.5


class Experts(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.experts, self.gate = nn.ModuleList([mlp]), nn.Linear(64, 1)


class Packed(nn.Linear):
    """As bitsandbytes does."""


class Fused(nn.Module):
    """As Phi-3 does."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(64, 256, bias=False), mlp.down_proj


REFUSED = {
    "mixture of experts": Experts,
    "has a bias": lambda mlp: Biased(mlp, up_proj=nn.Linear(64, 128)),
    r"quantised.*Packed": lambda mlp: Biased(mlp, gate_proj=Packed(64, 128, bias=False)),
    "no gate_proj": Fused,
    "offloaded": lambda mlp: Biased(mlp, down_proj=nn.Linear(128, 64, bias=False, device="meta")),
}


@pytest.mark.parametrize("method", ["core_tokens", "core_neurons", "corematching"])
@pytest.mark.parametrize("reason", REFUSED)
def test_other_ffns_are_refused(reason, method):
    model, _ = tiny("llava")
    layer = model.model.language_model.layers[3]
    layer.mlp = REFUSED[reason](layer.mlp)
    with pytest.raises(Unsupported, match=reason):
        vtok.patch(model, method)
    assert seams(model) == [(0, False, 0)] * 4
    with vtok.patch(model, "uniform"):
        pass


def test_another_formula_is_refused():
    model, _ = tiny("llava")
    layer = model.model.language_model.layers[0]
    layer.mlp = Scaled(layer.mlp)
    with pytest.raises(Unsupported, match="Scaled"):
        vtok.patch(model, "corematching")


def test_adapters_on_the_ffn():
    """Tokens can be chosen under them; single neurons cannot be copied."""
    from peft import LoraConfig, get_peft_model

    model, processor = tiny("llava")
    inputs, labels = with_completion(questions(processor, False), torch.tensor([[40, 50, 60]]).repeat(3, 1))
    lora = LoraConfig(target_modules=r".*language_model.*\.(up_proj|down_proj)", r=2, lora_dropout=0.1)
    with vtok.patch(model, [vtok.CoreNeurons(min_tokens=1)]) as patch:
        wrapped = get_peft_model(model, lora)
        with pytest.raises(Unsupported, match="patch again"):
            wrapped.generate(**questions(processor, False), max_new_tokens=3)
        assert patch.active
    with pytest.raises(Unsupported, match="Merge it"):
        vtok.patch(wrapped, "core_neurons")
    with vtok.patch(wrapped, [vtok.CoreTokens(layer=1)]) as patch:
        wrapped(**inputs, labels=labels).loss.backward()
    assert sum(patch.trace.n_kept_at(2)) < sum(patch.trace.n_visual)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in wrapped.named_parameters() if "lora" in n)


def test_compile_after_patch():
    model, processor = tiny("llava", layers=3)
    inputs = questions(processor, False)
    options = {"max_new_tokens": 3, "do_sample": False}
    torch._dynamo.reset()  # else what other tests compiled so often that it is given up is not compiled here
    counters.clear()
    with vtok.patch(model, [vtok.CoreMatching(layer=1, min_tokens=1)]):
        plain, logits = model.generate(**inputs, **options), run(model, inputs).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(run(compiled, inputs).logits, logits)
        assert torch.equal(compiled.generate(**inputs, **options), plain)
    assert counters["stats"]["unique_graphs"] > 1


def test_two_models_do_not_know_of_each_other():
    (one, processor), (two, _) = tiny("llava"), tiny("llava")
    inputs = questions(processor, False)
    options = {"max_new_tokens": 4, "do_sample": False}
    dense = two.generate(**inputs, **options)
    with vtok.patch(one, [vtok.CoreMatching(layer=1, min_tokens=1)]):
        one.generate(**inputs, **options)
        assert torch.equal(two.generate(**inputs, **options), dense)
