"""The sparse gated FFN against the dense one with the other neurons silenced, and against loops."""

import pytest
import torch

from vtok.kernels.sparse_ffn import gather_neurons, gathered_ffn, sparse_ffn

SHAPES = [(1, 1, 4, 6, 3), (2, 3, 5, 7, 7), (3, 1, 16, 40, 17), (2, 9, 8, 33, 1)]
ACTIVATIONS = [torch.nn.functional.silu, torch.nn.functional.gelu, torch.relu]


def problem(b, t, d, f, k, dtype=torch.float32):
    torch.manual_seed(b + f)
    x, gate, up, down = (torch.randn(*shape) for shape in ((b, t, d), (f, d), (f, d), (d, f)))
    index = torch.stack([torch.randperm(f)[:k] for _ in range(b)])
    return [v.to(dtype) for v in (x, gate, up, down)] + [index]


@pytest.mark.parametrize("activation", ACTIVATIONS)
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
