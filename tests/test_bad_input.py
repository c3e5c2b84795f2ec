"""Everything wrong gets one clear error, or the dense result where nothing needs compressing; nothing is lost."""

import math

import pytest
import torch
from contract import FAMILIES, able, batch, mixed, picture, placeholder_ids, tiny
from PIL import Image
from transformers import DynamicCache, StaticCache

import vtok
from vtok.errors import InvalidValue, PatchStateError, UnknownName, Unsupported


def logits(model, inputs, **extra):
    with torch.no_grad():
        return model(**inputs, **{"use_cache": True, **extra}).logits


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, False, None, "half"])
@pytest.mark.parametrize("method", ["uniform", "fastv", "globalcom2", "downsample", "pool", "aim_merge"])
def test_keep_out_of_range(method, keep):
    model, _ = tiny("llava_next")
    with pytest.raises(ValueError, match=r"keep must be a float in \(0, 1\]"):
        vtok.patch(model, method, keep=keep)
    vtok.patch(model, "uniform").remove()  # the model was left unpatched


@pytest.mark.parametrize("budget", [0, 2, -1.0, math.nan, True])
def test_budget_out_of_range(budget):
    model, _ = tiny("llava")
    with pytest.raises(InvalidValue, match="budget must be a fraction"):
        vtok.patch(model, "uniform", budget=budget)


def test_budget_and_keep():
    model, _ = tiny("llava")
    with pytest.raises(InvalidValue, match="not both"):
        vtok.patch(model, "uniform", keep=0.5, budget=0.5)
    with pytest.raises(InvalidValue, match="cannot be met"):
        vtok.patch(model, "fastv", budget=0.1)


@pytest.mark.parametrize("method", ["uniform", "pool", "fastv", "aim", "aim_merge"])
def test_budget_is_met(method):
    model, processor = tiny("llava_next")
    with vtok.patch(model, method, budget=0.4) as patch:
        logits(model, batch(processor, ["# what?", "and # this"], [picture(112, 112), picture(56, 112)]))
        assert 0.2 < patch.trace.mean_keep <= 0.4


def test_unknown_names():
    model, _ = tiny("llava")
    with pytest.raises(UnknownName, match="aim.*fastv.*uniform"):
        vtok.patch(model, "no-such-method")
    with pytest.raises(InvalidValue, match="no option kep.*keep"):
        vtok.patch(model, "uniform", kep=0.5)
    with pytest.raises(InvalidValue, match="name or a compressor object"):
        vtok.patch(model, [3])
    with pytest.raises(InvalidValue, match="No compressor"):
        vtok.patch(model, [])
    with pytest.raises(InvalidValue, match="set them on the objects"):
        vtok.patch(model, vtok.Uniform(), keep=0.5)
    assert "globalcom2" in vtok.available()["compressors"]
    with pytest.raises(AttributeError, match="NoSuchThing"):
        vtok.NoSuchThing  # noqa: B018


def test_the_window_of_transformers_versions():
    from importlib.metadata import requires

    from vtok.patching import TRANSFORMERS, _check_transformers

    low, high = (".".join(map(str, end)) for end in TRANSFORMERS)
    assert any(r.startswith("transformers") and f">={low}" in r and f"<{high}" in r for r in requires("vtok"))
    _check_transformers(f"{low}.0")
    for version in ("4.57.1", f"{high}.0", "5.18.3.dev0"):
        with pytest.raises(Unsupported, match="outside the tested window"):
            _check_transformers(version)


def test_unsupported_models():
    with pytest.raises(Unsupported, match="Supported families: .*llava.*qwen2_5_vl"):
        vtok.patch(torch.nn.Linear(2, 2), "uniform")
    model, _ = tiny("llava")
    with pytest.raises(Unsupported, match="ForConditionalGeneration"):
        vtok.patch(model.model, "uniform")


def test_refused_at_patch_time():
    model, _ = tiny("llava")
    qwen, _ = tiny("qwen2_5_vl")
    for vlm in (model, qwen):
        with pytest.raises(Unsupported, match="globalcom2 needs"):
            vtok.patch(vlm, "globalcom2")
    with pytest.raises(Unsupported, match="At most one compressor a stage: uniform, random"):
        vtok.patch(model, ["uniform", "random"])

    class Odd(vtok.Uniform):
        stage = "projector"

    with pytest.raises(Unsupported, match="no stage 'projector'"):
        vtok.patch(model, Odd())
    vtok.patch(model, "uniform").remove()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("siglip default", "must be the patches alone"),
        ("clip full", "must be the patches alone"),
        ("sliding", "sliding-window"),
    ],
)
def test_variants_of_a_family(change, why):
    model, _ = tiny("llava")
    if change == "clip full":
        model.config.vision_feature_select_strategy = "full"
    elif change == "sliding":
        model.config.text_config.layer_types = ["sliding_attention"] * 4
        model.config.text_config.sliding_window = 8
    else:
        model.config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(Unsupported, match=why):
        vtok.patch(model, "uniform")


def test_patch_states():
    model, _ = tiny("llava")
    with pytest.raises(PatchStateError, match="not patched"):
        vtok.unpatch(model)
    patch = vtok.patch(model, "uniform")
    with pytest.raises(PatchStateError, match="already patched: .*Uniform"):
        vtok.patch(model, "random")
    with pytest.raises(PatchStateError, match="run the patched model"):
        patch.trace  # noqa: B018
    patch.remove()
    assert "removed" in repr(patch)
    with pytest.raises(PatchStateError, match="Patch first, then torch.compile"):
        vtok.patch(torch.compile(model, backend="eager"), "uniform")
    model.compile(backend="eager")
    with pytest.raises(PatchStateError, match="Patch first"):
        vtok.patch(model, "uniform")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_picture_in_the_batch(family):
    model, processor = tiny(family)
    inputs = processor.tokenizer(["no picture", "none here either"], return_tensors="pt", padding=True)
    dense, tokens = logits(model, inputs), model.generate(**inputs, max_new_tokens=3)
    with vtok.patch(model, able(family, vtok.Downsample(), vtok.Uniform(), vtok.FastV())):
        assert torch.equal(logits(model, inputs), dense)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3), tokens)


@pytest.mark.parametrize("method", ["uniform", "pool", "fastv", "aim", "downsample", "random"])
def test_a_picture_of_one_row_of_patches(method):
    model, processor = tiny("qwen2_5_vl")
    inputs = batch(processor, ["# one row", "# one token"], [picture(28, 140), picture(28, 28)])
    with vtok.patch(model, method, keep=0.3) as patch:
        assert logits(model, inputs).isfinite().all()
        assert patch.trace.n_visual == [5, 1]
        assert patch.trace.n_kept[1] == 1


@pytest.mark.parametrize("method", ["uniform", "pool", "fastv", "aim", "globalcom2", "downsample"])
def test_nan_features_stay_in_their_sample(method):
    model, processor = tiny("llava_next")
    inputs = batch(processor, ["# broken", "# whole"], [picture(56, 112), picture(112, 56)])
    with vtok.patch(model, method):
        whole = logits(model, inputs)
        inputs["pixel_values"][0] = torch.nan
        broken = logits(model, inputs)
    torch.testing.assert_close(broken[1], whole[1])
    assert broken[0, -1].isnan().any()  # said by the numbers, not hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_more_pictures_than_placeholders(family):
    model, processor = tiny(family)
    inputs = batch(processor, ["# and #"], [picture(56, 56), picture(56, 56)])
    token = placeholder_ids(model)[0]
    first = int((inputs["input_ids"][0] == token).nonzero()[0])
    for dropped in (1, 2):
        broken = dict(inputs)
        broken["input_ids"] = inputs["input_ids"].clone()
        broken["input_ids"][0, first : first + dropped] = 40
        with vtok.patch(model, "uniform"), pytest.raises(ValueError, match="do not match"):
            logits(model, broken)
    assert logits(model, inputs).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_would_be_silently_wrong_is_refused(family):
    model, processor = tiny(family)
    inputs = mixed(processor)
    b, s = inputs["input_ids"].shape
    with vtok.patch(model, able(family, vtok.Uniform(), vtok.FastV())):
        good = logits(model, inputs)
        with pytest.raises(Unsupported, match="prepared attention mask"):
            logits(model, {**inputs, "attention_mask": torch.zeros(b, 1, s, s)})
        static = StaticCache(config=model.config.get_text_config(), max_cache_len=256)
        with pytest.raises(Unsupported, match="StaticCache"):
            logits(model, inputs, past_key_values=static)
        with pytest.raises(Unsupported, match=r"prepared attention mask|StaticCache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(Unsupported, match="prefill_chunk_size"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)
        with pytest.raises(Unsupported, match="output_attentions"):
            logits(model, inputs, output_attentions=True)
        packed = torch.cat([torch.arange(s // 2), torch.arange(s - s // 2)]).expand(b, s)
        position_ids = packed.expand(4, b, s) if family.startswith("qwen") else packed
        rest = {k: v for k, v in inputs.items() if k != "attention_mask"}
        with pytest.raises(Unsupported, match="Packed sequences"):
            logits(model, rest, position_ids=position_ids, use_cache=False)
        assert torch.equal(logits(model, inputs), good)


def test_a_cache_of_another_patch_is_refused():
    model, processor = tiny("llava")
    inputs = batch(processor, ["# what?"], [picture(56, 56)])
    with torch.no_grad():
        with vtok.patch(model, "fastv"):
            cache = model(**inputs, past_key_values=DynamicCache(config=model.config)).past_key_values
        with vtok.patch(model, "uniform"), pytest.raises(PatchStateError, match="another patch"):
            model(input_ids=torch.tensor([[40]]), past_key_values=cache)
        more = batch(processor, ["# again"], [picture(56, 56)])
        more["attention_mask"] = torch.ones(1, cache.get_seq_length() + more["input_ids"].shape[1])
        for method in ("uniform", vtok.FastV(layer=1)):
            with vtok.patch(model, method), pytest.raises(PatchStateError, match="another patch"):
                model(**more, past_key_values=cache)


def test_corrupted_and_missing_pictures(tmp_path):
    """Opening them is the caller's; nothing of it reaches the model."""
    from typer.testing import CliRunner

    from vtok.cli import app

    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    truncated = (tmp_path / "good.png").read_bytes()[:40]
    (tmp_path / "cut.png").write_bytes(truncated)
    for name in ("bad.png", "cut.png", "missing.png"):
        result = CliRunner().invoke(app, ["demo", "--image", str(tmp_path / name), "--question", "What?"])
        assert result.exit_code == 2
        assert name in result.output.replace("\n", "")
        assert "Traceback" not in result.output
