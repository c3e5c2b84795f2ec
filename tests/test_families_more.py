"""SmolVLM, GLM-V, Qwen3.5 and Gemma 3: layouts against transformers' own packing, the other classes of a family, clips,
what they cost, what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
import transformers as T
from contract import ADAPTERS, Entered, Masked, batch, mixed, oracle, picture, run, tiny
from torch.utils.flop_counter import FlopCounterMode

import vtok
from vtok import adapter as adapters
from vtok.adapters.internvl import tiled
from vtok.engine import accounting
from vtok.engine.accounting import TextShape, decode_flops, encoder_flops, kv_bytes, layer_flops
from vtok.errors import Unsupported


def agrees(model, inputs, method, **extra):
    """The trace of a patched run, whose logits are those of the oracle."""
    with vtok.patch(model, method, **extra) as patch, Entered(model, patch) as entered:
        pruned = run(model, inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    trace, present = patch.trace, patch.trace.present_at(3)
    with oracle(model, trace, entered.embeds):
        torch.testing.assert_close(pruned[present], run(model, inputs).logits[present], atol=1e-5, rtol=1e-5)
        assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=3, do_sample=False))
    return trace


def louder(model):
    """With weights that let logits depend on the context."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.generation_config.suppress_tokens = [model.config.image_token_id]
    return model.eval()


def same_sizes(family, config_class, **text):
    """A model of another class of the family, with the sizes of the tiny one."""
    small = ADAPTERS[family].tiny()[0].config.to_dict()
    for part in ("text_config", "vision_config"):
        if part == "vision_config" or small[part]["model_type"].startswith(family):  # and not another's decoder
            del small[part]["model_type"]
    small["text_config"] |= text
    for name in ("model_type", "architectures", "transformers_version"):
        small.pop(name, None)
    torch.manual_seed(3)
    return louder(T.AutoModelForImageTextToText.from_config(config_class(**small)))


# ---- SmolVLM -----------------------------------------------------------------------------------------------------
def cut_finer(processor, tiles):
    processor.image_processor.size = {"longest_edge": 42 * tiles}
    return processor


def test_tiles_lie_as_the_processor_says():
    model, processor = ADAPTERS["smolvlm"].tiny()
    cut_finer(processor, 4)
    sizes = [(84, 84), (30, 84), (84, 30), (20, 100), (100, 20), (60, 84)]
    pictures = [picture(*size, i) for i, size in enumerate(sizes)]
    told = processor.image_processor([pictures], return_row_col_info=True)
    grids = list(zip(told["rows"][0], told["cols"][0]))
    assert {(4, 4), (4, 1), (1, 4), (2, 4), (3, 4)} <= {*map(tuple, grids)}
    inputs = batch(processor, ["a # b ##", "# and # yes", "none", "#"], pictures)
    with vtok.patch(model.eval(), "uniform", keep=0.5) as patch:
        run(model, inputs)
        assert [layout.planes[0].crop_grid for layout in patch.trace.layouts] == grids
        assert patch.trace.samples == (0, 0, 0, 1, 1, 3)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        run(model, {k: v for k, v in inputs.items() if k != "input_ids"} | {"inputs_embeds": embeds})
        assert [layout.planes[0].crop_grid for layout in patch.trace.layouts] == grids
        whole = batch(processor, ["# ##"], pictures[:3], do_image_splitting=False)  # as the frames of a clip
        run(model, whole)
        assert patch.trace.n_visual == [9, 9, 9] and len(patch.trace.layouts[0].planes) == 1


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (3, 2)])
def test_pixel_shuffle_is_transformers_own(grid):
    core = tiny("smolvlm")[0].model
    rows, cols = grid[0] * 6, grid[1] * 6  # patches
    place = torch.arange(rows * cols, dtype=torch.float).view(rows, cols)
    tiles = place.view(grid[0], 6, grid[1], 6).transpose(1, 2).reshape(-1, 36, 1)
    tiles = torch.cat([tiles, torch.full((1, 36, 1), -1.0)])  # the whole picture comes last
    packed = core.connector.pixel_shuffle(tiles, 2).flatten(0, 1)  # [placeholders, 4]
    layout = tiled(3, grid)
    tokens, crops = packed[layout.place], layout.planes[0]
    assert layout.n_rows == len(packed) and (tokens[layout.starts[1] :] == -1).all()
    for i, (y, x) in enumerate(itertools.product(range(crops.rows), range(crops.cols))):
        block = place[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert sorted(tokens[i].tolist()) == sorted(block.flatten().tolist())


def test_a_prompt_without_row_ends_is_refused():
    model, processor = ADAPTERS["smolvlm"].tiny()
    inputs = batch(cut_finer(processor, 3), ["# yes"], [picture(84, 84)])
    newline = processor.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    first = (inputs["input_ids"][0] == newline).nonzero()[0]
    fake = processor.tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
    inputs["input_ids"][0, first] = fake
    with vtok.patch(model, "uniform"), pytest.raises(Unsupported, match="how the 9 tiles of a picture lie"):
        run(model, inputs)


@pytest.mark.parametrize("method", ["uniform", "downsample", "fastv"])
def test_idefics3(method):
    model = same_sizes("smolvlm", T.Idefics3Config)
    assert type(model) is T.Idefics3ForConditionalGeneration
    trace = agrees(model, mixed(tiny("smolvlm")[1]), method)
    assert sum(trace.n_kept_at(3)) < sum(trace.n_visual) == 4 * 45 + 27


# ---- GLM-V -------------------------------------------------------------------------------------------------------
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}


@pytest.mark.parametrize("config", [T.Glm46VConfig, T.Glm4vMoeConfig])
def test_later_glms(config):
    model = same_sizes("glm4v", config, **(EXPERTS if config is T.Glm4vMoeConfig else {}))
    agrees(model, mixed(tiny("glm4v")[1]), [vtok.Uniform(keep=0.5), vtok.FastV(keep=0.5, layer=2)])


@pytest.mark.parametrize("method", ["uniform", "downsample", "fastv"])
def test_clips_of_glm(method):
    model, processor = tiny("glm4v")
    texts = ["see <|begin_of_video|><|video|><|end_of_video|> what moves?", "none"]
    clips = [np.random.default_rng(0).integers(0, 255, (6, 56, 84, 3)).astype("uint8")]
    facts = [{"fps": 2.0, "total_num_frames": 6, "frames_indices": list(range(6))}]
    how = {"video_metadata": facts, "do_sample_frames": False, "return_tensors": "pt", "padding": True}
    trace = agrees(model, processor(text=texts, videos=clips, **how), method)
    assert [(y.modality, [(p.rows, p.cols) for p in y.planes]) for y in trace.layouts] == [("video", [(2, 3)] * 3)]


def test_what_is_read_of_glms_encoder():
    """The last states make the model's own tokens; what a patch gets is what a softmax by hand says."""
    model, processor = tiny("glm4v", "eager")
    seen = []

    class Spy(vtok.Uniform):
        needs = frozenset({"encoder_states", "encoder_attention"})
        encoder_layers = property(lambda self: {"encoder_states": (0, None), "encoder_attention": (0,)})

        def select(self, tokens):
            seen.append(tokens)
            return super().select(tokens)

    with vtok.patch(model, Spy(keep=0.5)):
        run(model, batch(processor, ["# ?"], [picture(56, 84)]))
    (tokens,), visual = seen, model.model.visual
    states = tokens.read("encoder_states", None)[0, 0]  # [24, C], the four patches of a token together
    with torch.no_grad():
        squares = visual.post_layernorm(states).view(-1, 2, 2, states.shape[1]).permute(0, 3, 1, 2)
        own = visual.merger(visual.downsample(squares).flatten(1))
        torch.testing.assert_close(own, tokens.features[0], atol=1e-4, rtol=1e-4)
        block = visual.blocks[0]
        place = torch.tensor([(2 * (t // 3) + i // 2, 2 * (t % 3) + i % 2) for t in range(6) for i in range(4)])
        tables = visual.rotary_pos_emb(states, place)
        hidden = block.norm1(tokens.read("encoder_states", 0)[0, 0])
        q, k, _ = block.attn.qkv(hidden).unflatten(-1, (3, 2, -1)).unbind(1)  # [24, heads, d]
        turned = [x * tables[0][:, None] + half(x) * tables[1][:, None] for x in (q, k)]
        maps = torch.einsum("qhd,khd->hqk", *turned).mul(q.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(tokens.read("encoder_attention", 0)[0, 0], maps.mean(0).sum(0), atol=1e-4, rtol=1e-4)


def half(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def test_glm_shows_pictures_or_clips():
    """transformers counts all placeholders for both, and says so."""
    model, processor = tiny("glm4v")
    inputs = batch(processor, ["# yes"], [picture(56, 56)])
    clip = {"pixel_values_videos": inputs["pixel_values"].repeat(2, 1), "video_grid_thw": torch.tensor([[2, 4, 4]])}
    with vtok.patch(model, "uniform"), pytest.raises(Exception, match="do not match"):
        run(model, {**inputs, **clip})
    with vtok.patch(model, "uniform"), pytest.raises(Unsupported, match="nothing fills"):
        run(model, {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")})


def test_beams_of_glm():
    """transformers' own rule for this family; one picture a prompt is right."""
    model, processor = tiny("glm4v")
    two = batch(processor, ["# and #"], [picture(56, 56), picture(56, 112)])
    one = batch(processor, ["# a", "none", "and # b"], [picture(56, 56), picture(56, 112)])
    kept = []
    with vtok.patch(model, "uniform", keep=0.5) as patch:
        with pytest.raises(Unsupported, match="beams would see other pictures"):
            model.generate(**two, max_new_tokens=2, num_beams=2)
        for beams in (1, 2):
            model.generate(**one, max_new_tokens=2, do_sample=False, num_beams=beams)
            kept.append([positions.tolist() for positions in patch.trace.positions])
    assert kept[1] == [positions for positions in kept[0] for _ in range(2)]


# ---- Qwen3.5 and Gemma 3 -----------------------------------------------------------------------------------------
def test_qwen3_5_with_experts():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = same_sizes("qwen3_5", T.Qwen3_5MoeConfig, **experts, shared_expert_intermediate_size=32)
    agrees(model, mixed(tiny("qwen3_5")[1]), "uniform", keep=0.5)


def test_masking_would_be_something_else():
    """A window counts masked tokens: that is why the contract has another oracle here."""
    model, processor = tiny("gemma3")
    inputs = batch(processor, ["a long text before # and a short one"], [picture(84, 84)])
    with vtok.patch(model, "uniform", keep=0.3) as patch:
        pruned = run(model, inputs).logits
    with Masked(model, patch.trace):
        masked = run(model, inputs).logits
    assert (pruned - masked)[patch.trace.present_at(0)].abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3"])
@pytest.mark.parametrize("method", ["fastv", "snapkv", "tokenselect", "core_tokens"])
def test_methods_in_these_decoders_are_refused(family, method):
    with pytest.raises(Unsupported, match=f"{method} needs (attention|ffn)"):
        vtok.patch(tiny(family)[0], method)


def test_types_of_gemmas_prompt_alone():
    """As transformers reads them: what stands behind belongs to no picture."""
    model, processor = tiny("gemma3")
    inputs = dict(batch(processor, ["# What?"], [picture(84, 84)]))
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.cat([inputs[name], torch.ones_like(inputs[name][:, :3])], 1)
    longer = torch.nn.functional.pad(inputs["token_type_ids"], (0, 3))
    with vtok.patch(model, "uniform", keep=0.5):
        assert torch.equal(run(model, inputs).logits, run(model, {**inputs, "token_type_ids": longer}).logits)


def test_other_gemmas_are_refused():
    model, _ = tiny("gemma3")
    model.config.mm_tokens_per_image = 12
    with pytest.raises(Unsupported, match="mm_tokens_per_image"):
        vtok.patch(model, "uniform")


def test_smaller_pictures_of_gemma():
    """What comes of a picture of half the side is what its own pooling would make of it."""
    model, processor = tiny("gemma3")
    core, inputs = model.model, batch(processor, ["# ?"], [picture(84, 84)])
    with vtok.patch(model, vtok.Downsample(keep=0.25)) as patch, Entered(model, patch) as entered:
        run(model, inputs)
    small = torch.nn.functional.interpolate(inputs["pixel_values"], size=28, mode="bicubic", antialias=True)
    with torch.no_grad():
        states = core.vision_tower(small, interpolate_pos_encoding=True).last_hidden_state  # [1, 16, D]
        pooled = states.view(1, 2, 2, 2, 2, -1).mean((2, 4)).flatten(1, 2)
        project = core.multi_modal_projector
        expected = project.mm_soft_emb_norm(pooled) @ project.mm_input_projection_weight
    assert patch.trace.n_kept == [4]
    kept = entered.embeds[0, patch.trace.pictures[0].tokens]
    torch.testing.assert_close(kept, expected[0], atol=1e-4, rtol=1e-4)


# ---- what they cost ----------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("family", ["smolvlm", "gemma3", "glm4v", "qwen3_5"])
def test_encoders_against_flop_counter(family):
    model, processor = tiny(family, "eager")
    shape = adapters.of(model.config).tower(model.config).shape()
    inputs = batch(processor, ["#"], [picture(84, 84)])
    given = {k: v for k, v in inputs.items() if k in ("pixel_values", "pixel_attention_mask", "image_grid_thw")}
    with FlopCounterMode(display=False) as counter:
        model.model.get_image_features(**given)
    with vtok.patch(model, "uniform", keep=0.5) as patch:
        run(model, inputs)
    planes = [plane for layout in patch.trace.layouts for plane in layout.planes]
    views = [tuple(shape.merge * s for s in plane.view_shape) for plane in planes for _ in range(plane.views)]
    patches = [math.prod(view) for view in views]
    small = sum(
        shape.layers * (accounting.SOFTMAX * shape.heads * n * n + accounting.SMALL * n * shape.hidden) for n in patches
    )
    assert counter.get_total_flops() == encoder_flops(shape, views) - small


@torch.no_grad()
def test_a_step_of_linear_layers_against_flop_counter():
    """But for what is no matrix product there: the state's update, and the convolution."""
    model, _ = tiny("qwen3_5", "eager")
    shape, ids = TextShape.of(model.config), torch.arange(40, 60)[None]
    linear = shape.linear
    assert linear.layers == {0, 2} and (linear.key_width, linear.value_width, linear.heads) == (16, 32, 4)
    cache = run(model, {"input_ids": ids}).past_key_values
    with FlopCounterMode(display=False) as counter:
        run(model, {"input_ids": ids[:, :1], "past_key_values": cache}, logits_to_keep=1)
    small = shape.layers * accounting.SMALL * shape.hidden + 2 * accounting.SOFTMAX * shape.heads * 21
    again = 2 * 2 * linear.kernel * (2 * linear.key_width + linear.value_width)  # transformers convolves two steps
    state = 2 * accounting.STEP * linear.value_width * linear.key
    head = shape.hidden * shape.vocab
    assert counter.get_total_flops() == decode_flops(shape, [20] * 4) - small - state + head + again
    assert kv_bytes(shape, [20] * 4, 4) == sum(cache.layers[i].keys[:, :, :20].nbytes * 2 for i in (1, 3))


def test_a_window_bounds_what_a_layer_costs():
    shape = TextShape.of(tiny("gemma3")[0].config)
    assert shape.sliding == {0, 2} and shape.window == 12
    for n in (5, 12, 30):
        pairs = sum(min(i + 1, 12) for i in range(n))
        per_pair = 4 * shape.query_width + accounting.SOFTMAX * shape.heads
        full = layer_flops(shape, n, causal=True, layer=1)
        assert full - layer_flops(shape, n, causal=True, layer=0) == per_pair * (n * (n + 1) // 2 - pairs)
        assert kv_bytes(shape, [n] * 4, 2) == 2 * 2 * shape.kv_width * (2 * n + 2 * min(n, 11))
