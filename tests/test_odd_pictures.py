"""Pictures and models of odd shape: banners, lines, 16 bits, large counts, towers that nobody described."""

import copy
import json

import numpy as np
import pytest
import torch
from contract import ADAPTERS, Entered, Masked, batch, mixed, picture, tiny
from PIL import Image
from typer.testing import CliRunner

import vtok
from vtok import adapter as adapters
from vtok import compressor as compressors
from vtok import draw, media
from vtok.adapters.llava_next import anyres_layout
from vtok.cli import app
from vtok.errors import InvalidValue, Unsupported

METHODS = [name for name, cls in compressors.load_all().items() if not cls.trained and cls.of_pictures]
COUNTED = ["aim", "aim_merge", "dart", "divprune", "fastv", "globalcom2", "pool", "random", "tcc", "tome", "uniform"]
COUNTED += ["cdpruner", "dpp", "mmtok", "scope", "visionzip", "evs", "frames", "holitom", "vidcom2"]
COUNTED += ["fastvid", "flashvid", "flashvid_merge"]
LINES = [(8, 2000), (2000, 8), (3, 900), (31, 1024)]  # of which LLaVA-NeXT's crops have no row (or column) left


def built(adapter, config, name, **options):
    """The method by name, told what it must be told where the encoder has no CLS; skips where it cannot be had."""
    cls = compressors.load_all()[name]
    for need in cls.needs & cls.optional.keys() - adapter.available(config):
        options |= cls.optional[need]
    method = compressors.build(name, **options)
    for part in method.parts():
        if lacking := part.needs_now - adapter.available(config):
            pytest.skip(f"has no {', '.join(lacking)}")
    return method


def against_the_oracle(model, inputs, method):
    with torch.no_grad(), vtok.patch(model, method) as patch, Entered(model, patch) as entered:
        pruned = model(**inputs, use_cache=True).logits  # all of it is prompt
    trace = patch.trace
    if not any(part.stage == "decode" for part in method.parts()):  # in a prefill that leaves all as it is
        with Masked(model, trace, entered.embeds), torch.no_grad():
            masked = model(**inputs).logits
        here = trace.present_at(3)
        torch.testing.assert_close(pruned[here], masked[here], atol=2e-5, rtol=2e-5)
    return trace


# ---- banners and lines ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in METHODS if "frames" not in compressors.load_all()[name].needs])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_a_picture_of_which_no_crop_is_left(family, name):
    model, processor = tiny(family)
    method = built(ADAPTERS[family], model.config, name)
    for size in LINES:
        inputs = batch(processor, ["a # What colour is it?", "two # yes"], [picture(*size), picture(70, 112, 5)])
        trace = against_the_oracle(model, inputs, method)
        assert trace.layouts[0].planes[1].size == 0 and trace.n_visual[0] == 16
        if isinstance(method, vtok.Pool | vtok.Downsample | vtok.GlobalCom2):
            assert trace.n_kept[0] == 4


def test_what_is_drawn_of_a_line():
    layout = anyres_layout(4, (1, 2), (8, 2000))
    assert [plane.size for plane in layout.planes] == [16, 0]
    seen = torch.zeros(16)
    seen[5] = 1
    item = draw.Panel("one", "1 of 16", None, layout, seen)
    assert draw.planes(item) == [0]  # the thumbnail, over the picture
    pytest.importorskip("matplotlib")
    assert draw.panels(picture(8, 400), [item]).width > 100


@pytest.mark.parametrize("size", [(8, 2000), (900, 1)])
def test_the_commands_on_a_line(tmp_path, size):
    pytest.importorskip("matplotlib")
    file = tmp_path / "line.png"
    picture(*size).save(file)
    asked = ["--image", str(file), "--question", "What?", "--methods", "pool,downsample", "--tokens", "2"]
    for command, out in (("demo", "drawn.png"), ("show", "shown")):
        result = CliRunner().invoke(app, [command, *asked, "--out", str(tmp_path / out)])
        assert result.exit_code == 0, result.output
        assert (tmp_path / out).exists()


# ---- 16 bits -------------------------------------------------------------------------------------------------------
def test_sixteen_bits_keep_their_range(tmp_path):
    eight = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(eight).save(tmp_path / "plain.png")
    with Image.open(tmp_path / "deep.png") as deep:
        assert deep.mode == "I;16"
    opened = [np.asarray(media.open_picture(tmp_path / name)) for name in ("deep.png", "plain.png")]
    assert opened[0].shape == (8, 8, 3) and np.array_equal(*opened)
    assert np.array_equal(np.asarray(media.rgb(Image.fromarray(eight.astype(np.int32) * 257)))[..., 0], eight)


def test_numbers_without_a_white_are_refused(tmp_path):
    Image.fromarray(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tif")
    with pytest.raises(InvalidValue, match="float.tif.*from -1 to 1"):
        media.open_picture(tmp_path / "float.tif")
    with pytest.raises(InvalidValue, match="what is white"):
        media.rgb(Image.fromarray(np.full((2, 2), 1 << 20, np.int32)))


# ---- counts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_which_methods_take_a_count(name):
    if name in COUNTED:
        assert compressors.build(name, keep=10_000).keep == 10_000
    else:  # they have no `keep`, or it is a share
        with pytest.raises(InvalidValue, match=r"no option keep|float|share|fraction"):
            compressors.build(name, keep=10_000)


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("family", ["llava_next", "internvl", "qwen2_5_vl"])
def test_a_count_above_what_a_picture_has_keeps_all(family, name):
    model, processor = tiny(family)
    method = built(ADAPTERS[family], model.config, name, keep=10_000)
    pictures = [picture(70, 112), picture(56, 56, 1), picture(10, 112, 2)]
    inputs = batch(processor, ["a # What?", "two # and # yes"], pictures)
    trace = against_the_oracle(model, inputs, method)
    assert trace.n_kept == trace.n_visual
    if name not in ("aim", "flashvid"):  # how many leave the decoder's layers is not `keep`'s to say
        assert trace.n_kept_at(3) == trace.n_visual


def test_a_picture_of_one_tile_is_compressed():
    """InternVL shows small pictures in one tile. Each has its own score, whatever else is in the batch."""
    model, processor = tiny("internvl")
    pictures = [picture(56, 56, 1), picture(40, 40, 2)]
    for source in ("cls_logits", "neg_cos_mean"):
        method = vtok.GlobalCom2(keep=0.25, score_source=source)
        trace = against_the_oracle(model, batch(processor, ["# a?", "b # c"], pictures), method)
        assert (trace.n_visual, trace.n_kept) == ([16, 16], [4, 4])
        alone = against_the_oracle(model, batch(processor, ["# a?"], pictures[:1]), method)
        assert torch.equal(alone.keep_masks[0], trace.keep_masks[0])


# ---- what a config may say -----------------------------------------------------------------------------------------
def varied(family, vision=None, text=None, **changes):
    """The tiny model of a family with another tower, decoder or rule, random weights, and inputs of two prompts."""
    plain, processor = tiny(family)
    config = plain.config.to_dict() | changes
    for part, new in (("vision_config", vision), ("text_config", text)):
        config[part] = config[part] | (new or {})
    torch.manual_seed(0)
    model = type(plain)(type(plain.config).from_dict(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    processor = copy.deepcopy(processor)  # shared with the other tests
    if changes.get("vision_feature_select_strategy") == "full":
        processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    return model, batch(processor, ["a # What colour?", "two # yes"], [picture(70, 112), picture(112, 56, 1)])


@pytest.fixture(scope="module")
def granite():
    """As Granite vision is made: SigLIP without CLS, four of its layers side by side, a Granite decoder."""
    vision = {"model_type": "siglip_vision_model", "num_hidden_layers": 4, "vision_use_head": False}
    text = {"model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.7}
    rule = {"vision_feature_layer": [-4, -3, -2, -1], "vision_feature_select_strategy": "full"}
    return varied("llava_next", vision, text, **rule)


@pytest.mark.parametrize("name", METHODS)
def test_features_of_several_layers(granite, name):
    model, inputs = granite
    layers = {one: {"layer": -2} for one in ("visionzip", "scope", "mmtok")}
    layers |= {"tcc": {"keep": 0.5, "low_layer": 0, "deep_layer": -2}}
    method = built(ADAPTERS["llava_next"], model.config, name, **layers.get(name, {}))
    trace = against_the_oracle(model, inputs, method)
    assert sum(trace.n_kept_at(3)) < sum(trace.n_visual) or name in ("tome", "core_neurons")
    assert trace.flops()["compressed"]["encoder"] <= trace.flops()["dense"]["encoder"]


def test_the_layer_that_the_projector_reads_is_one_or_refused(granite):
    model, inputs = granite
    with pytest.raises(Unsupported, match=r"\(-4, -3, -2, -1\) together.*name a layer"):
        vtok.patch(model, "visionzip", importance="received")
    vtok.patch(model, "tome", r=1).remove()  # it acts up to the last of them
    one, inputs = varied("llava", vision_feature_layer=[-2])
    method = vtok.VisionZip(keep=0.5)  # of a list of one there is no doubt
    assert against_the_oracle(one, inputs, method).n_kept == [8, 8]


def test_a_tower_that_nobody_described():
    vision = {"model_type": "dinov2", "mlp_ratio": 2}
    model, inputs = varied("llava", vision)
    assert against_the_oracle(model, inputs, vtok.Uniform(keep=0.25)).n_kept == [4, 4]
    trace = against_the_oracle(model, inputs, vtok.FastV(keep=0.5, layer=1))
    assert trace.mean_keep < 1 and trace.kv_bytes()["compressed"] < trace.kv_bytes()["dense"]
    with pytest.raises(Unsupported, match="FLOPs of vision towers of an unknown kind"):
        trace.flops()
    assert trace.to_dict()["flops"] is None
    for name in ("visionzip", "tcc"):
        with pytest.raises(Unsupported, match="does not have"):
            vtok.patch(model, name)
    with pytest.raises(Unsupported, match="token_blocks"):
        vtok.patch(model, "tome")
    model.config.vision_config.model_type = "pixtral"  # pictures of any size
    with pytest.raises(Unsupported, match="square views of one size"):
        vtok.patch(model, "uniform")


def test_internvl_with_another_tower():
    model, inputs = varied("internvl", {"model_type": "dinov2", "mlp_ratio": 2, "image_size": 56, "patch_size": 7})
    assert adapters.of(model.config).available(model.config).isdisjoint({"cls_attention", "encoder_keys"})
    trace = against_the_oracle(model, inputs, vtok.GlobalCom2(keep=0.25, score_source="neg_cos_mean"))
    assert sum(trace.n_kept) == sum(trace.n_visual) // 4


def test_mixtures_of_experts():
    """One whose experts can be counted, and one of a kind that is not known."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    flops = []
    for text in ({"model_type": "mixtral", **experts}, {"model_type": "olmoe", "num_experts": 4, **experts}):
        model, inputs = varied("llava", text=text)
        trace = against_the_oracle(model, inputs, vtok.FastV(keep=0.5, layer=1))
        assert trace.kv_bytes()["compressed"] < trace.kv_bytes()["dense"]
        flops.append(trace.to_dict()["flops"])
        with pytest.raises(Unsupported, match="core_neurons"):  # there are no neurons of a layer
            vtok.patch(model, "core_neurons")
    with pytest.raises(Unsupported, match="FFN is of a kind"):
        trace.flops()
    assert flops[1] is None and flops[0]["compressed"]["prefill"] < flops[0]["dense"]["prefill"]


@pytest.mark.parametrize("family", ADAPTERS)
def test_an_adapter_answers_from_a_config_alone(family):
    model, processor = tiny(family)
    inputs = mixed(processor)
    config = type(model.config).from_dict(json.loads(model.config.to_json_string()))  # as read from a file
    token = model.config.image_token_id
    del model
    adapter = adapters.of(config)
    assert adapter.family == family
    adapter.check(config)
    assert adapter.available(config) <= adapter.provides
    tower, shape = adapter.tower(config), adapter.tower(config).shape()
    assert (shape.hidden, shape.merge, shape.cls_tokens) == (tower.width, tower.merge, tower.skip)
    layouts = adapter.layouts(config, "image", inputs)
    assert sum(layout.n_rows for layout in layouts) == (inputs["input_ids"] == token).sum()
