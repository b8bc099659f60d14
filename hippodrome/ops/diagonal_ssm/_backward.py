"""The backward of diagonal_ssm on the GPU: a leaf of its own, three passes of Triton programs. See `_gradients.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops._op import announced, on_its_device
from hippodrome.ops.diagonal_ssm._tiling import PROGRAMS, Tiling, alike, counts, either, layout, prepare, repeated


@torch.library.custom_op("hippodrome::diagonal_fused_backward", mutates_args=(), device_types="cuda")
@announced("diagonal_ssm's backward")
@on_its_device
def fused_backward(
    dy: Tensor,
    dcarry: Tensor | None,
    begin: Tensor,
    u: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    taps: Tensor | None,
    log_modes: Tensor,
    weights: Tensor,
    skip: Tensor | None,
    past: Tensor | None,
    state: Tensor | None,
    carry: bool,
) -> list[Tensor]:
    """Gradients of u, pre, post, taps, log_modes, weights, skip and state; of those not given they are empty."""
    from hippodrome.ops.diagonal_ssm import _gradients as kernels

    if dy.stride() != u.stride():
        dy = torch.empty_like(u).copy_(dy)
    modes = log_modes.shape[1]
    plan = Tiling.of(modes, u.dtype)
    groups, span = plan.pieces(*u.shape)
    tables = prepare(plan, log_modes, weights, skip, groups, span, u.dtype, backward=True)
    grads = _gradients(u, pre, post, taps, log_modes, weights, skip, state)
    du, dpre, dpost, dtaps, dmodes, dweights, dskip, dstate = grads

    plain = taps is None and pre is None
    w, dw = (u, du) if plain else (torch.empty_like(u), torch.empty_like(u))
    states = _trace(plan, u, past, pre, post, dy, w, dpost, taps, weights, tables, begin if groups > 1 else state)
    adjoint = _adjoint(plan, dy, dcarry, post, weights, state, dstate, tables)
    part_first, part_modes = _sweep(plan, dy, dcarry, w, post, dw, weights, tables, states, adjoint, state, dstate)
    part_taps = part_first if plain else _spread(plan, u, past, pre, dw, du, dpre, taps, part_first)
    kernels.finish[u.shape[1],](
        log_modes, weights, part_first, part_taps, part_modes, dmodes, dweights, dskip, dtaps,
        modes, 0 if taps is None else taps.shape[1], part_taps.shape[1], part_first.shape[1],
        T=plan.T, N=plan.N, HAS_SKIP=skip is not None, HAS_FIR=taps is not None,
    )  # fmt: skip
    return grads


def _trace(
    plan: Tiling, u: Tensor, past: Tensor | None, pre: Tensor | None, post: Tensor | None, dy: Tensor, w: Tensor, dpost: Tensor,
    taps: Tensor | None, weights: Tensor, tables: tuple[Tensor, Tensor, Tensor], begin: Tensor | None,
) -> Tensor:  # fmt: skip
    """The states before all chunks, for `_sweep`; w and dpost are filled."""
    from hippodrome.ops.diagonal_ssm import _gradients as kernels

    batch, channels, length = u.shape
    groups, span = plan.pieces(batch, channels, length)
    first, powers, decay = tables
    tiles = -(-batch * groups // plan.R)
    states = powers.new_empty(channels, tiles, span // plan.T, plan.R, 2 * plan.N)
    signals = (u, either(past, u), either(pre, u), dy, w, u if post is None else dpost)
    strides = [size for signal in signals for size in signal.stride()]
    del strides[5]  # The past is contiguous.
    kernels.trace[channels, tiles](
        *signals, first, either(taps, first), weights, powers, decay, either(begin, first), states,
        batch * groups, groups, span, length, weights.shape[1], *counts(u, taps, past, pre), *strides,
        HAS_FIR=taps is not None, HAS_PRE=pre is not None, HAS_POST=post is not None, HAS_PAST=past is not None,
        HAS_BEGIN=begin is not None, ALIKE=alike(u, pre, dy, w, None if post is None else dpost),
        REPEAT=repeated(u, pre), **layout(plan, u.dtype),
    )  # fmt: skip
    return states


def _adjoint(
    plan: Tiling, dy: Tensor, dcarry: Tensor | None, post: Tensor | None, weights: Tensor, state: Tensor | None, dstate: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
) -> Tensor | None:  # fmt: skip
    """The adjoints (rows, H, N, 2) after the pieces of all sequences, and into dstate that before them all. None: zero."""
    from hippodrome.ops.diagonal_ssm import _gradients as kernels
    from hippodrome.ops.diagonal_ssm._kernels import scan_groups

    batch, channels, length = dy.shape
    groups, span = plan.pieces(batch, channels, length)
    if groups == 1:
        return None
    local, adjoint = (weights.new_empty(batch * groups, *weights.shape) for _ in range(2))
    kernels.adjoints[channels, -(-batch * groups // plan.R)](
        dy, either(post, dy), weights, *tables[1:], either(dcarry, local), local, batch * groups, groups, span, length,
        weights.shape[1], plan.done(length), *dy.stride(), *either(post, dy).stride(), HAS_POST=post is not None,
        HAS_CARRY=dcarry is not None, HAS_STATE=state is not None, **layout(plan, dy.dtype),
    )  # fmt: skip
    scan_groups[channels, batch](
        local, adjoint, local, dstate, tables[2], groups, weights.shape[1], -1.0,
        N=plan.N, HAS_STATE=False, REVERSE=True, HAS_END=state is not None, num_warps=1,
    )  # fmt: skip
    return adjoint


def _sweep(
    plan: Tiling, dy: Tensor, dcarry: Tensor | None, w: Tensor, post: Tensor | None, dw: Tensor, weights: Tensor,
    tables: tuple[Tensor, Tensor, Tensor], states: Tensor, adjoint: Tensor | None, state: Tensor | None, dstate: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill dw; the parts of the gradients of the taps within a chunk (H, tiles, T), of modes and weights (H, tiles, 4, N)."""
    from hippodrome.ops.diagonal_ssm import _gradients as kernels

    batch, channels, length = w.shape
    groups, span = plan.pieces(batch, channels, length)
    first, powers, decay = tables
    tiles = states.shape[1]
    scratch, part_first = first.new_empty(channels, tiles, plan.T, plan.T), first.new_empty(channels, tiles, plan.T)
    part_modes = first.new_empty(channels, tiles, 4, plan.N)
    signals = (dy, w, either(post, w), dw)
    kernels.sweep[channels, tiles](
        *signals, first, weights, powers, decay, states, either(adjoint, first), either(dcarry, first), dstate, scratch,
        part_first, part_modes, batch * groups, groups, span, length, weights.shape[1], plan.done(length),
        *(size for signal in signals for size in signal.stride()),
        HAS_POST=post is not None, HAS_ADJOINT=adjoint is not None, HAS_CARRY=dcarry is not None,
        HAS_DSTATE=state is not None and groups == 1, ALIKE=alike(w, *signals), **layout(plan, w.dtype, stages=1),
    )  # fmt: skip
    return part_first, part_modes


def _spread(
    plan: Tiling, u: Tensor, past: Tensor | None, pre: Tensor | None, dw: Tensor, du: Tensor, dpre: Tensor, taps: Tensor | None,
    other: Tensor,
) -> Tensor:  # fmt: skip
    """Fill du and dpre; the parts of the gradient of the taps (H, parts, T). `other` is passed for what is absent."""
    from hippodrome.ops.diagonal_ssm import _gradients as kernels

    batch, channels, length = u.shape
    n_chunks = -(-length // plan.T)
    n_tiles = -(-batch * n_chunks // plan.R)
    parts = max(1, min(n_tiles, 4 * PROGRAMS // channels))
    part_taps, scratch = other.new_empty(channels, parts, plan.T), other.new_empty(channels, parts, plan.T, plan.T)
    sizes = layout(plan, u.dtype)
    del sizes["N"]
    dv = torch.empty_like(u) if repeated(u, pre) else dpre
    signals = (u, either(past, u), either(pre, u), dw, du, u if pre is None else dv)
    strides = [size for signal in signals for size in signal.stride()]
    del strides[5]  # The past is contiguous.
    kernels.spread[channels, parts](
        *signals, either(taps, other), scratch, part_taps, batch, n_chunks, length, *counts(u, taps, past, pre), n_tiles,
        *strides, HAS_FIR=taps is not None, HAS_PRE=pre is not None, HAS_PAST=past is not None,
        ALIKE=alike(u, pre, dw, du, None if pre is None else dv), REPEAT=repeated(u, pre), **sizes,
    )  # fmt: skip
    if pre is not None and dv is not dpre:
        dpre.copy_(dv.unflatten(0, (-1, len(pre))).sum(0, dtype=torch.float32))
    return part_taps


@fused_backward.register_fake
def _(
    dy: Any, dcarry: Any, begin: Any, u: Tensor, pre: Any, post: Any, taps: Any, log_modes: Tensor, weights: Tensor, skip: Any,
    past: Any, state: Any, carry: bool,
) -> Any:  # fmt: skip
    return _gradients(u, pre, post, taps, log_modes, weights, skip, state)


def _gradients(
    u: Tensor, pre: Tensor | None, post: Tensor | None, taps: Tensor | None, log_modes: Tensor, weights: Tensor,
    skip: Tensor | None, state: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    def like(t: Tensor | None) -> Tensor:
        return weights.new_empty(0) if t is None else torch.empty_like(t)

    return [like(t) for t in (u, pre, post, taps, log_modes, weights, skip, state)]


def _flops(
    dy: Any,
    dcarry: Any,
    begin: Any,
    u: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    taps: Tensor | None,
    log_modes: Tensor,
    *rest: Any,
    **out: Any,
) -> int:
    """The states again, all gradients, with a gate behind the outputs again, with a FIR that again and its two gradients."""
    plan, modes = Tiling.of(log_modes.shape[1], u.dtype), log_modes.shape[1]
    again = 0 if post is None else plan.T + 2 * modes
    fir = 0 if taps is None else (6 if pre is None else 8) * plan.T
    return 2 * u.numel() * (2 * plan.T + 10 * modes + again + fir)


count_flops({torch.ops.hippodrome.diagonal_fused_backward: _flops})
