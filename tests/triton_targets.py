"""Every Triton kernel compiles for a card, without one: what the interpreter lets pass, the compiler may not.

Run by `test_triton.py` in a process of its own, in which Triton is not the interpreter.
"""

import importlib
import pkgutil

import pytest
import torch
import triton
from test_triton import calls
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vtok.kernels

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
KERNELS = [m.name for m in pkgutil.iter_modules(vtok.kernels.__path__) if m.name.endswith("_triton")]


def compile_for_a_card(kernel, args, num_warps=4, num_stages=3, **constants):
    bound = dict(zip(kernel.arg_names, args)) | constants
    signature, fixed = {}, {}
    for parameter in kernel.params:
        value = bound[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], fixed[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32), options=options)
    assert ".target sm_90" in made.asm["ptx"]
    assert made.metadata.shared <= 227 * 1024  # what a block may have on an H100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", calls())
def test_compiles_for_a_card(name, dtype, monkeypatch):
    launched, entries = [], []

    def instead_of_a_launch(kernel, grid):
        launched.append(kernel)
        return lambda *args, **constants: compile_for_a_card(kernel, args, **constants)

    monkeypatch.setattr(triton.JITFunction, "__getitem__", instead_of_a_launch)
    for file in KERNELS:
        module = importlib.import_module(f"vtok.kernels.{file}")
        if hasattr(module, "takes_half"):
            monkeypatch.setattr(module, "takes_half", lambda *tensors: {x.dtype for x in tensors} == {torch.bfloat16})
    public = importlib.import_module(f"vtok.kernels.{name}")
    monkeypatch.setattr(public, "dispatch", lambda twin, backend, *args: entries.append((twin, args)) or twin(*args))
    calls()[name]()
    for twin, args in entries:
        floats = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in args]
        args = [a.to(dtype).requires_grad_(twin.differentiable) if is_float else a for a, is_float in zip(args, floats)]
        result = getattr(importlib.import_module(f"vtok.kernels.{name}_triton"), twin.__name__)(*args)
        if twin.differentiable:
            sum(part.float().sum() for part in result if part.requires_grad).backward()
    assert len(set(launched)) > any(twin.differentiable for twin, _ in entries)
