"""The bridges to genlm: what they say when it is missing; and, where it is installed, that they say the same as it."""

import asyncio
import importlib
import math
import re

import pytest
import torch
from contract import language_model, tiny

from vtok.errors import MissingExtra, Unsupported
from vtok.text.decoding import genlm
from vtok.text.decoding.awrs import AWRS
from vtok.text.decoding.byte_level import Vocabulary


@pytest.fixture(scope="module")
def small():
    _, processor = tiny("qwen2_5_vl")
    return language_model(len(processor.tokenizer), hidden=16, ffn=32, scale=1.0, eos=2), processor.tokenizer


def test_a_missing_package_is_named(monkeypatch, small):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r'genlm.control.*pip install "vtok\[genlm\]"'):
        genlm.check(None, Vocabulary.of(small[1]))
    with pytest.raises(MissingExtra, match="genlm.bytes"):
        asyncio.run(genlm.byte_beam(*small, [1]))


def test_coroutines_that_wait_are_refused():
    async def waits():
        await asyncio.sleep(1)

    async def gives():
        return 3.0

    async def inside():
        return genlm.finished(gives())

    assert asyncio.run(inside()) == 3.0
    with pytest.raises(Unsupported, match="waits for other tasks"):
        asyncio.run(inside_of(waits))


async def inside_of(waits):
    return genlm.finished(waits())


def test_a_regular_expression(small):
    control = pytest.importorskip("genlm.control")
    model, tokenizer = small
    vocabulary = Vocabulary.of(tokenizer)
    end = tokenizer.eos_token_id
    pattern = "(yes|no)[0-9]"
    ok = genlm.check(control.BoolFSA.from_regex(pattern), vocabulary)
    ids = tokenizer("yes7", add_special_tokens=False)["input_ids"]
    assert all(ok(ids[: i + 1]) for i in range(len(ids))) and ok([*ids, end])
    assert not ok([*ids[:-1], end]) and not ok([*ids, ids[0]]) and not ok([len(tokenizer) + 1])
    torch.manual_seed(0)
    model.generation_config.pad_token_id = end
    out = model.generate(
        torch.tensor([ids]), do_sample=True, top_k=0, max_new_tokens=12, eos_token_id=end, custom_generate=AWRS(ok)
    )
    assert re.fullmatch(pattern, tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    with pytest.raises(Unsupported, match="over bytes"):
        genlm.check("[0-9]", vocabulary)


def test_a_beam_of_bytes(small):
    """The first byte's probability: the sum over all tokens that begin with it."""
    pytest.importorskip("genlm.bytes")
    model, tokenizer = small
    prompt = tokenizer("is it", return_tensors="pt")["input_ids"]

    async def first():
        state = await genlm.byte_beam(model, tokenizer, prompt[0].tolist(), width=50)
        return await state.logp_next()

    found = asyncio.run(first())
    with torch.no_grad():
        p = model(prompt).logits[0, -1].softmax(-1)
    vocabulary = Vocabulary.of(tokenizer)
    for byte in b"a t":
        expected = p[vocabulary.beginning(bytes([byte]))].sum().item()
        assert math.exp(found[byte]) == pytest.approx(expected, rel=1e-3)
