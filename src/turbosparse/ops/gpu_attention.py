"""Triton kernels of a decoding step beside its matrices: norms, positions, attention over caches.

A step reads T tokens of one or more sequences. Each brings the address of its sequence's cache,
halves ``[layers, 2, KV, context, D]``, the context of that, and its own position. The references
are `Norm`, `Rotation` and `Attention` in ``engine/model.py``.

Shapes: T tokens, H hidden, N query heads, KV key-value heads, D head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that share the positions of a head, 64 at a time; the shares do not depend on the length
# of the text or on other tokens. Not tuned, for no card was there.
SPLITS, POSITIONS = 16, 64


class Where(NamedTuple):
    """What a step writes and reads of the caches; all ``[T]``, on the device."""

    caches: Tensor  # int64, addresses
    contexts: Tensor  # int64
    positions: Tensor  # int64


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of ``[T, H]``, or without a bias RMSNorm."""
    out = torch.empty_like(x)
    width = x.shape[1]
    _norm[(len(x),)](out, x, weight, bias, eps, width, triton.next_power_of_2(width))
    return out


def keep(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, where: Where, layer: int, head: int
) -> Tensor:
    """Write turned keys and values ``[T, KV · D]`` into the caches; return the turned queries.

    `q` is ``[T, N · D]``, `cos` and `sin` ``[T, features that turn]``, `head` D.
    """
    turned = torch.empty_like(q)
    heads, kv_heads = q.shape[1] // head, k.shape[1] // head
    _keep[len(q), heads + 2 * kv_heads](
        turned, q, k, v, cos, sin, *where, layer, heads, kv_heads, head, cos.shape[1],
        triton.next_power_of_2(head),
    )  # fmt: skip
    return turned


def attend(
    q: Tensor, where: Where, layer: int, head: int, kv_heads: int, window: int | None
) -> Tensor:
    """Attention of turned queries ``[T, N · D]`` over the cache up to each token's position.

    Returns:
        ``[T, N · D]``.
    """
    tokens, group = len(q), q.shape[1] // head // kv_heads
    # a product of matrices needs 16 rows and columns
    rows, width = (max(16, triton.next_power_of_2(size)) for size in (group, head))
    parts = torch.empty(tokens, kv_heads, SPLITS, rows, width, device=q.device)
    sums = torch.empty(2, tokens, kv_heads, SPLITS, rows, device=q.device)
    _attend[tokens, kv_heads, SPLITS](
        parts, sums, q, *where, layer, head**-0.5, window or 0,
        kv_heads, group, head, rows, width, SPLITS, POSITIONS,
    )  # fmt: skip
    out = torch.empty_like(q)
    _join[tokens, kv_heads, group](out, parts, sums, kv_heads, group, head, rows, width, SPLITS)
    return out


@triton.jit
def _norm(out, x, weight, bias, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: tokens."""
    at, first = tl.arange(0, BLOCK), tl.program_id(0) * WIDTH
    here = at < WIDTH
    value = tl.load(x + first + at, here, 0.0)
    if bias is not None:
        value = tl.where(here, value - tl.sum(value, 0) / WIDTH, 0.0)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / WIDTH + eps)
    value = tl.load(weight + at, here, 0.0) * (value * scale)
    if bias is not None:
        value += tl.load(bias + at, here, 0.0)
    tl.store(out + first + at, value, here)


@triton.jit
def _place(caches, contexts, token, layer, kind, kv, KV: tl.constexpr, D: tl.constexpr):
    """Where the keys (kind 0) or values (1) of a head begin in the cache of a token."""
    base = tl.load(caches + token).to(tl.pointer_type(tl.float16))
    return base + ((layer * 2 + kind) * KV + kv) * tl.load(contexts + token) * D


@triton.jit
def _keep(
    turned, q, k, v, cos, sin, caches, contexts, positions, layer,
    N: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: tokens; heads of queries, keys and values."""
    token, head, at = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    x, kv = q + (token * N + head) * D, head - N
    if head >= N + KV:
        kv -= KV
        x = v + (token * KV + kv) * D
    elif head >= N:
        x = k + (token * KV + kv) * D
    value = tl.load(x + at, at < D, 0.0)
    if head < N + KV:
        turns, left = at < TURNED, at < TURNED // 2
        other = tl.load(x + tl.where(left, at + TURNED // 2, at - TURNED // 2), turns, 0.0)
        c = tl.load(cos + token * TURNED + at, turns, 1.0)
        s = tl.load(sin + token * TURNED + at, turns, 0.0)
        value = value * c + tl.where(left, -other, other) * s
    if head < N:
        tl.store(turned + (token * N + head) * D + at, value, at < D)
    else:
        kind = (head >= N + KV).to(tl.int64)
        to = _place(caches, contexts, token, layer, kind, kv, KV, D)
        to += tl.load(positions + token) * D
        tl.store(to + at, value.to(tl.float16), at < D)


@triton.jit
def _attend(
    parts, sums, q, caches, contexts, positions, layer, scale, window,
    KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Of every SPLITSth block of positions: largest scores, and sums of weights and of values.

    Grid: tokens, key-value heads, shares.
    """
    token, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, at = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    query = q + ((token * KV + kv) * GROUP + row[:, None]) * D + at[None, :]
    queries = tl.load(query, (row < GROUP)[:, None] & (at < D)[None, :], 0.0) * scale
    keys = _place(caches, contexts, token, layer, 0, kv, KV, D)
    values = _place(caches, contexts, token, layer, 1, kv, KV, D)
    last = tl.load(positions + token)
    oldest = tl.where(window > 0, tl.maximum(last - window + 1, 0), 0)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    # the first block of this share that is not before the window
    block = oldest // POSITIONS
    block += (split - block % SPLITS + SPLITS) % SPLITS
    for first in range(block * POSITIONS, last + 1, SPLITS * POSITIONS):
        position = first + tl.arange(0, POSITIONS)
        seen = (position >= oldest) & (position <= last)
        place, mask = position[:, None] * D + at[None, :], seen[:, None] & (at < D)[None, :]
        key = tl.load(keys + place, mask, 0.0).to(tl.float32)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee")
        scores = tl.where(seen[None, :], scores, float("-inf"))
        top = tl.maximum(most, tl.max(scores, 1))
        shrink, weight = tl.exp(most - top), tl.exp(scores - top[:, None])
        value = tl.load(values + place, mask, 0.0).to(tl.float32)
        total = total * shrink[:, None] + tl.dot(weight, value, input_precision="ieee")
        weights, most = weights * shrink + tl.sum(weight, 1), top
    share = (token * KV + kv) * SPLITS + split
    tl.store(parts + (share * ROWS + row[:, None]) * WIDTH + at[None, :], total)
    tl.store(sums + share * ROWS + row, most)
    tl.store(sums + (tl.num_programs(0) * KV * SPLITS + share) * ROWS + row, weights)


@triton.jit
def _join(
    out, parts, sums,
    KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, key-value heads, queries of its group."""
    token, kv, query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    share = ((token * KV + kv) * SPLITS + tl.arange(0, SPLITS)) * ROWS + query
    at = tl.arange(0, WIDTH)
    most = tl.load(sums + share)
    factor = tl.exp(most - tl.max(most, 0))  # 0 for a share without positions
    weights = tl.load(sums + tl.num_programs(0) * KV * SPLITS * ROWS + share) * factor
    values = tl.load(parts + share[:, None] * WIDTH + at[None, :]) * factor[:, None]
    to = out + ((token * KV + kv) * GROUP + query) * D + at
    tl.store(to, tl.sum(values, 0) / tl.sum(weights, 0), at < D)
