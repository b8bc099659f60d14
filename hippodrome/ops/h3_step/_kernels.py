"""The kernel of h3_step: a program for a block of heads and one value channel j, over a few rows whose constants it shares."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS, HEADS_OF_PAIRS = 32, 8
"""Heads of a program for p = 1 and above, with 32 modes: what four warps hold without spills."""
STAGES = 3
"""Turns of the loop in flight, the one computed included."""
PROGRAMS = 3
"""Programs that a multiprocessor runs at once; rows are shared out so that all run."""


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
    STAGES: tl.constexpr,
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
    held = -1
    tap = tl.zeros((T_BLOCK, HEADS), tl.float32)
    out = tl.zeros((HEADS,), tl.float32)
    # One flat loop over rows and key channels i, whose loads for later turns are on their way while one is computed.
    for turn in tl.range(0, (tl.minimum(first + rows, batch) - first) * P, num_stages=STAGES):
        row = tl.cast(first + turn // P, tl.int64)
        i = turn % P
        d = h * P + i
        at = state + ((row * P + i) * P + j) * (heads * (2 * N)) + flat
        before = tl.load(at, flat_real, 0.0)
        slots = ring + row * (T * width)
        old = tl.load(slots + t[:, None] * width + d[None, :], (t < T)[:, None] & h_real[None, :], 0.0)
        key = tl.load(k + row * k_row + d, h_real, 0.0).to(ring.dtype.element_ty)
        value = tl.load(v + row * v_row + h * P + j, h_real, 0.0).to(tl.float32)
        query = tl.load(q + row * q_row + d, h_real, 0.0).to(tl.float32)

        newest = (tl.load(position + row) % T).to(tl.int32)
        age = (newest - t + T) % T
        # Rows prefilled together stand at one position, and share its taps.
        if P > 1 or newest != held:
            tap = tl.load(taps + age[:, None] * width + d[None, :], (t < T)[:, None] & h_real[None, :], 0.0)
        held = newest
        # What the new key's slot held counts no more; another program may be writing there.
        seen = tl.where((age > 0)[:, None], old, key[None, :]).to(tl.float32)
        driven = tl.sum(seen * tap, 0) * value
        if j == 0:
            tl.store(slots + newest * width + d, key, h_real)

        z_re, z_im = tl.split(tl.reshape(before.to(tl.float32), pairs))
        new_re = mode_re * z_re - mode_im * z_im + driven[:, None]
        new_im = mode_re * z_im + mode_im * z_re
        after = tl.reshape(tl.join(new_re, new_im), (HEADS, 2 * N_BLOCK))
        tl.store(at, after.to(state.dtype.element_ty), flat_real)
        s = tl.sum(weight_re * new_re - weight_im * new_im, 1) + passed * driven
        out = tl.where(i == 0, query * s, out + query * s)
        tl.store(y + row * width + h * P + j, out.to(y.dtype.element_ty), h_real & (i == P - 1))


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
    processors: int,
) -> Tensor:
    """Writes ring and state in place; returns y (B, D). modes, weights and state end in (re, im) pairs."""
    batch, p, length = len(q), state.shape[1], ring.shape[1]
    heads, n_modes = modes.shape[:2]
    q, k, v = (x if x.stride(1) == 1 else x.contiguous() for x in (q, k, v))
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    n_block = triton.next_power_of_2(n_modes)
    most = HEADS if p == 1 else HEADS_OF_PAIRS
    block = max(1, min(most, triton.next_power_of_2(heads), most * 32 // n_block))
    blocks = triton.cdiv(heads, block)
    rows = triton.cdiv(batch * blocks * p, PROGRAMS * processors)
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
        STAGES=STAGES,
        num_warps=4,
    )
    return y
