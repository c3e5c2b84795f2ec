"""LeMo: what the informative blocks are, and that a sparse layer is the dense one with the other tokens masked."""

import contextlib
import math

import pytest
import torch
from contract import decoder, language_model, noise, tiny
from test_training import PROMPTS, SIZES, with_completion

import vtok
import vtok.errors
from vtok.eval.bench.machine import kept_for_backward
from vtok.text import lemo

BLOCK = 8


def given(family):
    """A model, and a ragged batch with labels."""
    if family == "text":
        model = language_model(100, layers=4)
        torch.manual_seed(0)
        ids, mask = torch.randint(3, 100, (2, 37)), torch.ones(2, 37, dtype=torch.long)
        mask[1, :13] = 0
        return model, {"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, -100)
    model, processor = tiny(family)
    inputs, labels = with_completion(noise(processor, PROMPTS, SIZES), torch.tensor([[40, 50, 60]]).repeat(4, 1))
    return model, inputs, labels


def layers_of(model):
    return (decoder(model) if hasattr(model.model, "language_model") else model.model).layers


def learned(model, inputs, labels):
    """The loss, and the gradients."""
    model.train()
    model.zero_grad()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def masked(model, kept, skip):
    """The dense model in which the tokens that are not kept are seen by nobody, and get nothing of the layer."""
    handles = []
    for i, tokens in kept.items():
        layer = layers_of(model)[i]

        def columns(module, args, kwargs, tokens=tokens):
            length = kwargs["position_embeddings"][0].shape[1]
            stays = torch.zeros(len(tokens), length, dtype=torch.bool).scatter(1, tokens, True)
            mask = kwargs["attention_mask"]
            mask = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
            diagonal = torch.eye(length, dtype=torch.bool)  # so that a row that is thrown away is no NaN
            return args, {**kwargs, "attention_mask": mask & stays[:, None, None] | diagonal}

        def rows(module, args, kwargs, output, tokens=tokens):
            hidden = args[0] if args else kwargs["hidden_states"]
            first = output[0] if isinstance(output, tuple) else output
            stays = torch.zeros(first.shape[:2], dtype=torch.bool).scatter(1, tokens, True)[..., None]
            first = torch.where(stays, first, hidden if skip == "layer" else torch.zeros_like(first))
            return (first, *output[1:]) if isinstance(output, tuple) else first

        handles.append(layer.self_attn.register_forward_pre_hook(columns, with_kwargs=True))
        whole = layer if skip == "layer" else layer.self_attn
        handles.append(whole.register_forward_hook(rows, with_kwargs=True))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("skip", ["attention", "layer"])
@pytest.mark.parametrize("family", ["text", "llava_next", "qwen2_5_vl", "internvl"])
def test_passing_by_is_masking(family, skip):
    model, inputs, labels = given(family)
    with lemo.sparsify(model, 0.5, block=BLOCK, skip=skip, layers=[1, 2]) as sparse:
        loss, grads = learned(model, inputs, labels)
    assert sparse.kept.keys() == {1, 2}
    n = math.ceil(labels.shape[1] / BLOCK)
    assert all(BLOCK * (math.ceil(n / 2) - 1) < kept.shape[1] < labels.shape[1] for kept in sparse.kept.values())
    with masked(model, sparse.kept, skip):
        expected, wanted = learned(model, inputs, labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert grads.keys() == wanted.keys()
    largest = max(grad.abs().max() for grad in wanted.values())
    for name in grads:  # what is 0 but for rounding, as of biases of keys, has no scale of its own
        scale = max(wanted[name].abs().max(), 1e-2 * largest)
        torch.testing.assert_close(grads[name] / scale, wanted[name] / scale, atol=1e-4, rtol=1e-4)
    dense, _ = learned(model, inputs, labels)
    assert (dense - loss).abs() > 1e-4


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_what_changes_nothing(family):
    """keep=1.0, eval mode, generate, and a model that is dense again."""
    model, inputs, labels = given(family)
    dense, wanted = learned(model, inputs, labels)
    model.eval()
    text = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with lemo.sparsify(model, 1.0, block=BLOCK):
        loss, grads = learned(model, inputs, labels)
        assert torch.equal(loss, dense) and all(torch.equal(grads[name], wanted[name]) for name in wanted)
    with lemo.sparsify(model, 0.3, block=BLOCK, layers=range(4)) as sparse:
        model.eval()
        assert torch.equal(model(**inputs, labels=labels).loss, dense)
        model.train()
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), text)
        assert not sparse.kept
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(learned(model, inputs, labels)[0], dense)


def slow(query, key, scaling, valid, block):
    b, h, s, _ = query.shape
    key = key.repeat_interleave(h // key.shape[1], 1)
    n = math.ceil(s / block)
    pairs = torch.zeros(b, n, n)
    for sample in range(b):
        for q in range(s):
            for k in range(q + 1):
                if valid[sample, q] and valid[sample, k]:
                    value = sum(max(0.0, float(query[sample, i, q] @ key[sample, i, k]) * scaling) for i in range(h))
                    i, j = q // block, k // block
                    pairs[sample, i, j] = max(float(pairs[sample, i, j]), value)
                    pairs[sample, j, i] = pairs[sample, i, j]
    return pairs.sum(1)


def test_informative_blocks_by_loops():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 22, 8), torch.randn(2, 2, 22, 8)
    valid = torch.arange(22) >= torch.tensor([[0], [9]])
    found = lemo.informative(query, key, 0.3, valid, 5)
    torch.testing.assert_close(found, slow(query, key, 0.3, valid, 5), atol=1e-5, rtol=1e-5)
    assert found[1, 0] == 0  # all padding


def test_choose():
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 9.0]])
    assert lemo.choose(scores, 2, 14, 4).tolist() == [[0, 1, 2, 3, 12, 13], [8, 9, 10, 11, 12, 13]]


def saved(model, inputs, labels):
    model.train()
    return kept_for_backward(model, lambda: model(**inputs, labels=labels))[0]


def test_less_is_kept_for_the_backward_pass():
    model, inputs, labels = given("text")
    dense = saved(model, inputs, labels)
    sizes = {}
    for skip in ("attention", "layer"):
        with lemo.sparsify(model, 0.4, block=BLOCK, skip=skip, layers=range(4)):
            sizes[skip] = saved(model, inputs, labels)
    assert sizes["layer"] < sizes["attention"] < dense


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, inputs, labels = given("text")
    with lemo.sparsify(model, 0.5, block=BLOCK, layers=range(4)):
        loss, grads = learned(model, inputs, labels)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again, others = learned(model, inputs, labels)
    torch.testing.assert_close(again, loss)
    for name in grads:
        torch.testing.assert_close(others[name], grads[name], atol=1e-5, rtol=1e-4)


def test_lora_and_a_patch_before_the_decoder():
    from peft import LoraConfig, get_peft_model

    model, inputs, labels = given("llava_next")
    model = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", r=2, init_lora_weights=False))
    patch = vtok.patch(model, "divprune", keep=0.5)
    with lemo.sparsify(model, 0.5, block=BLOCK, layers=[1, 2]) as sparse:
        _, grads = learned(model, inputs, labels)
    assert all(grad.abs().sum() > 0 for grad in grads.values()) and len(grads) == 8
    left = max(len(places) for places in patch.trace.positions_at(1))  # by the patch, of the longest row
    assert max(int(kept.max()) for kept in sparse.kept.values()) < left < labels.shape[1]
    vtok.unpatch(model)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"keep": 0.0}, "keep must be"), ({"block": 0}, "block"), ({"skip": "ffn"}, "skip"), ({"layers": [7]}, "0 to 3")],
)
def test_values_out_of_range(options, complaint):
    with pytest.raises(vtok.errors.InvalidValue, match=complaint):
        lemo.sparsify(language_model(100, layers=4), **options)


def test_methods_in_the_same_layers_are_refused():
    model, inputs, labels = given("llava_next")
    sparse = lemo.sparsify(model, 0.5, block=BLOCK, layers=[1])
    with vtok.patch(model, "fastv"), sparse, pytest.raises(vtok.errors.Unsupported, match="same"):
        learned(model, inputs, labels)
