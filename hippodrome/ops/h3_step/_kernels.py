"""The kernel of h3_step: a program for a block of heads and one value channel j, over a few rows whose constants it shares."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS, _HEADS_OF_PAIRS = 32, 8
"""Heads of a program for p = 1 and above, with 32 modes: what four warps hold without spills."""
_REGISTERS = 128
"""A thread's share when four programs are to run on a multiprocessor at once."""
_ROWS = 8
_PROGRAMS = 512
"""Programs wanted before rows share one: about four for each multiprocessor of a large GPU."""


@triton.jit
def _kernel(
    q,
    k,
    v,
    taps,
    modes,
    weights,
    skip,
    ring,
    position,
    state,
    y,
    batch,
    heads,
    q_row,
    k_row,
    v_row,
    rows,
    P: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    N_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
):
    j = tl.program_id(1)
    h = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    h_real = h < heads
    t = tl.arange(0, T_BLOCK)
    width = heads * P
    # (re, im) pairs lie side by side: they are loaded as they lie, 16 bytes a thread, and then taken apart.
    part = tl.arange(0, 2 * N_BLOCK)
    flat = h[:, None] * (2 * N) + part[None, :]
    flat_real = h_real[:, None] & (part < 2 * N)[None, :]
    pairs: tl.constexpr = (HEADS, N_BLOCK, 2)
    mode_re, mode_im = tl.split(tl.reshape(tl.load(modes + flat, flat_real, 0.0), pairs))
    weight_re, weight_im = tl.split(tl.reshape(tl.load(weights + flat, flat_real, 0.0), pairs))
    passed = tl.zeros((HEADS,), tl.float32)
    if HAS_SKIP:
        passed = tl.load(skip + h, h_real, 0.0)

    first = tl.program_id(2) * rows
    for row in range(first, tl.minimum(first + rows, batch)):
        row_64 = tl.cast(row, tl.int64)
        newest = (tl.load(position + row) % T).to(tl.int32)
        age = (newest - t + T) % T
        past = (t < T) & (age > 0)
        value = tl.load(v + row_64 * v_row + h * P + j, h_real, 0.0).to(tl.float32)
        out = tl.zeros((HEADS,), tl.float32)
        for i in range(P):
            d = h * P + i
            # Asked for first, so that it is on its way while the filter is summed.
            at = state + ((row_64 * P + i) * P + j) * (heads * (2 * N)) + flat
            before = tl.load(at, flat_real, 0.0)
            key = tl.load(k + row_64 * k_row + d, h_real, 0.0).to(ring.dtype.element_ty)
            slots = ring + row_64 * (T * width)
            seen = past[:, None] & h_real[None, :]
            # The slot of the new key is never read, so that the program that writes it races with no other.
            old = tl.load(slots + t[:, None] * width + d[None, :], seen, 0.0).to(tl.float32)
            tap = tl.load(taps + age[:, None] * width + d[None, :], seen, 0.0)
            filtered = tl.sum(old * tap, 0) + tl.load(taps + d, h_real, 0.0) * key.to(tl.float32)
            if j == 0:
                tl.store(slots + newest * width + d, key, h_real)
            driven = filtered * value
            z_re, z_im = tl.split(tl.reshape(before.to(tl.float32), pairs))
            new_re = mode_re * z_re - mode_im * z_im + driven[:, None]
            new_im = mode_re * z_im + mode_im * z_re
            after = tl.reshape(tl.join(new_re, new_im), (HEADS, 2 * N_BLOCK))
            tl.store(at, after.to(state.dtype.element_ty), flat_real)
            s = tl.sum(weight_re * new_re - weight_im * new_im, 1) + passed * driven
            out += tl.load(q + row_64 * q_row + d, h_real, 0.0).to(tl.float32) * s
        tl.store(y + row_64 * width + h * P + j, out.to(y.dtype.element_ty), h_real)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    modes: Tensor,
    weights: Tensor,
    skip: Tensor | None,
    ring: Tensor,
    position: Tensor,
    state: Tensor,
) -> Tensor:
    """Writes ring and state in place; returns y (B, D). modes, weights and state end in (re, im) pairs."""
    batch, p, length = len(q), state.shape[1], ring.shape[1]
    heads, n_modes = modes.shape[:2]
    q, k, v = (x if x.stride(1) == 1 else x.contiguous() for x in (q, k, v))
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    n_block = triton.next_power_of_2(n_modes)
    most = _HEADS if p == 1 else _HEADS_OF_PAIRS
    block = max(1, min(most, triton.next_power_of_2(heads), most * 32 // n_block))
    blocks = triton.cdiv(heads, block)
    rows = max(1, min(_ROWS, batch * blocks * p // _PROGRAMS))
    _kernel[(blocks, p, triton.cdiv(batch, rows))](
        q,
        k,
        v,
        taps.contiguous(),
        modes.contiguous(),
        weights.contiguous(),
        modes if skip is None else skip.contiguous(),
        ring,
        position,
        state,
        y,
        batch,
        heads,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        rows,
        P=p,
        N=n_modes,
        T=length,
        N_BLOCK=n_block,
        T_BLOCK=triton.next_power_of_2(length),
        HEADS=block,
        HAS_SKIP=skip is not None,
        num_warps=4,
        maxnreg=_REGISTERS,
    )
    return y
