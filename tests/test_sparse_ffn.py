"""The sparse gated FFN against the dense one with the other neurons silenced, and against loops."""

import math
import types

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from vtok.engine.ffn import activation
from vtok.errors import InvalidValue
from vtok.kernels.sparse_ffn import ACTIVATIONS, gather_neurons, gathered_ffn, sparse_ffn

SHAPES = [(1, 1, 4, 6, 3), (2, 3, 5, 7, 7), (3, 1, 16, 40, 17), (2, 9, 8, 33, 1)]
FUNCTIONS = [torch.nn.functional.silu, torch.nn.functional.gelu, torch.relu]


def problem(b, t, d, f, k, dtype=torch.float32):
    torch.manual_seed(b + f)
    x, gate, up, down = (torch.randn(*shape) for shape in ((b, t, d), (f, d), (f, d), (d, f)))
    index = torch.stack([torch.randperm(f)[:k] for _ in range(b)])
    return [v.to(dtype) for v in (x, gate, up, down)] + [index]


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_ffn_with_the_others_silenced(shape, activation):
    x, gate, up, down, index = problem(*shape)
    inner = activation(x @ gate.T) * (x @ up.T)  # [B, T, F]
    for b, chosen in enumerate(index.tolist()):
        silent = [n for n in range(gate.shape[0]) if n not in chosen]
        inner[b, :, silent] = 0
    torch.testing.assert_close(sparse_ffn(x, gate, up, down, index, activation), inner @ down.T, atol=1e-4, rtol=1e-5)


def test_equals_loops():
    x, gate, up, down, index = problem(2, 2, 3, 6, 4)
    y = sparse_ffn(x, gate, up, down, index, torch.relu)
    for b in range(2):
        for t in range(2):
            expected = [0.0] * 3
            for n in index[b].tolist():
                g = sum(float(x[b, t, i] * gate[n, i]) for i in range(3))
                u = sum(float(x[b, t, i] * up[n, i]) for i in range(3))
                for i in range(3):
                    expected[i] += max(0.0, g) * u * float(down[i, n])
            torch.testing.assert_close(y[b, t], torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_dense_ffn(dtype):
    x, gate, up, down, _ = problem(2, 3, 64, 128, 1)
    index = torch.arange(128).expand(2, -1)
    exact = sparse_ffn(x, gate, up, down, index, torch.nn.functional.silu)
    x, gate, up, down = (v.to(dtype) for v in (x, gate, up, down))
    dense = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    y = sparse_ffn(x, gate, up, down, index, torch.nn.functional.silu)
    assert y.dtype == dtype
    assert (y.float() - exact).norm() < 1.5 * (dense.float() - exact).norm()


def test_samples_do_not_see_each_other():
    x, gate, up, down, index = problem(3, 2, 8, 20, 9)
    together = sparse_ffn(x, gate, up, down, index, torch.nn.functional.silu)
    x[1] = torch.nan
    poisoned = sparse_ffn(x, gate, up, down, index, torch.nn.functional.silu)
    assert torch.equal(together[[0, 2]], poisoned[[0, 2]])
    assert poisoned[1].isnan().all()
    for b in (0, 2):
        alone = sparse_ffn(x[b : b + 1], gate, up, down, index[b : b + 1], torch.nn.functional.silu)
        torch.testing.assert_close(alone[0], together[b])


def test_other_neurons_are_never_read():
    x, gate, up, down, index = problem(2, 2, 8, 20, 9)
    y = sparse_ffn(x, gate, up, down, index, torch.nn.functional.silu)
    unused = sorted(set(range(20)) - set(index.flatten().tolist()))
    assert unused
    for weight in (gate, up, down.t()):
        weight[unused] = torch.nan
    assert torch.equal(sparse_ffn(x, gate, up, down, index, torch.nn.functional.silu), y)


def test_copies_are_copies():
    x, gate, up, down, index = problem(2, 3, 8, 20, 9)
    copies = gather_neurons(gate, up, down, index)
    y = gathered_ffn(x, *copies, torch.nn.functional.silu)
    assert torch.equal(y, sparse_ffn(x, gate, up, down, index, torch.nn.functional.silu))
    assert [copy.shape for copy in copies] == [(2, 9, 8)] * 3
    for weight in (gate, up, down):
        weight.zero_()
    assert torch.equal(y, gathered_ffn(x, *copies, torch.nn.functional.silu))


def test_gradients():
    x, gate, up, down, index = problem(2, 2, 3, 5, 3, torch.float64)
    leaves = [v.requires_grad_() for v in (x, gate, up, down)]
    run = lambda *args: sparse_ffn(*args, index, torch.nn.functional.silu)
    assert torch.autograd.gradcheck(run, leaves)


# ---- activations by name ------------------------------------------------------------------------------------
FORMULAS = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: v / 2 * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: max(v, 0.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_named_activations(name):
    x, gate, up, down, index = problem(2, 3, 5, 9, 4)
    copies = gather_neurons(gate, up, down, index)
    inner = torch.einsum("btd,bkd->btk", x, copies[0]).double()
    inner = torch.tensor([[[FORMULAS[name](v) for v in row] for row in sample] for sample in inner.tolist()])
    inner = inner * torch.einsum("btd,bkd->btk", x, copies[1])
    expected = torch.einsum("btk,bkd->btd", inner, copies[2])
    torch.testing.assert_close(sparse_ffn(x, gate, up, down, index, name), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        gathered_ffn(x, *copies, name, backend="torch"), gathered_ffn(x, *copies, ACTIVATIONS[name], backend="torch")
    )


@pytest.mark.parametrize("wrong", ["swish", None, 3])
def test_unknown_activations_are_refused(wrong):
    x, *weights, index = problem(1, 1, 4, 6, 3)
    with pytest.raises(InvalidValue, match="'silu', 'gelu', 'gelu_tanh', 'relu', or for the torch backend a function"):
        sparse_ffn(x, *weights, index, wrong)
    with pytest.raises(InvalidValue, match="for the torch backend a function; got <function tanh"):
        sparse_ffn(x, *weights, index, nn.functional.tanh, "triton")


def test_gradients_through_a_named_activation():
    x, gate, up, down, index = problem(2, 2, 3, 5, 3, torch.float64)
    leaves = [v.requires_grad_() for v in (x, gate, up, down)]
    assert torch.autograd.gradcheck(lambda *args: sparse_ffn(*args, index, "silu"), leaves)


def test_many_tokens_and_doubles_take_torch(monkeypatch):
    """Where reading the weights is not what takes the time, or fp32 sums would lose digits."""
    asked = []
    monkeypatch.setattr("vtok.kernels.sparse_ffn.dispatch", lambda twin, backend, *args: asked.append(backend))
    x, *weights, index = problem(1, 64, 4, 6, 3)
    copies = gather_neurons(*weights, index)
    for tokens in (x, torch.cat([x, x[:, :1]], 1), x.double()):
        for backend in ("auto", "triton"):
            gathered_ffn(tokens, *copies, "silu", backend)
    assert asked == ["auto", "triton", "torch", "triton", "torch", "triton"]


@pytest.mark.parametrize(
    "theirs", ["silu", "swish", "gelu", "gelu_pytorch_tanh", "relu", "gelu_new", "quick_gelu", "tanh"]
)
def test_names_of_activations_of_transformers(theirs):
    """The name stands for the same values, bit by bit; what has no name of its own goes on as it is."""
    module = ACT2FN[theirs]
    known = activation(types.SimpleNamespace(act_fn=module))
    values = torch.linspace(-9, 9, 1001)
    assert torch.equal(ACTIVATIONS.get(known, known)(values), module(values))
    assert (known in ACTIVATIONS) == (theirs not in ("gelu_new", "quick_gelu", "tanh"))
    assert activation(types.SimpleNamespace(act_fn=torch.relu)) is torch.relu
