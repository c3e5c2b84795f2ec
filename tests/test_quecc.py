"""QueCC: the module against the official one's golden numbers and a slow rewrite; the compressor in models."""

import math

import pytest
import torch
from torch import nn

from vtok.errors import InvalidValue
from vtok.modules.quecc import LAYERS, RELEASED, QueCC, QueCCProjector, question_end, windows


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
