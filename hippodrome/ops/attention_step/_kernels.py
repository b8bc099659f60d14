"""The kernels of attention_step: a program a row, head of keys and share of its filled slots; another merges the shares."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE, _GROUP_TILE = 2048, 4096
"""Numbers of a tile of keys, slots times width: without groups so few that a thousand programs run at once."""
_LEAST = 128
"""Slots that are worth a program of their own."""


@triton.jit
def _turns(frequency, at, c, HALF: tl.constexpr):
    """For each channel the one it turns with, and what both count: x cos + partner sin."""
    partner = c
    cos = tl.full(c.shape, 1.0, tl.float32)
    sin = tl.zeros(c.shape, tl.float32)
    if HALF > 0:
        turns = c < 2 * HALF
        partner = tl.where(c < HALF, c + HALF, tl.where(turns, c - HALF, c))
        angle = at.to(tl.float32) * tl.load(frequency + c % HALF, turns, 0.0)
        cos = tl.cos(angle)
        sin = tl.where(c < HALF, -tl.sin(angle), tl.sin(angle))
    return partner, cos, sin


@triton.jit
def _own_token(k, v, keys, values, keys_at, row_64, group, newest, k_row, v_row, K: tl.constexpr, c, partner, cos, sin, writes):
    """The new key, turned, and value as they are stored, float32; stored by the one program that `writes`."""
    c_real = c < K
    at = k + row_64 * k_row + group * K
    key = tl.load(at + c, c_real, 0.0).to(tl.float32) * cos + tl.load(at + partner, c_real, 0.0).to(tl.float32) * sin
    key = key.to(keys.dtype.element_ty)
    value = tl.load(v + row_64 * v_row + group * K + c, c_real, 0.0).to(values.dtype.element_ty)
    tl.store(keys + keys_at + newest * K + c, key, c_real & writes)
    tl.store(values + keys_at + newest * K + c, value, c_real & writes)
    return key.to(tl.float32), value.to(tl.float32)


@triton.jit
def _attend_one(
    q,
    k,
    v,
    keys,
    values,
    position,
    frequency,
    y,
    parts,
    scale,
    groups,
    slots,
    q_row,
    k_row,
    v_row,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARES: tl.constexpr,
    HALF: tl.constexpr,
):
    """One query a head of keys (R = 1). Every lane of a tile has its own softmax, and they meet at the end."""
    pair = tl.program_id(0)
    share = tl.program_id(1)
    row_64 = (pair // groups).to(tl.int64)
    group = pair % groups
    at = tl.load(position + row_64)
    newest = (at % slots).to(tl.int32)
    filled = tl.minimum(at, slots).to(tl.int32)
    size = tl.cdiv(filled, SHARES * SLOTS) * SLOTS
    start = share * size
    stop = tl.minimum(start + size, filled)
    keys_at = pair.to(tl.int64) * slots * K
    c = tl.arange(0, K_BLOCK)
    c_real = c < K
    lane = tl.arange(0, SLOTS)
    partner, cos, sin = _turns(frequency, at, c, HALF)
    queries = q + row_64 * q_row + group * K
    query = tl.load(queries + c, c_real, 0.0).to(tl.float32) * cos
    query = (query + tl.load(queries + partner, c_real, 0.0).to(tl.float32) * sin) * scale

    top = tl.full((SLOTS,), -1e30, tl.float32)
    total = tl.zeros((SLOTS,), tl.float32)
    mixed = tl.zeros((SLOTS, K_BLOCK), tl.float32)
    for first in range(start, stop, SLOTS):
        slot = first + lane
        # The new token's slot holds what it replaces: not visible any more.
        real = (slot < stop) & (slot != newest)
        place = keys_at + slot[:, None] * K + c[None, :]
        inside = real[:, None] & c_real[None, :]
        key = tl.load(keys + place, inside, 0.0)
        value = tl.load(values + place, inside, 0.0)
        score = tl.where(real, tl.sum(key.to(tl.float32) * query[None, :], 1), -float("inf"))
        higher = tl.maximum(top, score)
        shrink = tl.exp2(top - higher)
        p = tl.exp2(score - higher)
        total = total * shrink + p
        mixed = mixed * shrink[:, None] + p[:, None] * value.to(tl.float32)
        top = higher

    mine = share == SHARES - 1
    key, value = _own_token(k, v, keys, values, keys_at, row_64, group, newest, k_row, v_row, K, c, partner, cos, sin, mine)
    score = tl.where(mine, tl.sum(key * query, 0), -float("inf"))
    highest = tl.maximum(tl.max(top, 0), score)
    shrink = tl.exp2(top - highest)
    p = tl.exp2(score - highest)
    weight = tl.sum(total * shrink, 0) + p
    out = tl.sum(mixed * shrink[:, None], 0) + p * value
    if SHARES == 1:
        tl.store(y + pair.to(tl.int64) * K + c, (out / weight).to(y.dtype.element_ty), c_real)
    else:
        part = parts + (pair.to(tl.int64) * SHARES + share) * (K + 2)
        tl.store(part + c, out, c_real)
        tl.store(part + K, highest)
        tl.store(part + K + 1, weight)


@triton.jit
def _attend_group(
    q,
    k,
    v,
    keys,
    values,
    position,
    frequency,
    y,
    parts,
    scale,
    groups,
    slots,
    q_row,
    k_row,
    v_row,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARES: tl.constexpr,
    HALF: tl.constexpr,
):
    """R queries share a head of keys: matrix products, padded to the 16 rows that the tensor cores need."""
    pair = tl.program_id(0)
    share = tl.program_id(1)
    row_64 = (pair // groups).to(tl.int64)
    group = pair % groups
    at = tl.load(position + row_64)
    newest = (at % slots).to(tl.int32)
    filled = tl.minimum(at, slots).to(tl.int32)
    size = tl.cdiv(filled, SHARES * SLOTS) * SLOTS
    start = share * size
    stop = tl.minimum(start + size, filled)
    keys_at = pair.to(tl.int64) * slots * K
    c = tl.arange(0, K_BLOCK)
    c_real = c < K
    lane = tl.arange(0, SLOTS)
    r = tl.arange(0, R_BLOCK)
    rows_real = (r < R)[:, None] & c_real[None, :]
    partner, cos, sin = _turns(frequency, at, c, HALF)
    queries = q + row_64 * q_row + (group * R + r)[:, None] * K
    query = tl.load(queries + c[None, :], rows_real, 0.0).to(tl.float32) * cos[None, :]
    query += tl.load(queries + partner[None, :], rows_real, 0.0).to(tl.float32) * sin[None, :]
    query = query.to(keys.dtype.element_ty)

    top = tl.full((R_BLOCK,), -1e30, tl.float32)
    total = tl.zeros((R_BLOCK,), tl.float32)
    mixed = tl.zeros((R_BLOCK, K_BLOCK), tl.float32)
    for first in range(start, stop, SLOTS):
        slot = first + lane
        real = (slot < stop) & (slot != newest)
        turned = keys_at + slot[None, :] * K + c[:, None]
        key = tl.load(keys + turned, real[None, :] & c_real[:, None], 0.0)
        value = tl.load(values + keys_at + slot[:, None] * K + c[None, :], real[:, None] & c_real[None, :], 0.0)
        score = tl.dot(query, key, input_precision="ieee") * scale
        score = tl.where(real[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(score - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        top = higher

    mine = share == SHARES - 1
    key, value = _own_token(k, v, keys, values, keys_at, row_64, group, newest, k_row, v_row, K, c, partner, cos, sin, mine)
    score = tl.where(mine, tl.sum(key[None, :] * query.to(tl.float32), 1) * scale, -float("inf"))
    highest = tl.maximum(top, score)
    shrink = tl.exp2(top - highest)
    p = tl.exp2(score - highest)
    weight = total * shrink + p
    out = mixed * shrink[:, None] + p[:, None] * value[None, :]
    heads = pair.to(tl.int64) * R + r
    if SHARES == 1:
        out = (out / weight[:, None]).to(y.dtype.element_ty)
        tl.store(y + heads[:, None] * K + c[None, :], out, rows_real)
    else:
        part = parts + (heads * SHARES + share) * (K + 2)
        tl.store(part[:, None] + c[None, :], out, rows_real)
        tl.store(part + K, highest, r < R)
        tl.store(part + K + 1, weight, r < R)


@triton.jit
def _merge(parts, y, K: tl.constexpr, K_BLOCK: tl.constexpr, SHARES: tl.constexpr):
    """A head's output from the unnormalised sums, maxima and weights of its shares."""
    head = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, K_BLOCK)
    part = parts + (head * SHARES + tl.arange(0, SHARES)) * (K + 2)
    top = tl.load(part + K)
    shrink = tl.exp2(top - tl.max(top, 0))
    weight = tl.sum(tl.load(part + K + 1) * shrink, 0)
    out = tl.load(part[:, None] + c[None, :], (c < K)[None, :], 0.0)
    out = tl.sum(out * shrink[:, None], 0) / weight
    tl.store(y + head * K + c, out.to(y.dtype.element_ty), c < K)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    frequency: Tensor | None,
    scale: float,
    programs: int,
) -> Tensor:
    """Writes k and v into keys and values; returns y (B, H, K). A head's slots are shared among up to `programs` in all."""
    (batch, heads, width), (_, groups, slots, _) = q.shape, keys.shape
    q, k, v = (x if x.stride()[1:] == (width, 1) else x.contiguous() for x in (q, k, v))
    queries = heads // groups
    k_block = triton.next_power_of_2(width) if queries == 1 else max(16, triton.next_power_of_2(width))
    tile = max(16, (_TILE if queries == 1 else _GROUP_TILE) // k_block)
    wanted = min(triton.cdiv(programs, batch * groups), triton.cdiv(slots, _LEAST), 64)
    shares = triton.next_power_of_2(wanted)
    y = torch.empty(batch, heads, width, dtype=q.dtype, device=q.device)
    parts = y if shares == 1 else torch.empty(batch * heads, shares, width + 2, dtype=torch.float32, device=q.device)
    kernel = _attend_one if queries == 1 else _attend_group
    kernel[(batch * groups, shares)](
        q,
        k,
        v,
        keys,
        values,
        position,
        position if frequency is None else frequency,
        y,
        parts,
        scale * math.log2(math.e),
        groups,
        slots,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        R=queries,
        R_BLOCK=max(16, triton.next_power_of_2(queries)),
        K=width,
        K_BLOCK=k_block,
        SLOTS=tile,
        SHARES=shares,
        HALF=0 if frequency is None else len(frequency),
        num_warps=4,
    )
    if shares > 1:
        _merge[(batch * heads,)](parts, y, K=width, K_BLOCK=k_block, SHARES=shares, num_warps=2)
    return y
