"""Triton kernels: which version of a kernel runs, and the kernels themselves in `triton_cases.py`."""

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from vtok.errors import InvalidValue, MissingExtra, Unsupported
from vtok.kernels import dispatch
from vtok.kernels.attention_column_sums import attention_column_sums
from vtok.kernels.attention_rows import attention_rows
from vtok.kernels.bipartite_match import bipartite_match
from vtok.kernels.compact_sequence import compact_sequence
from vtok.kernels.farthest_points import farthest_points
from vtok.kernels.greedy_coverage import greedy_coverage
from vtok.kernels.greedy_dpp import greedy_dpp
from vtok.kernels.merge import merge
from vtok.kernels.pagerank import pagerank
from vtok.kernels.redundancy_counts import redundancy_counts
from vtok.kernels.sparse_ffn import gathered_ffn
from vtok.kernels.tree_attention import tree_attention

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def child(arguments, **environment):
    """Whether a Python process with this environment ends well, and what it says. Triton reads its switch on import."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VTOK_KERNELS", "PYTEST_ADDOPTS")}
    done = subprocess.run(
        [sys.executable, *arguments], env=clean | environment, capture_output=True, text=True, cwd="/"
    )
    return done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize("where", ["interpreter", "card"])
def test_against_the_twins(where):
    if where == "card" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if where == "interpreter" else {}
    options = ["--import-mode=importlib", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:xdist"]
    passed, text = child(["-m", "pytest", *options, str(HERE / "triton_cases.py")], **environment)
    assert passed, text[-5000:]


@needs_triton
def test_kernels_compile_for_a_card():
    options = ["--import-mode=importlib", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:xdist"]
    paths = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    passed, text = child(["-m", "pytest", *options, str(HERE / "triton_targets.py")], **paths)
    assert passed, text[-5000:]


def calls(device="cpu"):
    """Each kernel on small inputs, with its backend left open."""
    torch.manual_seed(0)
    x, query, key = (torch.randn(shape, device=device) for shape in ((2, 9, 4), (2, 4, 5, 8), (2, 2, 5, 8)))
    rows, valid = torch.tensor([[4], [2]], device=device), torch.ones(2, 5, dtype=torch.bool, device=device)
    place = torch.arange(18, device=device).view(2, 9)
    tree = torch.ones(3, 3, dtype=torch.bool, device=device).tril()
    return {
        "bipartite_match": lambda **backend: bipartite_match(x, 3, **backend),
        "farthest_points": lambda **backend: farthest_points(x, 3, **backend),
        "greedy_coverage": lambda **backend: greedy_coverage(x, 3, **backend),
        "greedy_dpp": lambda **backend: greedy_dpp(x, 3, **backend),
        "attention_rows": lambda **backend: attention_rows(query, key, rows, 0.5, valid, **backend),
        "attention_column_sums": lambda **backend: attention_column_sums(query, key, rows, 0.5, valid, **backend),
        "pagerank": lambda **backend: pagerank(query, key, 0.5, valid, rows[:, 0], **backend),
        "redundancy_counts": lambda **backend: redundancy_counts(x[:, :5], valid, 0.2, **backend),
        "sparse_ffn": lambda **backend: gathered_ffn(x[:, :5], *[x] * 3, "silu", **backend),
        "merge": lambda **backend: merge(x, place % 4 - 1, 4, place % 3 + 1.0, **backend),
        "compact_sequence": lambda **backend: compact_sequence(place % 5 > 2, 4, x, place, place > 9, **backend),
        "tree_attention": lambda **backend: tree_attention(
            query[:, :, :3], key, key, tree, 0.5, valid[:, :2], **backend
        ),
    }


@pytest.mark.parametrize("kernel", calls())
def test_backends_on_a_cpu(kernel, monkeypatch):
    call = calls()[kernel]
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    for a, b in zip(call(), call(backend="torch")):
        assert torch.equal(a, b)
    with pytest.raises(InvalidValue, match="backend must be one of"):
        call(backend="cuda")
    monkeypatch.setattr(dispatch, "_installed", lambda: True)
    with pytest.raises(Unsupported, match="these are on cpu.*TRITON_INTERPRET=1"):
        call(backend="triton")
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    with pytest.raises(MissingExtra, match=r"pip install 'vtok\[triton\]'"):
        call(backend="triton")
    monkeypatch.setenv("VTOK_KERNELS", "torch")
    with pytest.raises(InvalidValue, match="VTOK_KERNELS=torch"):
        call(backend="triton")
    monkeypatch.setenv("VTOK_KERNELS", "tritn")
    with pytest.raises(InvalidValue, match="'auto' or 'torch', got 'tritn'"):
        call(backend="triton")


@pytest.mark.parametrize("kernel", [farthest_points, greedy_dpp])
def test_more_points_than_triton_takes(kernel):
    with pytest.raises(InvalidValue, match="at most 8192 points, got 8193"):
        kernel(torch.zeros(1, 8193, 1), 1, backend="triton")


def twin(x):
    return x + 1


@pytest.fixture
def card(monkeypatch):
    """Tensors count as on a GPU, of a good card, where Triton doubles what the twin adds 1 to."""
    monkeypatch.setattr(dispatch, "_on_cuda", lambda tensors: True)
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Card")
    monkeypatch.setattr(dispatch, "_broken", set())
    monkeypatch.setattr(twin, "__module__", "vtok_pretended")
    module = types.ModuleType("vtok_pretended_triton")
    module.twin = lambda x: x * 2
    monkeypatch.setitem(sys.modules, "vtok_pretended_triton", module)
    monkeypatch.delenv("VTOK_KERNELS", raising=False)
    dispatch._log.cache_clear()
    return module


FIVE = torch.tensor(5.0)


def test_auto_is_triton_on_a_card(card, monkeypatch, caplog):
    assert [float(dispatch.dispatch(twin, b, FIVE)) for b in dispatch.BACKENDS] == [10, 6, 10]
    monkeypatch.setenv("VTOK_KERNELS", "torch")
    assert dispatch.dispatch(twin, "auto", FIVE) == 6
    monkeypatch.delenv("VTOK_KERNELS")
    monkeypatch.setattr(dispatch, "_interpreted", lambda: True)
    assert [float(dispatch.dispatch(twin, b, FIVE)) for b in dispatch.BACKENDS] == [6, 6, 10]
    assert not caplog.records


def test_gradients_take_the_twin(card):
    x = torch.tensor(5.0, requires_grad=True)
    assert dispatch.dispatch(twin, "auto", x) == 6
    with pytest.raises(Unsupported, match="no gradient"):
        dispatch.dispatch(twin, "triton", x)
    with torch.no_grad():
        assert dispatch.dispatch(twin, "triton", x) == 10


def test_gradients_that_triton_gives(card, monkeypatch):
    monkeypatch.setattr(twin, "differentiable", True, raising=False)
    x = torch.tensor(5.0, requires_grad=True)
    assert [dispatch.dispatch(twin, b, x).item() for b in dispatch.BACKENDS] == [10, 6, 10]


@pytest.mark.parametrize("kernel", [merge, compact_sequence])
def test_compiled_code_takes_the_twin_where_a_gradient_is_wanted(kernel, card, monkeypatch):
    place, x = torch.arange(9)[None], torch.randn(1, 9, 4)
    args = {merge: (x, place // 3, 3), compact_sequence: (place > 3, 6, x, place, place > 5)}[kernel]
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = kernel(*args, backend="torch")
    x.requires_grad_()
    monkeypatch.setattr(dispatch, "_on_cuda", lambda tensors: torch.compiler.is_compiling())
    results = torch.compile(kernel, fullgraph=True, backend=keep)(*args)
    assert all(torch.equal(a, b) for a, b in zip(results, expected))
    assert graphs and not any("vtok" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    next(a for a in results if a.requires_grad).sum().backward()
    assert x.grad.abs().sum() > 0


def uninstalled(card, monkeypatch):
    monkeypatch.setattr(dispatch, "_installed", lambda: False)


def old(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))


def broken(card, monkeypatch):
    def fails(x):
        assert "vtok_pretended_triton" not in dispatch._broken, "tried again"
        raise RuntimeError("no gcc")

    card.twin = fails


@pytest.mark.parametrize(("harm", "reason"), [(uninstalled, "not installed"), (old, "is older"), (broken, "no gcc")])
def test_auto_falls_back_and_says_why_once(card, caplog, harm, reason):
    with pytest.MonkeyPatch.context() as patch:
        harm(card, patch)
        with pytest.raises((Unsupported, MissingExtra), match=reason):
            dispatch.dispatch(twin, "triton", FIVE)
        dispatch._broken.clear()
        with caplog.at_level(logging.WARNING, "vtok"):
            assert [float(dispatch.dispatch(twin, "auto", FIVE)) for _ in range(3)] == [6, 6, 6]
    assert len(caplog.records) == 1 and reason in caplog.text


def test_memory_that_runs_out_is_no_reason_to_fall_back(card):
    def full(x):
        raise torch.OutOfMemoryError

    card.twin = full
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.dispatch(twin, "auto", FIVE)
    assert not dispatch._broken


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("kernel", calls())
def test_compiled_code_has_no_break(kernel, card, monkeypatch, on_cuda):
    """On a CPU the compiler sees through the twin, on a card it sees one operation of torch.library."""
    call, graphs = calls()[kernel], []
    expected = call(backend="torch")

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(dispatch, "_on_cuda", lambda tensors: on_cuda and torch.compiler.is_compiling())
    for a, b in zip(torch.compile(call, fullgraph=True, backend=keep)(), expected):
        assert torch.equal(a, b)
    opaque = [node for graph in graphs for node in graph.graph.nodes if "vtok" in str(node.target)]
    assert len(opaque) == on_cuda


@pytest.mark.parametrize("kernel", calls())
def test_operations_of_torch_library(kernel, monkeypatch):
    """Schema, shapes without values, and tracing of each twin's operation, on the arguments that its kernel makes."""
    seen = []
    monkeypatch.setattr(
        importlib.import_module(f"vtok.kernels.{kernel}"),
        "dispatch",
        lambda twin, backend, *args: seen.append((twin, args)) or twin(*args),
    )
    calls()[kernel]()
    for twin, args in seen:
        torch.library.opcheck(twin.operation, args)
    assert seen


MULTIPLY = {"farthest_points", "greedy_dpp"}  # before they dispatch


@pytest.mark.parametrize("kernel", sorted(calls().keys() - MULTIPLY))
def test_shapes_on_the_meta_device(kernel):
    expected = calls()[kernel]()
    with torch.autocast("cpu", torch.bfloat16):  # which meta does not know
        made = calls("meta")[kernel]()
    for a, b in zip(made, expected):
        assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype


def test_using_kernels_on_a_cpu_imports_no_triton():
    code = """
import sys, torch
from vtok.kernels.attention_column_sums import attention_column_sums
from vtok.kernels.bipartite_match import bipartite_match
from vtok.kernels.farthest_points import farthest_points
from vtok.kernels.greedy_coverage import greedy_coverage
from vtok.kernels.greedy_dpp import greedy_dpp
x = torch.randn(1, 6, 4)
bipartite_match(x, 2), farthest_points(x, 2)
attention_column_sums(x[:, None], x[:, None], torch.tensor([[5]]), 1.0, torch.ones(1, 6, dtype=torch.bool))
assert not [m for m in sys.modules if m.split(".")[0] == "triton"]
"""
    passed, text = child(["-c", code], TRITON_INTERPRET="1")
    assert passed, text
