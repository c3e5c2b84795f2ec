"""`Patch.compile` and `torch.compile`: equal results, no graph break of ours, nothing recompiled for new pictures."""

import pytest
import torch
from contract import batch, cells, example, matrix, picture, seam, tiny
from test_undo import logits, snapshot
from torch._dynamo.utils import counters

import vtok
from vtok.compressor import load_all
from vtok.errors import PatchStateError, Unsupported

PROMPT = "a # What colour?"
# before the language model, in it, and merging: for models of two decoder layers, which compile in half the time
SHALLOW = {"uniform": {"keep": 0.5}, "fastv": {"keep": 0.5, "layer": 1}, "pool": {"keep": 0.5}}


def one_graph(parts):
    """Whether shapes follow from the picture's size alone, so that another picture compiles nothing."""
    return compiles(parts) and not any(part.adaptive for part in parts)


UNSEEN = ("prompt", "kv", "attend", "decode")


def compiles(parts):
    """Whether they do inside the language model, which `Patch.compile` asks for."""
    return all(part.stage not in UNSEEN and not (part.stage == "llm" and part.adaptive) for part in parts)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


def graphs():
    """Each method that acts in the decoder's layers; of the others, around whose graph nothing differs, one for each
    combination of stages, and each kind of seam."""
    found = {}
    for cell in cells("each", one_graph):
        stages = [part.stage for part in matrix()[cell.values]]
        asks = any("question" in part.needs for part in matrix()[cell.values])
        found.setdefault(cell.values if "llm" in stages else (*stages, asks, *seam(cell.values[0])), cell)
    return list(found.values())


@pytest.mark.parametrize(("family", "method"), graphs())
def test_one_graph_for_all_pictures_of_a_size(family, method):
    model, processor = tiny(family)
    pictures = [batch(processor, [PROMPT], [picture(112, 112, seed)]) for seed in range(3)]
    patch = vtok.patch(model, example(model, method))
    eager, traces = [], []
    for inputs in pictures:
        eager.append(logits(model, inputs))
        traces.append(patch.trace)
    patch.compile(backend="eager")
    assert torch.equal(logits(model, pictures[0]), logits(model, pictures[0]))
    graphs = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for inputs, expected, trace in zip(pictures, eager, traces):
            torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
            for layer in (0, 3):
                assert all(map(torch.equal, patch.trace.positions_at(layer), trace.positions_at(layer)))
    asks = "question" in patch.compressors[0].needs  # the text alone goes through the model too
    assert graphs == counters["stats"]["unique_graphs"] == 1 + asks
    assert not counters["graph_break"]
    patch.remove()


@pytest.mark.parametrize("method", ["uniform", "fastv"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_generate(family, method):
    """Prefill and decoding, and then another picture of the same size with nothing compiled anew."""
    model, processor = tiny(family, layers=2)
    first, second = (batch(processor, [PROMPT], [picture(112, 112, seed)]) for seed in (0, 1))
    # other shapes: of the layers' own code where there is any
    wide = [batch(processor, [PROMPT, "# b"], [picture(56, 140), picture(112, 56)])] if method == "fastv" else []
    generate = lambda inputs: model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with vtok.patch(model, method, **SHALLOW[method]) as patch:
        expected = [generate(inputs) for inputs in (first, second, *wide)]
        patch.compile(backend="eager")
        assert torch.equal(generate(first), expected[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(generate(second), expected[1])
        assert all(torch.equal(generate(inputs), tokens) for inputs, tokens in zip(wide, expected[2:]))
    assert not counters["graph_break"]


@pytest.mark.parametrize("method", ["pool", "fastv"])
def test_gradients(method):
    model, processor = tiny("llava", layers=2)
    inputs = batch(processor, [PROMPT], [picture(112, 112)])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    losses, gradients = [], []
    with vtok.patch(model, method, **SHALLOW[method]) as patch:
        for compiled in (False, True):
            if compiled:
                patch.compile(backend="aot_eager")
            model.zero_grad()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            losses.append(loss.detach())
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_inductor():
    """The compiler that users get."""
    model, processor = tiny("llava", layers=2)
    pictures = [batch(processor, [PROMPT], [picture(112, 112, seed)]) for seed in range(2)]
    with vtok.patch(model, "fastv", **SHALLOW["fastv"]) as patch:
        expected = [logits(model, inputs) for inputs in pictures]
        patch.compile()
        logits(model, pictures[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            for inputs, dense in zip(pictures, expected):
                torch.testing.assert_close(logits(model, inputs), dense, atol=1e-5, rtol=1e-5)
    assert counters["inductor"]


def test_whole_model():
    """`torch.compile(model)`: transformers' own forwards break, ours only around the language model, never in it."""
    found = {}
    for method in ("uniform", "fastv"):
        model, processor = tiny("llava", layers=2)
        first, second = (batch(processor, [PROMPT], [picture(112, 112, seed)]) for seed in (0, 1))
        with vtok.patch(model, method, **SHALLOW[method]):
            expected = logits(model, second)
            torch._dynamo.reset()
            counters.clear()
            compiled = torch.compile(model, backend="eager")
            logits(compiled, first)
            found[method] = sum(counters["graph_break"].values())
            with torch.compiler.set_stance("fail_on_recompile"):
                torch.testing.assert_close(logits(compiled, second), expected, atol=1e-5, rtol=1e-5)
    assert found["fastv"] == found["uniform"]


def test_undo_and_refusals():
    model, processor = tiny("llava")
    inputs = batch(processor, [PROMPT], [picture(112, 112)])
    dense, before = logits(model, inputs), snapshot(model)
    patch = vtok.patch(model, "uniform", keep=0.5)
    patch.compile(backend="eager")
    logits(model, inputs)
    with pytest.raises(PatchStateError, match="compiled already"):
        patch.compile()
    patch.remove()
    assert snapshot(model) == before
    assert torch.equal(logits(model, inputs), dense)
    with pytest.raises(PatchStateError, match="was removed"):
        patch.compile()
    refused = {method for (family, method), parts in matrix().items() if family == "llava" and not compiles(parts)}
    one = {method for method in refused if "-" not in method}
    others = {name for name, cls in load_all().items() if not cls.of_pictures}
    assert one == {"core_tokens", "core_neurons", "corematching"} | others
    for method in sorted(refused):
        with vtok.patch(model, example(model, method)) as patch, pytest.raises(Unsupported, match="cannot be compiled"):
            patch.compile()
