"""`vtok bench decoding`: what it measures, that a killed run goes on, and its bars. On a small random model."""

import copy
import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from test_decoding import prompt, text_model

import vtok
from vtok.eval.bench import columns, decoding
from vtok.eval.bench.texts import KINDS, repeated
from vtok.eval.bench.turns import Turns
from vtok.markdown import table

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def small(monkeypatch):
    model = text_model()
    monkeypatch.setattr("vtok.models.load", lambda *args: (model, None))
    asking = lambda kind, tokenizer: [{"input_ids": prompt(20, seed)} for seed in range(4)]
    monkeypatch.setattr(decoding, "prompts", asking)
    return model


def test_a_killed_run_goes_on(small, tmp_path, monkeypatch):
    out, asked = tmp_path / "decoding.json", decoding.Asked(tokens=12, rounds=1, prompts=2, layers=1)
    decoding.run(asked, out)
    whole = json.loads(out.read_text())
    assert list(whole["rounds"]) == [f"{kind} 1" for kind in KINDS]
    lacks = {**whole, "rounds": {name: told for name, told in whole["rounds"].items() if "code" not in name}}
    out.write_text(json.dumps(lacks))
    answer, calls = decoding.abreast, []
    monkeypatch.setattr(decoding, "abreast", lambda *args: calls.append(args) or answer(*args))
    decoding.run(asked, out)
    again = json.loads(out.read_text())
    assert again["rounds"]["ordinary 1"] == whole["rounds"]["ordinary 1"] and "code 1" in again["rounds"]
    assert len(calls) == 2 * 2 + 2 * 9  # of one kind: the kept decoders warm up, then all are measured
    with pytest.raises(vtok.VtokError, match="another file"):
        decoding.run(decoding.Asked(tokens=13, rounds=1, prompts=2, layers=1), out)


def test_rows_and_bars(small, tmp_path):
    out = tmp_path / "decoding.json"
    decoding.run(decoding.Asked(tokens=12, rounds=1, prompts=2, layers=1), out)
    run = json.loads(out.read_text())
    for told in run["rounds"].values():
        for asked in told:
            assert all(row["same"] and row["tokens"] == 12 for row in asked["decoders"].values())
            assert asked["decoders"]["plain"]["steps"] == 12 and asked["prompt"] == 20
    for own in (row for told in run["rounds"].values() for asked in told for row in asked["decoders"].values()):
        own["cpu"] = own["plain"] = 1.0
    for i, asked in enumerate(run["rounds"]["repetitive 1"]):
        asked["decoders"][decoding.JUDGED] |= {"cpu": 0.5, "steps": 5, "drafted": 10, "accepted": 7, "same": not i}
    row = decoding.rows_of(run, "repetitive")[decoding.JUDGED]
    assert row["speed"] == 2.0 and row["tokens_a_step"] == 11 / 4 and row["accepted"] == 0.7 and row["same"] == 0.5
    bars = decoding.bars(run)
    assert (True, "TokenRecycling, kept, repetitive: 2.00 times plain's speed (bar 1.5)") in bars
    assert (False, "TokenRecycling, kept, ordinary: 1.00 times plain's speed (bar 1.15)") in bars
    assert any(not met and "50% of the texts" in said for met, said in bars)


@pytest.mark.skipif(not DOCS.is_dir(), reason="not in a checkout")
@pytest.mark.parametrize("work", [decoding, columns])
def test_the_docs_say_what_was_measured(work):
    file = DOCS / "text" / f"{work.__name__.rpartition('.')[2]}.json"
    head, *rows = work.cells(json.loads(file.read_text()))
    lines = table(head, rows).splitlines()[2:]
    page = (DOCS / "text.md").read_text().splitlines()
    assert len(lines) > 1 and set(lines) <= set(page)


def test_forwards_of_transformers_are_counted(small):
    how = {"assistant_model": copy.deepcopy(small)}  # drafts what the model would say
    ids, row = decoding.abreast(small, {"input_ids": prompt()}, how, 12)
    assert (
        row["same"]
        and row["tokens"] == len(ids) == 12
        and row["steps"] < 12
        and row["accepted"] == row["tokens"] - row["steps"] > 0
    )
    assert row["accepted"] <= row["drafted"]


def test_one_works_at_a_time_and_each_pays_for_its_own():
    turns, said = Turns(), []

    def work(name, steps, each):
        for _ in range(steps):
            began, end = turns.clock(), time.process_time() + each
            while time.process_time() < end:
                pass
            assert turns.clock() - began >= 0.9 * each
            said.append(name)
            turns.give()
        return name

    (a, used), (b, other) = turns.run(partial(work, "a", 2, 0.05), partial(work, "b", 3, 0.01))
    assert (a, b) == ("a", "b") and said == ["a", "b", "a", "b", "b"]
    assert used >= 0.1 and 0.03 <= other < 0.1  # what the other one used is not among it

    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        turns.run(fails, partial(work, "b", 1, 0.0))


def test_the_first_layers_are_a_model():
    model = text_model()
    with torch.no_grad():
        states = model(prompt(), output_hidden_states=True).hidden_states
        expected = model.lm_head(model.model.norm(states[2]))
        torch.testing.assert_close(decoding.first_layers(model, 2)(prompt()).logits, expected)


def test_what_stood_before():
    assert repeated([1, 2, 3, 4, 5], [1, 2, 3, 4, 9], n=4) == 0.2  # of five runs that end in the answer one
    assert repeated([1, 2], [3, 4]) == 0.0


# ---- behind long caches ----------------------------------------------------------------------------------------------
def test_behind_a_repeated_cache(monkeypatch, tmp_path):
    """The cache is as long as was asked for, and drafts change nothing in the text."""
    model, out = text_model(), tmp_path / "columns.json"
    monkeypatch.setattr(columns, "REAL", 40)
    monkeypatch.setattr(columns, "KEEPS", (0.5,))
    monkeypatch.setattr(columns, "LENGTHS", (2,))
    monkeypatch.setattr("vtok.models.load", lambda *args: (model, None))
    monkeypatch.setattr(columns, "_long", lambda tokenizer: {"input_ids": prompt(40)})
    lengths, repeat = [], columns._repeat
    monkeypatch.setattr(
        columns, "_repeat", lambda cache, n: repeat(cache, n) or lengths.append(cache.layers[0].keys.shape[2])
    )
    columns.run(columns.Asked(columns=120, tokens=10), out)
    assert lengths == [120, 60, 120, 60, 120]  # plain; then of each variant what drafts see, and all
    run = json.loads(out.read_text())
    rows = columns.rows_of(run)
    assert all(row["same"] for row in rows.values()) and run["rounds"]["0.5, 2"]["drafted"] >= 8
    columns.run(columns.Asked(columns=120, tokens=10), out)
    assert len(lengths) == 5  # nothing was left to do
    run["rounds"]["plain"]["seconds"] = 3 * run["rounds"]["0.5, as many as pay"]["seconds"]
    assert columns.bar(run) == (True, columns.bar(run)[1]) and "3.00 times" in columns.bar(run)[1]
    run["rounds"]["0.5, 2"]["ids"][0] += 1
    assert not columns.bar(run)[0]
    with pytest.raises(vtok.VtokError, match="no multiple"):
        columns.run(columns.Asked(columns=100), None)


def speed(n, x, keep, rate):
    """Of n drafts a step, in plain's: a plain step reads the weights and x times as much of the cache."""
    emitted = sum(rate**i for i in range(n + 1))
    return emitted * (1 + x) / (n * (1 + keep * x) + 1 + x)


@pytest.mark.parametrize(("gain", "keep", "rate"), [(1.0, 0.05, 0.9), (1.4, 0.1, 0.8)])
def test_break_even(gain, keep, rate):
    """At the least length, the best number of drafts gives that gain, and none gives more; a shorter one less."""
    x = columns.least(gain, keep, rate)
    assert max(speed(n, x, keep, rate) for n in range(1, 9)) == pytest.approx(gain)
    assert max(speed(n, 0.9 * x, keep, rate) for n in range(1, 9)) < gain
