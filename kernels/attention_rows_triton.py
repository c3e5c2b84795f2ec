"""`attention_rows` in Triton, and what it shares with `attention_column_sums`: one block of logits, and their log-sum.

The heads that share keys are one matrix: row m of group g is head g * H/Hkv + m // R and of it the query rows[m % R].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok.kernels.dispatch import takes_half

BLOCK_N = 64  # keys
SPLITS = 16  # parts of the keys that are summed by themselves, so that one query too fills a card


def softmax_rows(query: Tensor, key: Tensor, rows: Tensor, scaling: float, valid: Tensor) -> Tensor:
    """[B, H, R, L]; see the twin in `attention_rows`. Twice over the keys: for the log-sum-exp, then for the rows."""
    common, sizes = arguments(query, key, rows, scaling, valid)
    batch, groups, length, n_rows = *key.shape[:3], rows.shape[1]
    out = torch.empty(batch, query.shape[1], n_rows, length, dtype=torch.float32, device=key.device)
    if out.numel():
        total = query.shape[1] // groups * n_rows
        grid = (triton.cdiv(length, BLOCK_N), triton.cdiv(total, sizes["BLOCK_M"]), batch * groups)
        _write_rows[grid](out, log_sum_exp(common, sizes, query, key, rows), *common, **sizes)
    return out


def arguments(query: Tensor, key: Tensor, rows: Tensor, scaling: float, valid: Tensor) -> tuple[tuple, dict]:
    """What all kernels here take: tensors with their strides and sizes, and their compile-time constants."""
    (heads, n_queries, width), (groups, length) = query.shape[1:], key.shape[1:3]
    each, n_rows = heads // groups, rows.shape[1]
    strides = (*query.stride(), *key.stride(), *rows.stride(), *valid.stride())
    common = (query, key, rows, valid, float(scaling), *strides, groups, each, n_queries, length, n_rows, width)
    sizes = {
        "HALF": takes_half(query, key),
        "BLOCK_M": 64 if each * n_rows > 32 and width <= 128 else 16,
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "num_stages": 3 if takes_half(query, key) else 2,  # fp32 keys of 256 values three times over are too much
    }
    return common, sizes


def log_sum_exp(common: tuple, sizes: dict, query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """[B, H, R] of the logits of each row over the keys that it sees, -inf where it sees none."""
    batch, groups, length = key.shape[:3]
    heads, n_rows = query.shape[1], rows.shape[1]
    span = BLOCK_N * triton.cdiv(triton.cdiv(length, BLOCK_N), SPLITS)  # keys of one part
    splits = triton.cdiv(length, span)
    parts = torch.empty(splits, batch, heads, n_rows, dtype=torch.float32, device=key.device)
    grid = (splits, triton.cdiv(heads // groups * n_rows, sizes["BLOCK_M"]), batch * groups)
    _log_sum_exp[grid](parts, span, *common, **sizes)
    return parts.logsumexp(0)


@triton.jit
def load_queries(
    query, rows, stride_qb, stride_qh, stride_qq, stride_qd, stride_rb, stride_rr, b, g, m, each, past, n_rows, width,
    HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[M, D] the rows m of group g, zeros for those that there are not, and [M] their places, -1 for none."""
    head, r = g * each + m // n_rows, m % n_rows
    row = tl.load(rows + b * stride_rb + r * stride_rr, m < each * n_rows, -1)
    d = tl.arange(0, BLOCK_D)
    start = query + b * stride_qb + head.to(tl.int64) * stride_qh + (row - past).to(tl.int64) * stride_qq
    values = tl.load(start[:, None] + d[None, :] * stride_qd, (row >= past)[:, None] & (d < width)[None, :], 0.0)
    return values if HALF else values.to(tl.float32), row


@triton.jit
def logits(
    values, row, key, valid, stride_kb, stride_kg, stride_kl, stride_kd, stride_vb, stride_vl, b, g, n, length, width,
    scaling, HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[M, N] of queries and the keys n, -inf where a query does not see one. Keys of padding are not read."""
    d = tl.arange(0, BLOCK_D)
    there = tl.load(valid + b * stride_vb + n * stride_vl, n < length, 0) != 0
    start = key + b * stride_kb + g.to(tl.int64) * stride_kg + n.to(tl.int64) * stride_kl
    keys = tl.load(start[None, :] + d[:, None] * stride_kd, there[None, :] & (d < width)[:, None], 0.0)  # [D, N]
    if HALF:
        out = tl.dot(values, keys)
    else:
        out = tl.dot(values, keys.to(tl.float32), input_precision="ieee")
    return tl.where(there[None, :] & (n[None, :] <= row[:, None]), out * scaling, -float("inf"))


@triton.jit
def _log_sum_exp(
    parts, span,
    query, key, rows, valid, scaling,
    stride_qb, stride_qh, stride_qq, stride_qd, stride_kb, stride_kg, stride_kl, stride_kd,
    stride_rb, stride_rr, stride_vb, stride_vl,
    groups, each, n_queries, length, n_rows, width,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(2).to(tl.int64)
    b, g = pair // groups, pair % groups
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    values, row = load_queries(
        query, rows, stride_qb, stride_qh, stride_qq, stride_qd, stride_rb, stride_rr, b, g, m, each,
        length - n_queries, n_rows, width, HALF, BLOCK_D,
    )  # fmt: skip
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first = tl.program_id(0) * span
    last = tl.minimum(tl.minimum(first + span, length), tl.max(row, 0).to(tl.int32) + 1)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x = logits(
            values, row, key, valid, stride_kb, stride_kg, stride_kl, stride_kd, stride_vb, stride_vl, b, g, n, length,
            width, scaling, HALF, BLOCK_D,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(x, 1))
        level = tl.where(higher == -float("inf"), 0.0, higher)  # -inf - -inf is not a number
        total = total * tl.exp(top - level) + tl.sum(tl.exp(x - level[:, None]), 1)
        top = higher
    level = tl.where(top == -float("inf"), 0.0, top)
    out = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + pair) * each * n_rows + m
    tl.store(parts + out, level + tl.log(total), m < each * n_rows)


@triton.jit
def _write_rows(
    out, sums,
    query, key, rows, valid, scaling,
    stride_qb, stride_qh, stride_qq, stride_qd, stride_kb, stride_kg, stride_kl, stride_kd,
    stride_rb, stride_rr, stride_vb, stride_vl,
    groups, each, n_queries, length, n_rows, width,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(2).to(tl.int64)
    b, g = pair // groups, pair % groups
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    values, row = load_queries(
        query, rows, stride_qb, stride_qh, stride_qq, stride_qd, stride_rb, stride_rr, b, g, m, each,
        length - n_queries, n_rows, width, HALF, BLOCK_D,
    )  # fmt: skip
    x = logits(
        values, row, key, valid, stride_kb, stride_kg, stride_kl, stride_kd, stride_vb, stride_vl, b, g, n, length,
        width, scaling, HALF, BLOCK_D,
    )  # fmt: skip
    at = pair * each * n_rows + m
    x = tl.exp(x - tl.load(sums + at, m < each * n_rows, 0.0)[:, None])
    tl.store(out + at[:, None] * length + n[None, :], x, (m < each * n_rows)[:, None] & (n < length)[None, :])
