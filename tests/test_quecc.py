"""QueCC: the module against the official one's golden numbers and a slow rewrite; the compressor in models."""

import functools
import math

import pytest
import torch
from contract import ADAPTERS, FAMILIES, Entered, batch, double, mixed, oracle, picture, placeholder_ids, tiny
from torch import nn

import vtok
from vtok.compressors.quecc import places
from vtok.errors import InvalidValue, Unsupported
from vtok.modules.quecc import LAYERS, RELEASED, QueCC, QueCCProjector, question_end, windows
from vtok.modules.training import quecc_for, train
from vtok.types import Layout, Plane


def wave(shape, period, shift):
    return (torch.arange(math.prod(shape)) % period).float().reshape(shape) / period - shift


@pytest.mark.parametrize(
    ("kernel", "total", "first"),
    [
        (24, 0.95370, (-0.795475, -0.695972, -0.275868)),
        (12, 3.81325, None),
        (6, 15.25879, None),
        (4, 34.32755, (-0.831019, -0.719975, -0.264789)),
        (3, 61.01851, None),
        (2, 137.21738, None),
    ],
)
def test_golden_numbers(kernel, total, first):
    """What the official class gives for these weights and inputs."""
    module = QueCC(64, 32, kernel, deep_dim=4096)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(((torch.arange(parameter.numel()) % 13) - 6).float().view_as(parameter) / 50)
        deep, x = wave((2, 24, 24, 4096), 17, 0.5), wave((2, 24, 24, 64), 11, 0.5)
        out = module(x, deep, wave((2, 32), 5, 0.4))
    assert out.shape == (2, 24 // kernel, 24 // kernel, 64)
    assert out.sum().item() == pytest.approx(total, rel=1e-4)
    if first:
        assert out[0, 0, 0, :3].tolist() == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize(
    ("kernel", "count"),
    [(24, 21_581_824), (12, 21_139_456), (6, 21_028_864), (4, 21_008_384), (3, 21_001_216), (2, 20_996_096)],
)
def test_golden_parameter_counts(kernel, count):
    with torch.device("meta"):
        module = QueCC(1024, 4096, kernel)
    assert sum(p.numel() for p in module.parameters()) == count


def slow(module, x, deep, text):
    """By hand from the definition, one window and one head at a time, windows at the edge cut."""
    high, wide, dim = x.shape
    kernel, heads = module.kernel, module.attention.num_heads
    norm = lambda y, layer: (y - y.mean()) / (y.var(unbiased=False) + 1e-6).sqrt() * layer.weight + layer.bias
    line = lambda y, weight, bias: weight @ y + bias
    gelu = lambda y: y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))

    def project(net, y):
        hidden = gelu(line(y, net[0].weight, net[0].bias))
        return norm(line(hidden, net[2].weight, net[2].bias), net[3])

    t = norm(line(text, module.text[0].weight, module.text[0].bias), module.text[1])
    w_q, w_k, w_v = module.attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = module.attention.in_proj_bias.chunk(3)
    out = []
    for i in range(0, high, kernel):
        for j in range(0, wide, kernel):
            q = module.downsample.bias.clone()
            keys, values = [], []
            for y in range(i, min(i + kernel, high)):
                for z in range(j, min(j + kernel, wide)):
                    q = q + module.downsample.weight[:, 0, y - i, z - j] * project(module.q, x[y, z] + t)
                    keys.append(line(project(module.k, deep[y, z]), w_k, b_k))
                    values.append(line(project(module.v, deep[y, z]), w_v, b_v))
            q, parts = line(q, w_q, b_q), []
            for h in range(heads):
                part = slice(h * dim // heads, (h + 1) * dim // heads)
                logits = torch.stack([q[part] @ key[part] for key in keys]) / math.sqrt(dim // heads)
                parts.append(sum(p * value[part] for p, value in zip(logits.softmax(0), values)))
            out.append(line(torch.cat(parts), module.attention.out_proj.weight, module.attention.out_proj.bias))
    return torch.stack(out).view(-(-high // kernel), -(-wide // kernel), dim)


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


@pytest.mark.parametrize(
    ("kernel", "grid"), [(2, (4, 6)), (3, (3, 3)), (1, (2, 3)), (2, (3, 5)), (4, (2, 3)), (3, (1, 1))]
)
def test_module_against_a_slow_rewrite(kernel, grid):
    module = randomise(QueCC(16, 6, kernel, deep_dim=24, heads=4, partial=True))
    x, deep, text = torch.randn(2, *grid, 16), torch.randn(2, *grid, 24), torch.randn(2, 6)
    with torch.no_grad():
        out = module(x, deep, text)
        for b in range(2):
            torch.testing.assert_close(out[b], slow(module, x[b], deep[b], text[b]), atol=1e-4, rtol=1e-4)


def test_cut_windows_are_refused_unless_asked_for():
    module = QueCC(16, 6, 4, deep_dim=24, heads=4)
    with pytest.raises(InvalidValue, match="partial=True"):
        module(torch.randn(1, 5, 4, 16), torch.randn(1, 5, 4, 24), torch.randn(1, 6))


def test_windows():
    x = torch.arange(4 * 6).view(1, 4, 6, 1)
    assert windows(x, 2)[0, 1, 2].flatten().tolist() == [16, 17, 22, 23]


def test_the_question_matters_and_only_its_own():
    module = randomise(QueCC(16, 6, 2, deep_dim=24, heads=4))
    x, deep, text = torch.randn(1, 4, 4, 16), torch.randn(1, 4, 4, 24), torch.randn(2, 6)
    both = module(x.expand(2, -1, -1, -1), deep.expand(2, -1, -1, -1), text)
    assert not torch.allclose(both[0], both[1], atol=1e-3)
    torch.testing.assert_close(both[1], module(x, deep, text[1:])[0])


def test_question_end():
    ids = torch.tensor([[5, 6, 7, 8, 6, 7], [6, 7, 1, 2, 9, 9], [1, 2, 6, 9, 9, 9], [1, 2, 6, 7, 9, 9], [9] * 6])
    valid = torch.tensor([6, 4, 3, 3, 0])[:, None] > torch.arange(6)
    assert question_end(ids, valid).tolist() == [5, 3, 2, 2, -1]
    assert question_end(ids, valid, (6, 7)).tolist() == [0, -1, 2, 2, -1]  # 7 of the fourth is padding
    assert question_end(ids, valid, (9,)).tolist() == [5, 3, 2, 2, -1]
    assert question_end(ids, valid, (1,) * 7).tolist() == [5, 3, 2, 2, -1]
    assert question_end(None, valid).tolist() == [5, 3, 2, 2, -1]


def released(projector):
    """The same weights under the names of the released code."""
    theirs = {ours: name for name, ours in RELEASED.items()}
    state = {}
    for name, value in projector.state_dict().items():
        part, module, rest = name.split(".", 2)
        if part == "quecc":
            state[f"model.mm_projector.0.{theirs[module]}.{rest}"] = value
        else:
            state[f"model.mm_projector.{int(module) + 1}.{rest}"] = value
    return state


def test_released_names():
    """Those of the official module: an `nn.Sequential` of the compressor, Linear, GELU, Linear."""
    names = released(QueCCProjector(16, 12, 2, text_dim=6))
    for name in (
        "0.clip_attn.in_proj_weight",
        "0.clip_attn.out_proj.bias",
        "0.q_proj.0.weight",
        "0.k_proj.2.bias",
        "0.v_proj.3.weight",
        "0.q_downsample.weight",
        "0.text_projection.1.bias",
        "1.weight",
        "3.bias",
    ):
        assert f"model.mm_projector.{name}" in names
    assert len(names) == 4 + 3 * 6 + 2 + 4 + 4


@pytest.mark.parametrize("how", ["ours", "safetensors", "bin", "folder"])
def test_save_and_load(how, tmp_path):
    from safetensors.torch import save_file

    projector = randomise(QueCCProjector(16, 12, 3, text_dim=6, partial=how == "ours"))
    other = {
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2),
        "model.mm_projector_x.0.weight": torch.zeros(1),
    }
    if how == "ours":
        path = tmp_path / "quecc.safetensors"
        projector.save(path)
    elif how == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file({**released(projector), **other}, path)
    else:
        path = tmp_path / "mm_projector.bin"
        torch.save({**released(projector), **other}, path)
        path = tmp_path if how == "folder" else path
    loaded = QueCCProjector.load(path)
    assert loaded.layers == LAYERS
    assert loaded.quecc.partial is (how == "ours")
    inputs = torch.randn(1, 6, 6, 16), torch.randn(1, 6, 6, 64), torch.randn(1, 6)
    assert torch.equal(loaded(*inputs), projector(*inputs))


def test_what_cannot_be_loaded(tmp_path):
    projector = QueCCProjector(16, 12, 3, layers=(1, 2))
    state = released(projector)
    with pytest.raises(InvalidValue, match="no file"):
        QueCCProjector.load(tmp_path / "none.bin")
    torch.save({"model.mm_projector.0.weight": torch.zeros(2, 2)}, tmp_path / "mlp.bin")
    with pytest.raises(InvalidValue, match="no QueCC projector"):
        QueCCProjector.load(tmp_path / "mlp.bin")
    torch.save(state, tmp_path / "two.bin")
    with pytest.raises(InvalidValue, match="2 layers"):
        QueCCProjector.load(tmp_path / "two.bin")
    assert QueCCProjector.load(tmp_path / "two.bin", layers=(0, -1)).layers == (0, -1)
    del state["model.mm_projector.0.v_proj.3.bias"]
    torch.save(state, tmp_path / "part.bin")
    with pytest.raises(InvalidValue, match=r"v\.3\.bias"):
        QueCCProjector.load(tmp_path / "part.bin", layers=(0, -1))
    with pytest.raises(InvalidValue, match="multiple"):
        QueCC(20, 6, 2)
    with pytest.raises(InvalidValue, match="kernel"):
        QueCC(16, 6, 0)


def test_bfloat16_weights():
    projector = QueCCProjector(16, 12, 2, text_dim=6).to(torch.bfloat16)
    out = projector(torch.randn(1, 4, 4, 16), torch.randn(1, 4, 4, 64), torch.randn(1, 6))
    assert out.dtype == torch.bfloat16 and isinstance(projector.mlp, nn.Sequential)


CELLS = [family for family in FAMILIES if ADAPTERS[family].provides >= vtok.QueCC.needs]


@functools.cache
def weights(family, kernel=2):
    """A random projector for the tiny model, whose tokens are about as large as the model's own."""
    return randomise(quecc_for(tiny(family)[0], kernel, layers=(0, 1, -1, 1.0), heads=4, partial=True)).eval()


def slow_cells(plane, kernel):
    """{(view, row, column) of a window: its dense tokens}, for a plane that is not resampled."""
    (high, wide), (top, left) = plane.view_shape, plane.offset
    cells = {}
    for y in range(plane.rows):
        for x in range(plane.cols):
            crop = (y + top) // high * plane.crop_grid[1] + (x + left) // wide
            cell = crop, (y + top) % high // kernel, (x + left) % wide // kernel
            cells.setdefault(cell, []).append((y, x))
    return cells


@pytest.mark.parametrize(
    "planes",
    [
        (Plane(4, 4),),
        (Plane(5, 7),),
        (Plane(1, 1),),
        (Plane(4, 6, "frame"),) * 3,
        (Plane(4, 4, "thumbnail"), Plane(6, 8, "crops", crop_grid=(2, 2), crop_shape=(4, 4), offset=(1, 0))),
        (Plane(4, 4, "thumbnail"), Plane(8, 3, "crops", crop_grid=(2, 2), crop_shape=(4, 4), offset=(0, 2))),
        (Plane(2, 8, "crops", crop_grid=(2, 2), crop_shape=(4, 4), offset=(3, 0)), Plane(4, 4, "thumbnail")),
    ],
)
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 9])
def test_places(planes, kernel):
    layout = Layout(planes)
    source, place, into = places(layout, kernel)
    expected, windows_before = {}, 0
    for plane, start in zip(planes, layout.starts):
        h, w = (-(-side // kernel) for side in plane.view_shape)
        for (view, i, j), members in slow_cells(plane, kernel).items():
            ys, xs = sorted({y for y, _ in members}), sorted({x for _, x in members})
            middle = start + ys[(len(ys) - 1) // 2] * plane.cols + xs[(len(xs) - 1) // 2]
            expected[windows_before + (view * h + i) * w + j] = middle
            assert all(into[start + y * plane.cols + x] == middle for y, x in members)
        windows_before += plane.views * h * w
    assert dict(zip(source.tolist(), place.tolist())) == expected
    assert len(source) == len(expected) == len(set(place.tolist()))


def test_places_where_features_are_resized():
    source, place, into = places(Layout((Plane(4, 4, "frame", resampled=(9, 9)),)), 3)
    assert source.tolist() == list(range(9))
    assert place.tolist() == [0, 1, 3, 4, 5, 7, 12, 13, 15]  # rows 1, 3 | 5, 7 of 9: windows 0, 1, 1, 2
    assert sorted(set(into.tolist())) == place.tolist()


def expected_tokens(model, projector, inputs, patch, sample_text):
    """By hand: for each picture the made tokens at their places, from a run of the plain model's parts."""
    lm, core = model.model.language_model, model.model
    with torch.no_grad():
        states = core.vision_tower(inputs["pixel_values"].flatten(0, -4), output_hidden_states=True).hidden_states
        text = lm(input_ids=sample_text).last_hidden_state[:, -1]
        grid = lambda x: x[:, 1:].unflatten(1, (4, 4))
        deep = torch.cat([grid(states[layer]) for layer in (0, 1, 2, 3)], -1)
        return projector(grid(states[-2]), deep, text.expand(len(deep), -1)).flatten(1, 2)


def test_tokens_are_the_projectors():
    """What enters the language model, against the module called by hand on the tower's and decoder's outputs."""
    model, processor = tiny("llava")
    inputs = batch(processor, ["some # What colour is it?"], [picture(56, 56)])
    model, inputs = double(model, inputs)  # the random weights blow rounding up, on some processors beyond 1e-5
    projector = randomise(quecc_for(model, 2, layers=(0, 1, -2, -1), heads=4)).double()
    image = inputs["input_ids"][0] == model.config.image_token_id
    behind = inputs["input_ids"][:, int(image.nonzero()[-1]) + 1 :]
    stop = behind[0, -2:].tolist()
    for options, text in (({}, behind), ({"stop": stop}, behind[:, :-2]), ({"stop": [1, 2, 3]}, behind)):
        with vtok.patch(model, "quecc", weights=projector, **options) as patch, Entered(model, patch) as entered:
            model(**inputs, use_cache=True)
        made = expected_tokens(model, projector, inputs, patch, text)[0]
        kept = patch.trace.keep_masks[0]
        assert kept.nonzero().squeeze(1).tolist() == [0, 2, 8, 10]
        torch.testing.assert_close(entered.embeds[0, image][kept], made, atol=1e-5, rtol=1e-5)
        assert patch.trace.merged_into[0].view(4, 4).tolist() == [[0, 0, 2, 2]] * 2 + [[8, 8, 10, 10]] * 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CELLS)
def test_pruning_is_masking(family, side):
    """Contract 2 to 5, with the tokens that were made."""
    model, processor = tiny(family)
    inputs = mixed(processor, side)
    with (
        torch.no_grad(),
        vtok.patch(model, "quecc", weights=weights(family)) as patch,
        Entered(model, patch) as entered,
    ):
        pruned = model(**inputs, use_cache=True).logits
    assert sum(patch.trace.n_kept) < sum(patch.trace.n_visual)
    with torch.no_grad(), oracle(model, patch.trace, entered.embeds):
        masked = model(**inputs, use_cache=True).logits
    here = patch.trace.present_at(0)
    torch.testing.assert_close(pruned[here], masked[here], atol=1e-5, rtol=1e-5)
    assert (pruned[~here] == 0).all()


@pytest.mark.parametrize("family", CELLS)
def test_a_batch_is_its_samples(family):
    """Also a picture at the end, whose question is the text before it, and a row without pictures."""
    model, processor = tiny(family)
    prompts = ["a # What colour is it?", "two # and # yes", "no picture at all", "last 0 1 2 #"]
    pictures = [picture(70, 112, 1), picture(56, 56, 2), picture(112, 70, 3), picture(56, 56, 4)]
    with torch.no_grad(), vtok.patch(model, "quecc", weights=weights(family)):
        together = model(**batch(processor, prompts, pictures), use_cache=True).logits
        for i, part in enumerate([pictures[:1], pictures[1:3], [], pictures[3:]]):
            alone = model(**batch(processor, [prompts[i]], part), use_cache=True).logits
            torch.testing.assert_close(together[i, -1], alone[0, -1], atol=2e-4, rtol=2e-4)


def with_answer(inputs, answer):
    inputs = dict(inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1)
    for name in {"mm_token_type_ids", "token_type_ids"} & inputs.keys():
        inputs[name] = torch.cat([inputs[name], torch.zeros_like(answer)], 1)
    labels = inputs["input_ids"].clone()
    labels[:, : -answer.shape[1]] = -100
    return inputs, labels


@pytest.mark.parametrize("family", CELLS)
def test_the_answer_is_no_part_of_the_question(family):
    """Contract 11: log-probabilities of a rollout and of the training forward agree."""
    model, processor = tiny(family)
    inputs = mixed(processor)
    with torch.no_grad(), vtok.patch(model, "quecc", weights=weights(family)):
        torch.manual_seed(0)
        rollout = model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=True,
            top_k=0,
            output_logits=True,
            return_dict_in_generate=True,
            suppress_tokens=placeholder_ids(model),
        )
        answer = rollout.sequences[:, inputs["input_ids"].shape[1] :]
        full, labels = with_answer(inputs, answer)
        position_ids = {}
        if not hasattr(model.model, "rope_deltas"):  # as `generate` counts; a bare forward would count the padding
            position_ids["position_ids"] = (full["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**full, **position_ids, labels=labels).logits[:, -6:-1]
    gather = lambda x: x.float().log_softmax(-1).gather(-1, answer[..., None])
    torch.testing.assert_close(gather(torch.stack(rollout.logits, 1)), gather(logits), atol=1e-5, rtol=1e-5)


def test_training_without_labels_is_refused():
    model, processor = tiny("llava")
    inputs = mixed(processor)
    model.train()
    with vtok.patch(model, "quecc", weights=weights("llava")), pytest.raises(Unsupported, match="pass labels"):
        model(**inputs)


def test_a_second_picture_asks_its_own_question():
    model, processor = tiny("llava")
    first = batch(processor, ["a # What colour is it?"], [picture(56, 56, 1)])
    n = first["input_ids"].shape[1]
    kept = []
    for question in (" yes and # now?", " yes and # no 1 2 3"):
        second = batch(processor, [question], [picture(56, 56, 2)])
        m = second["input_ids"].shape[1]
        second["attention_mask"] = torch.ones(1, n + m, dtype=torch.long)
        second["position_ids"] = torch.arange(n, n + m)[None]
        with torch.no_grad(), vtok.patch(model, "quecc", weights=weights("llava")) as patch:
            cache = model(**first, use_cache=True).past_key_values
            with Entered(model, patch) as entered:
                model(**second, past_key_values=cache)
        image = second["input_ids"][0] == model.config.image_token_id
        kept.append(entered.embeds[0, image][patch.trace.keep_masks[0]])
        alone = batch(processor, [question], [picture(56, 56, 2)])
        patch = vtok.patch(model, "quecc", weights=weights("llava"))
        with torch.no_grad(), patch, Entered(model, patch) as entered:
            model(**alone, use_cache=True)
        torch.testing.assert_close(kept[-1], entered.embeds[0, image][patch.trace.keep_masks[0]], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(*kept, atol=1e-3)


def test_only_pictures_no_text():
    """No question at all is an embedding of zeros."""
    model, processor = tiny("llava")
    inputs = batch(processor, ["#"], [picture(56, 56)])
    image = model.config.image_token_id
    only = inputs["input_ids"][0] == image
    inputs = {**inputs, "input_ids": inputs["input_ids"][:, only], "attention_mask": inputs["attention_mask"][:, only]}
    with torch.no_grad(), vtok.patch(model, "quecc", weights=weights("llava"), stop=(5,)) as patch:
        assert model(**inputs, use_cache=True).logits.isfinite().all()
    assert patch.trace.n_kept == [4 + 1]  # and the last, behind which the answer begins


def test_refusals(tmp_path):
    model, processor = tiny("llava")
    before = dict(model.state_dict())
    with pytest.raises(InvalidValue, match="weights=PATH"):
        vtok.patch(model, "quecc")
    with pytest.raises(InvalidValue, match="no file"):
        vtok.patch(model, "quecc", weights=str(tmp_path / "none"))
    with pytest.raises(InvalidValue, match="no option keep"):
        vtok.patch(model, "quecc", weights=weights("llava"), keep=0.5)
    with pytest.raises(InvalidValue, match="another kernel"):
        vtok.patch(model, "quecc", weights=weights("llava"), budget=0.5)
    with pytest.raises(InvalidValue, match="token ids"):
        vtok.QueCC(weights=weights("llava"), stop="ASSISTANT")
    with pytest.raises(InvalidValue, match="layers 0 to"):  # at patch time
        vtok.patch(model, vtok.QueCC(weights=QueCCProjector(32, 64, 2)))
    inputs = mixed(processor)
    narrow = vtok.QueCC(weights=QueCCProjector(16, 64, 2, layers=(0, 1)))
    with vtok.patch(model, narrow), pytest.raises(Unsupported, match="patches of width 16"):
        model(**inputs, use_cache=True)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    with vtok.patch(model, "quecc", weights=weights("llava"), stop=(5,)), pytest.raises(Unsupported, match="input_ids"):
        model(inputs_embeds=embeds, **rest)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_from_a_file(tmp_path):
    model, processor = tiny("llava")
    inputs = mixed(processor)
    weights("llava").save(tmp_path / "quecc.safetensors")
    logits = []
    for source in (weights("llava"), tmp_path / "quecc.safetensors", str(tmp_path)):
        with torch.no_grad(), vtok.patch(model, "quecc", weights=source):
            logits.append(model(**inputs, use_cache=True).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("decoder", [False, True])
def test_training_recipe(decoder):
    """It learns a fixed answer, touches nothing else, and leaves flags and modes as they were."""
    model, processor = tiny("llava_next")
    inputs, labels = with_answer(mixed(processor), torch.tensor([[40, 50, 60]]).repeat(5, 1))
    model.model.vision_tower.requires_grad_(False)
    model.model.language_model.layers[0].train()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    projector = quecc_for(model, 2, heads=4)
    start = {name: value.clone() for name, value in projector.state_dict().items()}
    batches = [{**inputs, "labels": labels}] * 20
    losses = train(model, projector, lambda step: vtok.QueCC(weights=projector), batches, 12, lr=3e-3, decoder=decoder)
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.1
    unmoved = {name for name, value in projector.state_dict().items() if torch.equal(value, start[name])}
    assert not unmoved
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith(("model.language_model", "lm_head")) for name in moved)
    assert bool(moved) is decoder
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(vtok.errors.PatchStateError):
        vtok.unpatch(model)


def test_training_needs_labels():
    model, processor = tiny("llava")
    inputs = dict(mixed(processor))
    projector = quecc_for(model, 2, heads=4)
    method = lambda step: vtok.QueCC(weights=projector)
    with pytest.raises(Unsupported, match="pass labels"):
        train(model, projector, method, [inputs], 1)
    assert not any("token_projector" in name for name in model.state_dict())
    vtok.patch(model, "uniform").remove()  # nothing is left of it
    with pytest.raises(InvalidValue, match="steps"):
        train(model, projector, method, [inputs], 0)


def test_a_fresh_projector_knows_the_models_mlp():
    model, _ = tiny("llava")
    projector = quecc_for(model, 2, heads=4)
    own = model.model.multi_modal_projector
    assert torch.equal(projector.mlp[0].weight, own.linear_1.weight)
    assert torch.equal(projector.mlp[2].bias, own.linear_2.bias)
    assert projector.layers == (2, 2, 3, 3)  # 12, 16, 22, 23 of 24
