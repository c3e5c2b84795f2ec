"""Contracts 9 and 11: gradients, checkpointing, PEFT, bf16; and a selection that depends on the prompt alone."""

import pytest
import torch
from contract import (
    ADAPTERS,
    INSIDE,
    Entered,
    cells,
    decoder,
    drops,
    example,
    masks,
    matrix,
    mixed,
    noise,
    oracle,
    placeholder_ids,
    run,
    tiny,
    trains,
)

import vtok
import vtok.errors

CELLS = cells("some", trains)
ORACLE = cells("some", lambda parts: masks(parts) and drops(parts))


def constant(parts):
    """Features are merged or made anew, or pictures shrunk: the oracle gets them as constants, and knows no gradient
    before them."""
    return any(part.stage in ("pixels", "patches", "blocks") or getattr(part, "merges", False) for part in parts)


PROMPTS = ["a # What colour is it?", "two # and # yes", "no picture at all", "last 0 1 2 #"]
SIZES = [(70, 112), (56, 56), (112, 70), (56, 140)]


def prompts(processor, method=""):
    return noise(processor, PROMPTS, SIZES, label=method)


def with_completion(inputs, completion):
    """Prompt and completion in one row each, as a trainer passes them, and labels on the completion."""
    ones = torch.ones_like(completion)
    inputs = dict(inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completion], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
    for name in {"mm_token_type_ids", "token_type_ids"} & inputs.keys():
        inputs[name] = torch.cat([inputs[name], 0 * ones], 1)
    labels = inputs["input_ids"].clone()
    labels[:, : -completion.shape[1]] = -100
    return inputs, labels


@pytest.mark.parametrize(("family", "method"), ORACLE)
def test_loss_and_gradients(family, method):
    """The loss and every gradient are those of the unpatched model with the dropped columns masked."""
    model, processor = tiny(family)
    inputs, labels = with_completion(prompts(processor, method), torch.tensor([[40, 50, 60]]).repeat(4, 1))
    parts = example(model, method)
    own = model.model.get_submodule(ADAPTERS[family].projector)
    projector = parts[0].weights if parts[0].trained else own
    watched = {
        "embeddings": model.get_input_embeddings().weight,
        "projector": list(projector.parameters())[-1],
        "layer 3": decoder(model).layers[3].mlp.down_proj.weight,
        "head": model.lm_head.weight,
    }

    def grads(loss):
        for weight in watched.values():
            weight.grad = None
        loss.backward()
        return {name: weight.grad.clone() for name, weight in watched.items() if weight.grad is not None}

    with vtok.patch(model, parts) as patch, Entered(model, patch) as entered:
        output = model(**inputs, labels=labels)
        pruned = grads(output.loss)
    assert sum(patch.trace.n_kept_at(3)) < sum(patch.trace.n_visual)
    assert pruned.keys() == watched.keys()
    assert all(grad.abs().sum() > 0 for grad in pruned.values())
    fixed = constant(parts)
    with oracle(model, patch.trace, entered.embeds if fixed else None):
        masked_output = model(**inputs, labels=labels)
        masked = grads(masked_output.loss)
    torch.testing.assert_close(output.loss, masked_output.loss, atol=1e-5, rtol=1e-5)
    assert masked.keys() == (watched.keys() - {"embeddings", "projector"} if fixed else watched.keys())
    for name in masked:
        torch.testing.assert_close(pruned[name], masked[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_gradient_checkpointing(family, method):
    model, processor = tiny(family)
    inputs, labels = with_completion(prompts(processor, method), torch.tensor([[40, 50, 60]]).repeat(4, 1))
    weight = decoder(model).layers[0].mlp.down_proj.weight
    model.train()
    grads = []
    with vtok.patch(model, example(model, method)):
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            model(**inputs, labels=labels).loss.backward()
            grads.append(weight.grad.clone())
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


# of the second order, which meets the same code, one family an example
ORDERS = [(*cell.values, "peft first") for cell in CELLS] + [
    (*cell.values, "patch first") for cell in cells("each", trains)
]


@pytest.mark.parametrize(("family", "method", "order"), ORDERS)
def test_peft(family, method, order):
    from peft import LoraConfig, get_peft_model

    model, processor = tiny(family)
    inputs, labels = with_completion(prompts(processor, method), torch.tensor([[40, 50, 60]]).repeat(4, 1))
    lora = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2, init_lora_weights=False)
    parts = example(model, method)
    if order == "patch first":
        patch = vtok.patch(model, parts)
        wrapped = get_peft_model(model, lora)
    else:
        wrapped = get_peft_model(model, lora)
        patch = vtok.patch(wrapped, parts)
    output = wrapped(**inputs, labels=labels)
    output.loss.backward()
    grads = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)
    assert drops(matrix()[family, method]) == (sum(patch.trace.n_kept_at(3)) < sum(patch.trace.n_visual))
    wrapped.generate(**prompts(processor, method), max_new_tokens=2)
    vtok.unpatch(wrapped)
    assert not patch.active


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_bfloat16(family, method):
    """As many tokens are kept, and rounding hurts no more than it hurts the dense model."""
    model, processor = tiny(family)
    inputs = prompts(processor, method)
    methods = example(model, method)
    dense = run(model, inputs).logits
    with vtok.patch(model, methods) as patch:
        exact, kept = run(model, inputs).logits, patch.trace.per_sample(patch.trace.n_kept_at(3))
    model = model.to(torch.bfloat16)
    dense_error = (run(model, inputs).logits - dense).norm() / dense.norm()
    with torch.no_grad(), vtok.patch(model, methods) as patch:
        logits = run(model, inputs).logits
        assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    if not any(part.adaptive for part in patch.compressors):  # such a count is a matter of rounding
        assert patch.trace.per_sample(patch.trace.n_kept_at(3)) == kept
    if family in INSIDE:  # else some layers hold fewer columns, or none
        assert patch.trace.kv_bytes()["dense"] * 2 == sum(
            sum(sample) * 2 * 32 * 4 for sample in patch.trace.counts()["dense"]
        )
    if method == "uniform":  # the content cannot change what is kept
        assert (logits - exact).norm() / exact.norm() < 1.5 * dense_error


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_rollout_and_training_agree(family, method):
    """Contract 11: log-probabilities of sampled tokens, in `generate` and in TRL's training forward, to 1e-5."""
    from trl.trainer.utils import add_fused_lm_head

    model, processor = tiny(family)
    with vtok.patch(model, example(model, method)) as patch:
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        inputs = prompts(processor, method)
        torch.manual_seed(0)
        rollout = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=True,
            top_k=0,
            output_logits=True,
            return_dict_in_generate=True,
            suppress_tokens=placeholder_ids(model),
        )
        kept = patch.trace.positions_at(3)
        completion = rollout.sequences[:, inputs["input_ids"].shape[1] :]
        sampled = torch.stack(rollout.logits, 1).float().log_softmax(-1).gather(-1, completion[..., None]).squeeze(-1)
        full, labels = with_completion(inputs, completion)
        with torch.no_grad():
            trained = model(**full, labels=labels, fused_lm_head=True).log_probs[:, -completion.shape[1] :]
        kept_in_training = patch.trace.positions_at(3)
    prompt = inputs["input_ids"].shape[1]
    for a, b in zip(kept, kept_in_training):
        assert torch.equal(a, b[b < prompt])
    torch.testing.assert_close(sampled, trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_generate_without_a_cache(family, method):
    """The grown sequence is run again at each step, and keeps what the prompt kept."""
    model, processor = tiny(family)
    inputs = prompts(processor, method)
    with vtok.patch(model, example(model, method)):
        cached = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        again = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)


def test_a_training_forward_without_labels_is_refused_where_the_text_matters():
    model, processor = tiny("llava")
    inputs = mixed(processor)
    model.train()
    with vtok.patch(model, [vtok.FastV()]), pytest.raises(vtok.errors.Unsupported, match="after_visual"):
        model(**inputs)
    with vtok.patch(model, [vtok.FastV(anchor="after_visual")]):
        model(**inputs).logits.sum().backward()
    with vtok.patch(model, [vtok.Uniform()]):
        model(**inputs).logits.sum().backward()


def test_anchors():
    """Where the prompt ends: at its last token; before the first label; at the first text after the pictures."""
    model, processor = tiny("llava")
    inputs, labels = with_completion(prompts(processor), torch.tensor([[40, 50, 60]]).repeat(4, 1))
    seen = {}

    class Spy(vtok.FastV):
        def score(self, attention):
            seen["anchor"] = attention.anchor
            return super().score(attention)

    with torch.no_grad():
        with vtok.patch(model, [Spy()]):
            model(**inputs, labels=labels)
            length = inputs["input_ids"].shape[1]
            assert seen["anchor"].tolist() == [length - 4] * 4
            run(model, inputs)
            assert seen["anchor"].tolist() == [length - 1] * 4
        with vtok.patch(model, [Spy(anchor="after_visual")]):
            model(**inputs)
            image = inputs["input_ids"] == model.config.image_token_id
            expected = [int(row.nonzero()[-1]) + 1 if row.any() else length - 1 for row in image]
            assert seen["anchor"].tolist() == expected
