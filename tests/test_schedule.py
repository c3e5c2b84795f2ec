"""In-LLM pruning to a schedule: its mathematics by the specification's numbers and by loops, and its picks by the
attention of the unpatched model."""

import dataclasses
import json
import math
import random

import pytest
import torch
from contract import INSIDE, Masked, batch, mixed, picture, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

import vtok
from vtok.errors import InvalidValue
from vtok.kernels.attention_column_sums import attention_column_sums
from vtok.search import schedules
from vtok.types import Attention

LLAVA = (  # digitised from the paper's figure; the last layer, which it does not plot, as the one before
    *(1, 1, 0.648, 0.640, 0.619, 0.619, 0.619, 0.502, 0.499, 0.498, 0.498, 0.487, 0.236, 0.236, 0.236, 0.236),
    *(0.183, 0.182, 0.181, 0.078, 0.075, 0.073, 0.070, 0.070, 0.070, 0.061, 0.041, 0.041, 0.038, 0.033, 0.032, 0.032),
)


# ---- rates ------------------------------------------------------------------------------------------------------
def test_the_published_curve():
    rates = schedules.sigmoid(32, a=0.754, k=0.222, midpoint=12.25)
    assert rates[:2] == (1.0, 1.0)
    assert rates[2:8] == pytest.approx((0.6683, 0.6499, 0.6283, 0.6033, 0.5748, 0.5427), abs=5e-5)
    assert schedules.mean(rates) == pytest.approx(0.302574, abs=5e-7)


@pytest.mark.parametrize(
    ("mean", "solved"),
    [
        (0.1797, (3.69656, 5.92071, 5.68066)),
        (0.25, (7.14389, 8.39891, 9.64866)),
        (0.34, (10.74729, 11.35656, 14.01481)),
        (0.5, (16.42522, 16.49886, 21.36426)),
    ],
)
def test_midpoints(mean, solved):
    for (a, k), expected in zip(((1.0, 0.222), (1.0, 0.5), (0.754, 0.222)), solved):
        x = schedules.midpoint(mean, 32, a, k)
        assert x == pytest.approx(expected, abs=6e-6)
        assert schedules.mean(schedules.sigmoid(32, a, k, x)) == pytest.approx(mean, abs=1e-9)


def test_sigmoids_by_the_formula():
    draw = random.Random(0)
    for _ in range(200):
        a, k, x = draw.uniform(0.1, 1.5), draw.uniform(0.01, 3), draw.uniform(-10, 40)
        n, full, low = draw.randint(4, 40), draw.randint(1, 3), draw.uniform(0, 0.1)
        rates = schedules.sigmoid(n, a, k, x, full, low)
        slow = [1.0 if i <= full else min(1, max(low, a / (1 + math.exp(k * (i - x))))) for i in range(1, n + 1)]
        assert rates == pytest.approx(slow, abs=1e-12)
        assert schedules.check(rates) == rates  # never rises
    assert schedules.sigmoid(4, 1.0, 100.0, -1e6) == (1.0, 1.0, 0.0, 0.0)  # exp would overflow


def test_means_that_cannot_be_met():
    with pytest.raises(InvalidValue, match=r"from 0\.0625 to 0\.7656"):
        schedules.midpoint(0.06, 32, a=0.75, k=0.5)
    with pytest.raises(InvalidValue, match=r"from 0\.1562 to 1\.0000"):
        schedules.midpoint(0.1, 32, a=1.0, k=0.5, r_min=0.1)
    with pytest.raises(InvalidValue, match="below the number of decoder layers, 2"):
        schedules.midpoint(0.5, 2, a=1.0, k=0.5)
    for a in (0.5, 1.0):  # both ends of the interval themselves can
        for mean in (2 / 32, (2 + 30 * a) / 32):
            x = schedules.midpoint(mean, 32, a, 0.5)
            assert schedules.mean(schedules.sigmoid(32, a, 0.5, x)) == pytest.approx(mean, abs=1e-9)
    with pytest.raises(InvalidValue, match=r"from 0\.2500 to 0\.7500"):
        schedules.scaled((1.0, 0.5, 0.2, 0.0), 0.8)


def test_scaling_keeps_full_layers_and_zeros():
    for mean in (0.3, 0.425, 0.6, 0.75):
        rates = schedules.scaled((1.0, 0.5, 0.2, 0.0), mean)
        assert schedules.mean(rates) == pytest.approx(mean, abs=1e-9)
        assert rates[0] == 1.0 and rates[3] == 0.0 and rates[1] == pytest.approx(min(1, rates[2] * 2.5))
    assert schedules.scaled((1.0, 1.0), 1.0) == (1.0, 1.0)


def test_other_depths():
    assert schedules.resampled(LLAVA, 32, 2) == LLAVA
    double = schedules.resampled((1.0, 0.6, 0.2), 6, 1)
    assert double == pytest.approx((1, 1, 0.6, 0.6, 0.2, 0.2))
    for n in (2, 3, 5, 8, 24, 28, 33, 48, 80, 100):
        there = schedules.resampled(LLAVA, n, 1)
        assert schedules.check(there) == there
        fine = [LLAVA[j * 32 // (n * 32)] for j in range(n * 32)]  # each target layer covers 32 of n * 32 parts
        slow = [sum(fine[i * 32 : (i + 1) * 32]) / 32 for i in range(n)]
        slow[0] = 1.0
        assert there == pytest.approx(slow, abs=1e-12)
        if n > 32:
            assert schedules.mean(there) == pytest.approx(schedules.mean(LLAVA), abs=1e-12)
    assert schedules.resampled(LLAVA, 8, 2)[:2] == (1.0, 1.0)


@pytest.mark.parametrize(
    "rates",
    [(), "1", (1, "0.5"), (1, True), (1, float("nan")), (0.9, 0.5), (1, 0.5, 0.6), (1, -0.1), (1.1, 1), 3, (1, None)],
)
def test_no_schedules(rates):
    with pytest.raises(InvalidValue, match=r"rates must (be numbers|begin with 1|not rise)"):
        vtok.Schedule(rates=rates)


def test_files(tmp_path):
    file = tmp_path / "new" / "schedule.json"
    schedules.write(file, LLAVA, model="LLaVA-1.5-7B")
    content = json.loads(file.read_text())
    assert content["model"] == "LLaVA-1.5-7B" and content["mean_keep"] == pytest.approx(0.307, abs=0.002)
    assert [p.name for p in file.parent.iterdir()] == ["schedule.json"]  # nothing half written lies about
    assert vtok.Schedule(file=file).rates_at(32) == vtok.Schedule(rates=LLAVA).rates_at(32) == LLAVA
    assert schedules.mean(vtok.Schedule(file=str(file), keep=0.2).rates_at(32)) == pytest.approx(0.2)
    with pytest.raises(InvalidValue, match="not both"):
        vtok.Schedule(file=file, rates=LLAVA)
    for text, complaint in (("{", "not JSON"), ("[1]", "no list"), ('{"rates": 1}', "no list"), ("\xff", "not JSON")):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(InvalidValue, match=complaint):
            vtok.Schedule(file=file)
    file.write_text('{"rates": [1, 2]}')
    with pytest.raises(InvalidValue, match=r"rates in .*schedule\.json.* must be numbers"):
        vtok.Schedule(file=file)
    with pytest.raises(InvalidValue, match="No such file"):
        vtok.Schedule(file=tmp_path / "absent.json")


def test_options():
    assert vtok.Schedule().rates_at(32)[:2] == (1.0, 1.0)
    assert vtok.Schedule().rates_at(8)[1] == 1.0 > vtok.Schedule().rates_at(8)[2]
    assert schedules.mean(vtok.Schedule().rates_at(32)) == pytest.approx(0.34)
    assert vtok.Schedule(rates=[1, 1, 0.5, 0.5]).schedule(4) == {1: 0.5}  # a plateau is one step
    assert vtok.Schedule(keep=1.0).is_identity and vtok.Schedule(rates=(1, 1)).is_identity
    assert not vtok.Schedule(rates=(1, 0.5)).is_identity and not vtok.Schedule().is_identity
    for options in (
        *({"keep": 4}, {"keep": 0.0}, {"keep": True}, {"keep": float("nan")}),
        *({"a": 0}, {"k": -1.0}, {"k": float("nan")}, {"a": True}, {"r_min": 1.1}, {"r_min": -0.1}),
        *({"first_full": 0}, {"first_full": True}, {"queries": "all"}, {"rounding": "even"}, {"anchor": "last"}),
        {"a": 0.2, "r_min": 0.3},
    ):
        with pytest.raises(InvalidValue, match=next(iter(options))):
            vtok.Schedule(**options)
    hash(vtok.Schedule(rates=[1, 0.5]))


def test_counts_round_up_and_keep_one():
    up, down = vtok.Schedule(), vtok.Schedule(rounding="down")
    assert [up.remaining(n, 0.28, 1) for n in (0, 1, 10, 25, 576)] == [0, 1, 3, 7, 162]
    assert [down.remaining(n, 0.28, 1) for n in (0, 1, 10, 25, 576)] == [0, 0, 2, 7, 161]
    assert up.remaining(576, 0.0, 3) == 1  # a rate below 1 / N, or the tail of a sigmoid
    for n in range(1, 40):
        for layer, rate in vtok.Schedule(rates=LLAVA).schedule(32).items():
            assert up.remaining(n, rate, 1) == max(1, math.ceil(n * round(rate * 1000) / 1000 - 1e-12)), layer


# ---- scores -----------------------------------------------------------------------------------------------------
def slow_scores(attention, heads, groups):
    """[B, L] by loops: head mean, summed over the instruction's tokens."""
    b, n = attention.valid.shape
    first = n - attention.query.shape[2]
    out = torch.zeros(b, n)
    for i in range(b):
        for t in [int(t) for t in attention.instruction[i] if t >= 0]:
            seen = [j for j in range(t + 1) if attention.valid[i, j]]
            for h in range(heads):
                q = attention.query[i, h, t - first]
                logits = torch.stack([q @ attention.key[i, h * groups // heads, j] * attention.scaling for j in seen])
                for j, p in zip(seen, logits.softmax(0)):
                    out[i, j] += p / heads
    return out


@pytest.mark.parametrize("queries", [9, 4])
def test_scores_by_loops(queries, monkeypatch):
    torch.manual_seed(0)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[0, :2] = valid[1, 5] = False
    instruction = torch.tensor([[-1, 6, 8], [5, 6, 7], [-1, -1, 8]])
    instruction[1, 0] = 6 if queries == 4 else 3
    query, key = torch.randn(3, 4, queries, 8), torch.randn(3, 2, 9, 8)
    attention = Attention(query, key, 0.4, valid, valid, torch.tensor([8, 7, 8]), instruction)
    score = vtok.Schedule().score(attention)
    torch.testing.assert_close(score, slow_scores(attention, 4, 2))
    monkeypatch.setattr("vtok.kernels.attention_column_sums.BLOCK", 2)
    torch.testing.assert_close(vtok.Schedule().score(attention), score)
    last = vtok.Schedule(queries="last").score(attention)
    alone = dataclasses.replace(attention, instruction=attention.anchor[:, None])
    torch.testing.assert_close(last, slow_scores(alone, 4, 2))
    assert vtok.Schedule().score(dataclasses.replace(attention, query=query.bfloat16())).dtype == torch.float32


def test_a_row_without_queries_scores_nothing():
    """Also where it has no valid key at all, whose softmax is not a number."""
    valid = torch.tensor([[True] * 4, [False] * 4])
    score = attention_column_sums(
        torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8), torch.tensor([[3], [-1]]), 1.0, valid
    )
    assert score[0].sum() == pytest.approx(1.0) and torch.equal(score[1], torch.zeros(4))


def test_scoring_reads_no_values_back():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        query, key = (mode.from_tensor(torch.randn(2, heads, 6, 8)) for heads in (4, 2))
        rows, valid = mode.from_tensor(torch.zeros(2, 3, dtype=torch.long)), mode.from_tensor(torch.ones(2, 6) > 0)
        assert attention_column_sums(query, key, rows, 1.0, valid).shape == (2, 6)


# ---- what the engine hands over ---------------------------------------------------------------------------------
def spy():
    seen = []

    class Spy(vtok.Schedule):
        def score(self, attention):
            seen.append(attention)
            return super().score(attention)

    return Spy, seen


def run(model, inputs, **extra):
    with torch.no_grad():
        return model(**inputs, **{"use_cache": True, **extra})


def visual(model, inputs):
    return inputs["input_ids"] == model.config.image_token_id


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", INSIDE)
def test_the_instruction(family, side):
    """The prompt's text behind its first visual token up to the anchor; the anchor alone where there is none."""
    model, processor = tiny(family)
    inputs = mixed(processor, side)
    cls, seen = spy()
    with vtok.patch(model, cls(rates=(1, 0.5, 0.5, 0.2))) as patch:
        run(model, inputs)
    image = visual(model, inputs)
    for layer, attention in zip((0, 2), seen, strict=True):
        for b, places in enumerate(attention.instruction.tolist()):
            real = [p for p in range(image.shape[1]) if inputs["attention_mask"][b, p]]
            first = min((p for p in real if image[b, p]), default=real[-1])
            expected = [p for p in real if p >= first and not image[b, p]]
            expected = sorted({*expected, real[-1]})
            here = patch.trace.rows_at(layer)
            assert [int(here.index[b, c]) for c in places if c >= 0] == expected
            assert places == sorted(places) and places[-1] == int(attention.anchor[b])
            assert all(attention.valid[b, c] for c in places if c >= 0)


@pytest.mark.parametrize("family", INSIDE)
def test_a_completion_has_no_say(family):
    """Contract 11: the same instruction and the same picks with the answer behind the prompt as without it."""
    model, processor = tiny(family)
    inputs = dict(mixed(processor))
    cls, seen = spy()
    with vtok.patch(model, cls(rates=(1, 0.7, 0.5, 0.2))) as patch:
        model.generate(**inputs, max_new_tokens=2)
        kept = [patch.trace.positions_at(i) for i in range(4)]
        length = inputs["input_ids"].shape[1]
        answer = torch.full((len(inputs["input_ids"]), 3), 40)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * answer], 1)
        labels = inputs["input_ids"].clone()
        labels[:, :length] = -100
        run(model, inputs, labels=labels)
        for layer in range(4):
            for a, b in zip(kept[layer], patch.trace.positions_at(layer)):
                assert torch.equal(a, b[b < length])
    assert len(seen) == 6
    for one, other in zip(seen[:3], seen[3:]):
        assert torch.equal(one.instruction, other.instruction)


def test_a_second_turn_has_an_instruction_of_its_own():
    model, processor = tiny("llava")
    first = batch(processor, ["a # What colour is it?"], [picture(70, 112, 1)])
    second = batch(processor, [" yes and # now?"], [picture(112, 70, 2)])
    n1, n2 = first["input_ids"].shape[1], second["input_ids"].shape[1]
    second["attention_mask"] = torch.ones(1, n1 + n2, dtype=torch.long)
    cls, seen = spy()
    with vtok.patch(model, cls(rates=(1, 0.5, 0.5, 0.5))):
        cache = run(model, first, use_cache=True).past_key_values
        run(model, second, past_key_values=cache)
    after = int(visual(model, second)[0].nonzero()[-1]) + 1
    assert seen[1].instruction.tolist() == [list(range(n1 + after, n1 + n2))]


@pytest.mark.parametrize("queries", ["instruction", "last"])
@pytest.mark.parametrize("family", INSIDE)
def test_picks_by_the_models_own_attention(family, queries):
    """Each layer keeps the tokens to which the unpatched model, with what is gone masked, attends most in the layer
    before, by its own probabilities; counts are ceil(rate * N)."""
    model, processor = tiny(family, "eager")
    inputs = mixed(processor)
    rates = (1, 0.8, 0.55, 0.2)
    with vtok.patch(model, "schedule", rates=rates, queries=queries) as patch:
        run(model, inputs)
    trace = patch.trace
    with Masked(model, trace):
        probabilities = run(model, inputs, output_attentions=True).attentions
    image = torch.zeros_like(visual(model, inputs))
    for p in trace.pictures:
        image.view(-1)[p.tokens] = True
    anything = visual(model, inputs)
    image[:, -1] = False  # a picture ends one of the prompts: its last token stays, and is not counted
    for layer in (1, 2, 3):
        before, now = trace.present_at(layer - 1), trace.present_at(layer)
        for b in range(len(image)):
            rows = [image.shape[1] - 1]
            if queries == "instruction" and anything[b].any():
                start = int(anything[b].nonzero()[0])
                text = [p for p in range(start, image.shape[1]) if not anything[b, p]]
                rows = sorted({*text, *rows})
            score = sum(probabilities[layer - 1][b].mean(0)[t] for t in rows)
            there = (image[b] & before[b]).nonzero().squeeze(1).tolist()
            n = math.ceil(rates[layer] * int(image[b].sum()) - 1e-9)
            best = sorted(there, key=lambda p: (-round(float(score[p]), 9), p))[:n]
            assert sorted(best) == (image[b] & now[b]).nonzero().squeeze(1).tolist(), (layer, b)


def test_layers_after_which_nothing_goes_are_left_alone():
    """Two rates that mean one count: no score, no gather, the same logits as with one of them."""
    model, processor = tiny("llava")
    inputs = batch(processor, ["a # What colour is it?", "and # this?"], [picture(56, 56), picture(56, 56, 1)])
    cls, seen = spy()
    with vtok.patch(model, cls(rates=(1, 0.92, 0.89, 0.88))) as patch:
        two = run(model, inputs, use_cache=True)
        assert len(seen) == 1
        assert [patch.trace.n_kept_at(i) for i in range(4)] == [[16, 16], [15, 15], [15, 15], [15, 15]]
        assert patch.trace.rows_at(3) is patch.trace.rows_at(1)
    with vtok.patch(model, "schedule", rates=(1, 0.92, 0.92, 0.92)):
        one = run(model, inputs, use_cache=True)
    assert torch.equal(one.logits, two.logits)
    assert [x.keys.shape for x in one.past_key_values.layers] == [x.keys.shape for x in two.past_key_values.layers]
    with vtok.patch(model, cls(rates=(1, 0.99, 0.98, 0.97))):  # 16 of 16: nothing goes anywhere
        dense = run(model, inputs, use_cache=True)
    assert len(seen) == 1
    assert torch.equal(dense.logits, run(model, inputs).logits)


@pytest.mark.parametrize("rates", [(1.0, 1.0, 1.0, 1.0), None])
@pytest.mark.parametrize("family", INSIDE)
def test_a_schedule_of_ones_is_the_identity(family, rates):
    model, processor = tiny(family)
    inputs = mixed(processor)
    dense = run(model, inputs).logits
    options = {"keep": 1.0} if rates is None else {"rates": rates}
    with vtok.patch(model, "schedule", **options) as patch:
        assert torch.equal(run(model, inputs).logits, dense)
        assert patch.trace.mean_keep == 1.0


@pytest.mark.parametrize("options", [{}, {"a": 0.6, "k": 1.5}, {"rates": (1, 0.5, 0.4, 0.1)}, {"rates": (1, 0.5, 0.2)}])
def test_budget_is_met(options):
    model, processor = tiny("llava_next")
    inputs = mixed(processor)
    with vtok.patch(model, "schedule", budget=0.7, **options) as patch:
        run(model, inputs)
        assert 0.58 < patch.trace.mean_keep <= 0.7
    with pytest.raises(InvalidValue, match="cannot be met"):
        vtok.patch(model, "schedule", budget=0.2, **options)
    with vtok.patch(model, "schedule", budget=1.0, **options) as patch:
        run(model, inputs)
        assert patch.trace.mean_keep == 1.0


def test_a_budget_without_room_for_two_full_layers_is_refused():
    with pytest.raises(InvalidValue, match="2 of 8 layers see all tokens, and a budget of 0.25 leaves next to nothing"):
        vtok.Schedule().with_budget(0.25, 8)
    with pytest.raises(InvalidValue, match="2 of 8 layers"):
        vtok.Schedule().with_budget(0.2968, 8)  # 0.0624 is left for the others, a quarter of it is 0.0742
    for budget, full, n in ((0.31, 2, 8), (0.25, 1, 8), (0.25, 2, 30), (0.1, 2, 30)):
        rates = vtok.Schedule(first_full=full).with_budget(budget, n).rates_at(n)
        assert rates[full - 1] == 1.0 > rates[full] and schedules.mean(rates) == pytest.approx(budget)


def test_a_file_on_a_model_of_another_depth(tmp_path):
    model, processor = tiny("llava")
    schedules.write(tmp_path / "s.json", LLAVA)
    with vtok.patch(model, "schedule", file=tmp_path / "s.json") as patch:
        run(model, batch(processor, ["a # What?"], [picture(56, 56)]))
    expected = [math.ceil(16 * sum(LLAVA[i * 8 : i * 8 + 8]) / 8) for i in range(4)]
    assert [patch.trace.n_kept_at(i)[0] for i in range(4)] == [16, 16, *expected[2:]]


def test_equal_scores_go_to_the_earlier_token():
    model, processor = tiny("llava")

    class Even(vtok.Schedule):
        def score(self, attention):
            return torch.zeros(attention.valid.shape)

    inputs = batch(processor, ["a # What?"], [picture(56, 56)])
    with vtok.patch(model, Even(rates=(1, 0.5, 0.3, 0.1))) as patch:
        run(model, inputs)
    places = visual(model, inputs)[0].nonzero().squeeze(1)
    for layer, n in enumerate((16, 8, 5, 2)):
        assert torch.equal(patch.trace.positions_at(layer)[0][places[0] :][:n], places[:n])
