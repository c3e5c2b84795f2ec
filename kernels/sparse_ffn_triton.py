"""`sparse_ffn` in Triton: two launches, which read each weight once for every 16 tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok.kernels.dispatch import takes_half

BLOCK_T = 16  # tokens, the fewest that a tensor core takes
BLOCK_R = 16  # neurons, then outputs of a program: few, so that one token too fills a card


def gated_sum(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """[B, T, D]; see the twin in `sparse_ffn`. Each program owns some neurons, then some outputs, and sums in fp32.

    All of any strides. What goes from the first launch to the second is of x's type where that is a half type, and
    filled up with zeros to whole blocks of neurons, so that it can be read many values at a time.
    """
    (batch, t, width), k = x.shape, gate.shape[1]
    half, filled = takes_half(x, gate, up, down), BLOCK_R * triton.cdiv(k, BLOCK_R)
    inner = torch.empty(batch, t, filled, dtype=x.dtype if half else torch.float32, device=x.device)
    out = torch.empty(batch, t, width, dtype=x.dtype, device=x.device)
    sizes = {"HALF": half, "BLOCK_T": BLOCK_T, "BLOCK_R": BLOCK_R, "num_stages": 4}
    length = 128 if half else 64  # of a step along the sums
    if inner.numel():
        grid = (filled // BLOCK_R, triton.cdiv(t, BLOCK_T), batch)
        strides = (*x.stride(), *gate.stride(), *up.stride())
        _neurons[grid](
            inner, x, gate, up, *strides, t, k, filled, width, ACTIVATION=activation, BLOCK_C=length, **sizes
        )
    if out.numel():
        grid = (triton.cdiv(width, BLOCK_R), triton.cdiv(t, BLOCK_T), batch)
        _outputs[grid](out, inner, down, *down.stride(), t, k, filled, width, BLOCK_C=2 * length, **sizes)
    return out


@triton.jit
def _activate(x, NAME: tl.constexpr):
    if NAME == "silu":
        return x / (1 + tl.exp(-x))
    elif NAME == "gelu":
        return 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh(z)) / 2 is the logistic function of 2 z
        return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(NAME == "relu")
        return tl.where(x < 0, 0.0, x)  # not a number stays so


@triton.jit
def _product(x, weight, total, HALF: tl.constexpr):
    """`total` [T, R] and x [T, C] times weight [C, R]."""
    if HALF:
        return tl.dot(x, weight, total)
    else:
        return tl.dot(x.to(tl.float32), weight.to(tl.float32), total, input_precision="ieee")


@triton.jit
def _neurons(
    inner, x, gate, up,
    stride_xb, stride_xt, stride_xc, stride_gb, stride_gk, stride_gc, stride_ub, stride_uk, stride_uc,
    t, k, filled, width, ACTIVATION: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[B, T, filled] activation(x Wg) * (x Wu), behind the K neurons zeros."""
    b = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    neuron = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tokens = x + b * stride_xb + token.to(tl.int64)[:, None] * stride_xt  # [T, 1]
    gates = gate + b * stride_gb + neuron.to(tl.int64)[None, :] * stride_gk  # [1, R]
    ups = up + b * stride_ub + neuron.to(tl.int64)[None, :] * stride_uk
    gated = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    other = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for low in range(0, width, BLOCK_C):
        c = low + tl.arange(0, BLOCK_C)
        here = (c < width)[:, None] & (neuron < k)[None, :]
        values = tl.load(tokens + c[None, :] * stride_xc, (token < t)[:, None] & (c < width)[None, :], 0.0)
        gated = _product(values, tl.load(gates + c[:, None] * stride_gc, here, 0.0), gated, HALF)
        other = _product(values, tl.load(ups + c[:, None] * stride_uc, here, 0.0), other, HALF)
    at = (b * t + token)[:, None] * filled + neuron[None, :]
    values = tl.where((neuron < k)[None, :], _activate(gated, ACTIVATION) * other, 0.0)
    tl.store(inner + at, values, (token < t)[:, None])


@triton.jit
def _outputs(
    out, inner, down, stride_db, stride_dk, stride_dc, t, k, filled, width,
    HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[B, T, D] inner Wd."""
    b = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tokens = inner + (b * t + token)[:, None] * filled  # [T, 1]
    columns = down + b * stride_db + place.to(tl.int64)[None, :] * stride_dc  # [1, R]
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for low in range(0, k, BLOCK_C):
        neuron = low + tl.arange(0, BLOCK_C)
        values = tl.load(tokens + neuron[None, :], (token < t)[:, None] & (neuron < filled)[None, :], 0.0)
        here = (neuron < k)[:, None] & (place < width)[None, :]
        weights = tl.load(columns + neuron.to(tl.int64)[:, None] * stride_dk, here, 0.0)
        total = _product(values, weights, total, HALF)
    at = (b * t + token)[:, None] * width + place[None, :]
    tl.store(out + at, total, (token < t)[:, None] & (place < width)[None, :])
