"""The handle: swap, paused, using, save and load; what is not a model or a method; what does not survive a patch."""

import pickle

import pytest
import torch
from contract import batch, mixed, picture, tiny

import vtok
from vtok.engine.cache import cache_in
from vtok.errors import InvalidValue, PatchStateError, Unsupported


def logits(model, inputs, **extra):
    with torch.no_grad():
        return model(**inputs, **{"use_cache": True, **extra}).logits


def test_swap():
    model, processor = tiny("llava")
    inputs = mixed(processor)
    dense = logits(model, inputs)
    with vtok.patch(model, "uniform", keep=0.25):
        want = logits(model, inputs)
    with vtok.patch(model, "fastv", keep=0.5) as patch:
        logits(model, inputs)
        assert patch.swap("uniform", keep=0.25) is patch
        assert not hasattr(patch, "trace")  # of the former method
        assert torch.equal(logits(model, inputs), want)
        with pytest.raises(Unsupported, match="needs crops"):
            patch.swap("globalcom2")
        with pytest.raises(InvalidValue):
            patch.swap("uniform", keep=0)
        assert torch.equal(logits(model, inputs), want)  # the former goes on
        assert "Uniform(keep=0.25" in repr(patch)
    assert torch.equal(logits(model, inputs), dense)
    with pytest.raises(PatchStateError, match="removed"):
        patch.swap("uniform")


@pytest.mark.parametrize("method", ["uniform", "fastv", "tome", "downsample"])
def test_paused(method):
    model, processor = tiny("llava")
    inputs = mixed(processor)
    dense = logits(model, inputs)
    parts = vtok.ToMe(r=3, carry=True) if method == "tome" else method
    with vtok.patch(model, parts) as patch:
        want = logits(model, inputs)
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        with patch.paused() as same:
            assert same is patch
            assert torch.equal(logits(model, inputs), dense)
            assert patch.trace.mean_keep == 1
            step = {"input_ids": out.sequences[:, -1:], "position_ids": torch.full((5, 1), 30)}
            paused = logits(model, step, past_key_values=cache_in(out))
            cache_in(out).crop(-1)
        assert torch.equal(logits(model, step, past_key_values=cache_in(out)), paused)  # a conversation goes on
        assert torch.equal(logits(model, inputs), want)


def test_using():
    model, processor = tiny("llava")
    inputs = mixed(processor)
    with vtok.patch(model, "uniform", keep=0.25):
        quarter = logits(model, inputs)
    with vtok.patch(model, "uniform", keep=0.5) as patch:
        half = logits(model, inputs)
        with patch.using(keep=0.25):
            assert torch.equal(logits(model, inputs), quarter)
        with patch.using(keep=[0.25, 1.0, 2, 0.5, 16]):
            logits(model, inputs)
            assert patch.trace.n_kept == [4, 16, 2, 8, 16]
            with pytest.raises(InvalidValue, match="5 values, and this call has 1 pictures"):
                logits(model, batch(processor, ["# yes"], [picture(56, 56)]))
        assert torch.equal(logits(model, inputs), half)
        for wrong in ({"keep": 0}, {"layer": 2}, {}, {"keep": []}):
            with pytest.raises(InvalidValue), patch.using(**wrong):
                pass
    with vtok.patch(model, [vtok.Uniform(keep=0.5), vtok.FastV(keep=0.5)]) as patch:
        with pytest.raises(InvalidValue, match="one of: uniform, fastv"), patch.using(keep=0.1):
            pass
        with patch.using("fastv", keep=0.25):
            logits(model, inputs)
        assert patch.trace.per_sample(patch.trace.n_kept_at(3)) == [2, 4, 0, 2, 2]
        with pytest.raises(Unsupported, match="before the language model"), patch.using("fastv", keep=[0.1, 0.2]):
            pass
    with vtok.patch(model, "fastv", keep=1.0) as patch, pytest.raises(Unsupported, match="swap"), patch.using(keep=0.5):
        pass


def test_a_choice_is_a_file(tmp_path):
    model, processor = tiny("llava")
    inputs = mixed(processor)
    parts = [vtok.VisionZip(keep=0.5, importance="received"), vtok.Schedule(rates=(1, 0.5, 0.5, 0.25))]
    with vtok.patch(model, parts) as patch:
        want = logits(model, inputs)
        patch.save(tmp_path / "vtok.json")
    assert vtok.load(tmp_path / "vtok.json") == parts
    for given in ({"method": vtok.load(tmp_path / "vtok.json")}, {"config": tmp_path / "vtok.json"}):
        with vtok.patch(model, **given):
            assert torch.equal(logits(model, inputs), want)
    with pytest.raises(InvalidValue, match="says all"):
        vtok.patch(model, "uniform", config=tmp_path / "vtok.json")
    (tmp_path / "bad.json").write_text("{")
    for file, complaint in (("bad.json", "no JSON"), ("none.json", "cannot be read")):
        with pytest.raises(InvalidValue, match=complaint):
            vtok.patch(model, config=tmp_path / file)
    with pytest.raises(InvalidValue, match="names none"):
        vtok.load({"method": "uniform"})
    with pytest.raises(vtok.VtokError, match="no option layr"):
        vtok.load({"compressors": [{"name": "fastv", "layr": 2}]})


def test_what_is_no_model_and_no_method():
    model, _ = tiny("llava")

    class Pipeline:
        pass

    pipeline = Pipeline()
    pipeline.model = model
    for call, complaint in (
        (lambda: vtok.patch("llava-hf/llava-1.5-7b-hf"), "not its name"),
        (lambda: vtok.patch(pipeline), r"pass its \.model"),
        (lambda: vtok.patch(3), "not a int"),
        (lambda: vtok.patch(model, 0.25), "keep=0.25"),
        (lambda: vtok.patch(model, vtok.DivPrune), r"DivPrune\(\.\.\.\), not the class"),
    ):
        with pytest.raises(InvalidValue, match=complaint):
            call()
    with vtok.patch(model) as patch:
        assert not hasattr(patch, "trace")


def test_the_handle_says_what_was_saved():
    model, processor = tiny("llava")
    with vtok.patch(model, "uniform", keep=0.25) as patch:
        assert "no picture yet" in repr(patch)
        logits(model, batch(processor, ["# yes"], [picture(56, 56)]))
        assert "25.0% of 16 visual tokens" in repr(patch)
        assert "of the FLOPs" in repr(patch)
        assert "25.0% of 16 visual tokens" in patch._repr_html_()
        logits(model, processor.tokenizer(["no picture"], return_tensors="pt"))
        assert patch.trace.n_visual == []  # not the last picture's
        assert patch.trace.counts()["dense"] == patch.trace.counts()["compressed"]


def test_bytes_follow_the_dtype_of_the_forward():
    model, processor = tiny("llava")
    inputs = batch(processor, ["# yes"], [picture(56, 56)])
    with vtok.patch(model, "uniform", keep=0.25) as patch:
        logits(model, inputs)
        full = patch.trace.kv_bytes()["compressed"]
        model.bfloat16()
        with torch.no_grad():
            inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
            cache = cache_in(model(**inputs, use_cache=True))
        assert patch.trace.kv_bytes()["compressed"] * 2 == full
        assert sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) * 2 == full


@pytest.mark.parametrize("method", ["uniform", "fastv"])
def test_a_patched_model_is_not_pickled(method, tmp_path):
    model, _ = tiny("llava")
    with vtok.patch(model, method):
        for save in (pickle.dumps, lambda m: torch.save(m, tmp_path / "model.pt")):
            with pytest.raises(PatchStateError, match="unpatch it first"):
                save(model)
    pickle.dumps(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_does_not_outlive_its_patch(side):
    model, processor = tiny("llava")
    inputs = mixed(processor, side)
    with vtok.patch(model, "uniform", keep=0.25):
        cache = cache_in(model(**inputs, use_cache=True))
    length = inputs["input_ids"].shape[1]
    step = {"input_ids": torch.full((5, 1), 40), "position_ids": torch.full((5, 1), length)}
    with pytest.raises(PatchStateError, match="not patched"):
        logits(model, step, past_key_values=cache)
    with vtok.patch(model, "uniform", keep=0.25):
        logits(model, step, past_key_values=cache)  # an equal patch goes on


@pytest.mark.parametrize("where", ["model", "core", "decoder", "module"])
def test_a_forward_compiled_before_the_patch_is_refused(where):
    model, _ = tiny("llava")
    target = {"model": model, "core": model.model}.get(where, model.model.language_model)
    if where == "module":
        model.model.language_model = torch.compile(target, backend="eager")
    else:
        target.forward = torch.compile(target.forward, backend="eager")
    with pytest.raises(PatchStateError, match="Patch first, then"):
        vtok.patch(model, "uniform")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("method", ["uniform", "fastv"])
def test_a_spread_model_generates(family, method):
    """accelerate rebuilds the encoder's output when it moves tensors between modules."""
    accelerate = pytest.importorskip("accelerate")
    model, processor = tiny(family)
    inputs = mixed(processor)
    options = {"max_new_tokens": 3, "do_sample": False}
    with vtok.patch(model, method, keep=0.5):
        want = model.generate(**inputs, **options)
        beams = model.generate(**inputs, **options, num_beams=2)
    parts = {name: "cpu" for name, _ in model.model.named_children()}
    places = {**{f"model.{name}": place for name, place in parts.items()}, "lm_head": "cpu"}
    spread = accelerate.dispatch_model(model, places, force_hooks=True)
    with vtok.patch(spread, method, keep=0.5) as patch:
        assert torch.equal(spread.generate(**inputs, **options), want)
        assert patch.trace.mean_keep < 1
        assert torch.equal(spread.generate(**inputs, **options, num_beams=2), beams)


def test_windows_are_seen_whatever_field_gives_them():
    from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig

    model, _ = tiny("llava")
    text = {k: v for k, v in model.config.text_config.to_dict().items() if k not in ("model_type", "architectures")}
    for window, refused in ((8, True), (None, False)):
        config = LlavaConfig(
            vision_config=model.config.vision_config, text_config=MistralConfig(**text, sliding_window=window)
        )
        mistral = LlavaForConditionalGeneration(config)
        if refused:
            with pytest.raises(Unsupported, match="sliding-window"):
                vtok.patch(mistral, "uniform")
        else:
            vtok.patch(mistral, "uniform").remove()


def test_attention_that_bypasses_the_registry_is_refused_when_patching():
    model, _ = tiny("llava")

    class Own(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    layers = model.model.language_model.layers
    layers[0].self_attn = Own()
    for method in ("fastv", "core_neurons"):
        with pytest.raises(Unsupported, match=r"LlamaDecoderLayer does not show its attention.*divprune"):
            vtok.patch(model, method)
    vtok.patch(model, "uniform").remove()


def test_layers_that_hand_no_keywords_on_are_refused_when_patching():
    from transformers import LlavaConfig, LlavaForConditionalGeneration, StableLmConfig

    model, _ = tiny("llava")
    text = {k: v for k, v in model.config.text_config.to_dict().items() if k not in ("model_type", "architectures")}
    config = LlavaConfig(vision_config=model.config.vision_config, text_config=StableLmConfig(**text))
    stablelm = LlavaForConditionalGeneration(config)
    for method in ("fastv", "core_neurons"):
        with pytest.raises(Unsupported, match="StableLmDecoderLayer does not show its attention"):
            vtok.patch(stablelm, method)
    vtok.patch(stablelm, "uniform").remove()
