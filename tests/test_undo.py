"""Contract 8: undo is exact, whatever happened in between; and patched models do not know of each other."""

import copy
import gc
import weakref

import pytest
import torch
from contract import FAMILIES, INSIDE, STACKS, able, cells, decoder, encoder, example, mixed, run, tiny
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtok
import vtok.errors

STACK = STACKS["all stages"]
HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
]


def snapshot(model):
    """Hooks and attributes of every module, the attention registry, the config."""
    modules = {}
    for name, module in model.named_modules():
        hooks = {kind: list(getattr(module, kind).values()) for kind in HOOKS}
        own = {*HOOKS, "rope_deltas"}  # the last is what Qwen-VL itself notes of every forward
        attributes = {k: id(v) for k, v in module.__dict__.items() if k not in own and not k.startswith("_")}
        modules[name] = (hooks, attributes, type(module), module.forward.__func__)
    registry = (dict(ALL_ATTENTION_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS._global_mapping))
    return modules, registry, model.config.to_dict(), model.generation_config.to_dict()


def logits(model, inputs):
    return run(model, inputs).logits


@pytest.mark.parametrize(("family", "method"), cells("some"))
def test_no_method_leaves_anything_behind(family, method):
    model, processor = tiny(family)
    inputs = mixed(processor, label=method)
    dense, before, methods = logits(model, inputs), snapshot(model), example(model, method)
    with vtok.patch(model, methods):
        assert snapshot(model) != before
        model.generate(**inputs, max_new_tokens=2)
    assert snapshot(model) == before
    assert torch.equal(logits(model, inputs), dense)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_remove_restores_everything(family, attention):
    model, processor = tiny(family, attention)
    inputs = mixed(processor)
    dense = logits(model, inputs)
    before = snapshot(model)
    patch = vtok.patch(model, able(family, *STACK()))
    assert snapshot(model) != before
    assert not torch.equal(logits(model, inputs), dense)
    model.generate(**inputs, max_new_tokens=2)
    patch.remove()
    patch.remove()
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[1:] == before[1:]
    assert torch.equal(logits(model, inputs), dense)
    with vtok.patch(model, able(family, *STACK())):
        pass
    assert snapshot(model) == before
    vtok.patch(model, able(family, *STACK()))
    vtok.unpatch(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("where", ["compressor", "layer", "encoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exceptions_leave_nothing_behind(family, where, monkeypatch):
    model, processor = tiny(family)
    inputs = mixed(processor)
    dense, before = logits(model, inputs), snapshot(model)
    patch = vtok.patch(model, able(family, *STACK()))
    good = logits(model, inputs)

    def boom(*args, **kwargs):
        raise RuntimeError("boom")

    targets = {
        "compressor": (vtok.Uniform, "select"),
        "layer": (type(decoder(model).layers[3].mlp), "forward"),
        "encoder": (type(encoder(model)), "forward"),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*targets[where], boom)
        with pytest.raises(RuntimeError, match="boom"):
            logits(model, inputs)
    assert torch.equal(logits(model, inputs), good)  # still patched, and still right
    text = processor.tokenizer(["no picture"], return_tensors="pt")
    assert logits(model, text).isfinite().all()
    patch.remove()
    assert snapshot(model) == before
    assert torch.equal(logits(model, inputs), dense)


def test_exception_inside_the_scope_removes_the_patch():
    model, _ = tiny("llava")
    before = snapshot(model)
    with pytest.raises(KeyError), vtok.patch(model, "uniform"):
        raise KeyError
    assert snapshot(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_garbage_collection_frees_model_and_registry(family):
    registry = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    model, processor = tiny(family)
    patch = vtok.patch(model, able(family, *STACK()))
    logits(model, mixed(processor))
    gone = weakref.ref(model.model)
    assert (dict(ALL_ATTENTION_FUNCTIONS._local_mapping) != registry) == (family in INSIDE)
    del model
    gc.collect()
    assert gone() is None  # though the handle is still here
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == registry
    assert not patch.active
    patch.remove()


def test_the_handle_may_be_dropped():
    model, processor = tiny("llava")
    inputs = mixed(processor)
    dense = logits(model, inputs)
    vtok.patch(model, STACK())
    gc.collect()
    assert not torch.equal(logits(model, inputs), dense)
    vtok.unpatch(model)
    assert torch.equal(logits(model, inputs), dense)


@pytest.mark.parametrize("family", INSIDE)
def test_two_models_do_not_know_of_each_other(family):
    registry = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    (one, processor), (two, _), (plain, _) = tiny(family), tiny(family), tiny(family)
    inputs = mixed(processor)
    dense = logits(plain, inputs)
    alone = {}
    for name, stack in (("fastv", [vtok.FastV(keep=0.3)]), ("stack", STACK())):
        with vtok.patch(one, stack):
            alone[name] = logits(one, inputs)
    first, second = vtok.patch(one, [vtok.FastV(keep=0.3)]), vtok.patch(two, STACK())
    for _ in range(2):  # interleaved
        assert torch.equal(logits(one, inputs), alone["fastv"])
        assert torch.equal(logits(two, inputs), alone["stack"])
        assert torch.equal(logits(plain, inputs), dense)
    first.remove()
    assert torch.equal(logits(two, inputs), alone["stack"])
    assert torch.equal(logits(one, inputs), dense)
    second.remove()
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == registry


def test_copying_a_patched_model_is_refused():
    model, _ = tiny("llava")
    with vtok.patch(model, "uniform"), pytest.raises(vtok.errors.PatchStateError, match="unpatch it first"):
        copy.deepcopy(model)


def test_saving_a_patched_model_saves_the_model(tmp_path):
    model, _ = tiny("llava")
    with vtok.patch(model, STACK()):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
