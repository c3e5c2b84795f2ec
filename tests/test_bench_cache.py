"""`vtok bench cache`: what it scores is the text's own likelihood, under the cache that a method leaves."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from contract import language_model

from vtok.errors import InvalidValue
from vtok.eval.bench import cache, texts
from vtok.eval.bench.measure import How
from vtok.eval.results.cells import Cell
from vtok.runs import DENSE

VOCABULARY = 60
HOW, ANSWER = How(), 4


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
        logits = model(ids, attention_mask=bias).logits[0, -ANSWER - 1 : -1]
    return -logits.log_softmax(-1).gather(1, ids[0, -ANSWER:, None]).sum().item()


def test_the_nats_are_those_of_one_masked_forward(model):
    ids = torch.tensor([[(7 * i * i + 3 * i) % VOCABULARY for i in range(24)]])
    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    dense = cache.once(model, ids, Cell(DENSE, 1.0), ANSWER, HOW)
    assert dense.nats == pytest.approx(nats(model, ids, mask), abs=1e-3)
    for row in range(20, 24):  # of the answer: the first two columns, eight before it and itself
        mask[row, 2 : row - 8] = False
    short = cache.once(model, ids, Cell("streaming_llm:sinks=2", 0.5), ANSWER, HOW)
    assert short.nats == pytest.approx(nats(model, ids, mask), abs=1e-3)
    assert abs(short.nats - dense.nats) > 0.1 and 2 * short.bytes == dense.bytes


def test_a_killed_run_goes_on(model, tmp_path, monkeypatch):
    out, asked = tmp_path / "cache.json", cache.Asked("tiny", ("random_kv",), (0.5,), (30,), 2, ANSWER)
    cache.run(model, Letters(), asked, HOW, out)
    told = json.loads(out.read_text())
    assert len(told["rounds"]) == len(texts.READ) * 2 and {len(rows) for rows in told["rounds"].values()} == {2}
    first = dict([*told["rounds"].items()][:3])
    out.write_text(json.dumps(told | {"rounds": first}))
    calls = []
    once = cache.once
    monkeypatch.setattr(cache, "once", lambda *given: calls.append(given) or once(*given))
    cache.run(model, Letters(), asked, HOW, out)
    again = json.loads(out.read_text())["rounds"]
    assert len(calls) == 2 and len(again) == 4 and first.items() <= again.items()
    with pytest.raises(InvalidValue, match="take another file"):
        cache.run(model, Letters(), replace(asked, passages=3), HOW, out)


def test_the_table_is_paired():
    row = lambda method, budget, nats, size: cache.Row(method, budget, 10, nats, 2.0 * size, 0.2 * size, size * 10**6)
    passages = [[row(DENSE, 1.0, 20.0 + 10 * i, 2), row("a", 0.5, 21.0 + 10 * i, 1)] for i in range(12)]
    assert cache.lines(passages[:9])[1][4] == ""  # too few for an interval
    lines = cache.lines([passages[0], *(passage[::-1] for passage in passages[1:])])  # they took turns
    assert lines[0][:4] == [DENSE, "100%", f"{math.exp(7.5):.2f}", ""]
    assert lines[1][:5] == ["a", "50%", f"{math.exp(7.6):.2f}", "0.100", "0.100 to 0.100"]
    assert lines[1][5:] == ["2.00", "200.0", "1.0"]


def test_passages_are_of_the_length_asked_for():
    for kind in texts.READ:
        found = texts.passages(Letters(), kind, 50, 3)
        assert [len(ids) for ids in found] == [50] * 3 and len({*map(tuple, found)}) == 3
