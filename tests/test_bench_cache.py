"""`vtok bench cache`: what it scores is the text's own likelihood, under the cache that a method leaves."""

from __future__ import annotations

import json
import math

import pytest
import torch
from contract import language_model

from vtok.errors import InvalidValue
from vtok.eval.bench import cache, passages
from vtok.eval.bench.measure import How
from vtok.eval.results.cells import Cell
from vtok.runs import DENSE

VOCABULARY = 60
HOW = How(tokens=4)


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}


@pytest.fixture(scope="module")
def model():
    return language_model(VOCABULARY)


def nats(model, ids, mask):
    """Of the last tokens of ids, from one forward in which each token sees what mask [S, S] says."""
    bias = torch.zeros(1, 1, *mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model(ids, attention_mask=bias).logits[0, -HOW.tokens - 1 : -1]
    return -logits.log_softmax(-1).gather(1, ids[0, -HOW.tokens :, None]).sum().item()


def test_the_nats_are_those_of_one_masked_forward(model):
    ids = torch.tensor([[(7 * i * i + 3 * i) % VOCABULARY for i in range(24)]])
    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    found, *_, dense = cache.once(model, ids, Cell(DENSE, 1.0), HOW)
    assert found == pytest.approx(nats(model, ids, mask), abs=1e-3)
    for row in range(20, 24):  # of the answer: the first two columns, eight before it and itself
        mask[row, 2 : row - 8] = False
    short, *_, size = cache.once(model, ids, Cell("streaming_llm:sinks=2", 0.5), HOW)
    assert short == pytest.approx(nats(model, ids, mask), abs=1e-3)
    assert abs(short - found) > 0.1 and 2 * size == dense


def test_a_killed_run_goes_on(model, tmp_path, monkeypatch):
    out = tmp_path / "cache.json"
    run = lambda **how: cache.run(
        model, Letters(), "tiny", ["random_kv"], [0.5], [30], how.get("count", 2), HOW, how.get("out", out)
    )
    run()
    told = json.loads(out.read_text())
    assert len(told["rows"]) == len(passages.KINDS) * 2 * 2
    first = told["rows"][:5]
    out.write_text(json.dumps(told | {"rows": first}))
    calls = []
    once = cache.once
    monkeypatch.setattr(cache, "once", lambda *given: calls.append(given) or once(*given))
    run()
    again = json.loads(out.read_text())["rows"]
    assert len(calls) == 3 and again[:5] == first and len(again) == 8
    with pytest.raises(InvalidValue, match="take another file"):
        run(count=3)


def test_the_table_is_paired():
    row = lambda method, passage, nats: cache.Row("prose", passage, 8, method, 0.5, 10, nats, 1.0, 0.1, 10**6)
    whole = [cache.Row("prose", i, 8, DENSE, 1.0, 10, 20.0 + 10 * i, 2.0, 0.2, 2 * 10**6) for i in range(12)]
    part = [row("a", i, 21.0 + 10 * i) for i in range(12)]
    assert cache.lines([*whole[:9], *part[:9]])[1][4] == ""  # too few for an interval
    lines = cache.lines([*whole, *part])
    assert lines[0][:4] == [DENSE, "100%", f"{math.exp(7.5):.2f}", ""]
    assert lines[1][:5] == ["a", "50%", f"{math.exp(7.6):.2f}", "0.100", "0.100 to 0.100"]
    assert lines[1][5:] == ["1.00", "100.0", "1.0"]


def test_passages_are_of_the_length_asked_for():
    for kind in passages.KINDS:
        found = passages.of(Letters(), kind, 50, 3)
        assert [len(ids) for ids in found] == [50] * 3 and len({*map(tuple, found)}) == 3
