"""diagonal_ssm on the GPU: one Triton program a channel and tile of chunks, forward and backward. See `_kernels.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hippodrome.ops.diagonal_ssm import diagonal_ssm, mode_states
from hippodrome.ops.long_conv import long_conv

MODES = 256
"""Most complex modes a channel; beyond, states do not fit the registers."""
PRODUCTS = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32, torch.float32: torch.float32}
"""Dtype of inputs -> dtype of tables and of the operands of products. States of large inputs would overflow in fp16, so its products are
in tf32, which rounds as finely; those of fp32 are three of tf32, which is exact to 1e-6."""

STAGES = 1
PROGRAMS = 264
"""Programs from which on a GPU is busy: below, sequences are cut into pieces."""


@dataclass(frozen=True)
class Tiling:
    """How a kernel is laid out: R columns of T tokens, J successive chunks for each of Q rows; N padded modes; W groups of warps."""

    R: int
    J: int
    W: int
    T: int
    N: int
    num_warps: int
    num_stages: int

    @property
    def Q(self) -> int:
        return self.R // self.J

    @property
    def tokens(self) -> int:
        """Tokens of a row that are computed at once."""
        return self.T * self.J

    def pieces(self, batch: int, channels: int, length: int) -> tuple[int, int]:
        """How many pieces every sequence is cut into, and how many tokens a piece has."""
        wanted = max(-(-self.Q // batch) if batch < self.Q else 1, PROGRAMS * self.Q // (channels * batch))
        groups = max(1, min(wanted, length // (4 * self.tokens)))
        span = -(-length // (groups * self.tokens)) * self.tokens
        return -(-length // span), span


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def tiling(batch: int, modes: int, dtype: torch.dtype, *, backward: bool = False) -> Tiling:
    """The layout for `batch` sequences. Columns that no row fills take successive chunks, at most eight within a thread."""
    half = dtype == torch.bfloat16
    n = max(32 if half else 16, _power_of_two(modes))
    chunk = 64 if n <= 32 else 32 if n <= 64 else 16
    if dtype == torch.float32:
        chunk = min(chunk, 32)
    columns, warps, stages = 16, 8 if n > 64 else 4, 1
    if half and n <= 32:
        columns, warps, stages = (64, 8, 1) if backward else (64, 4, 3)
    # Within a thread lie the columns of its group of warps above the low three bits.
    groups = 2 if warps == 8 and columns >= 32 else 1
    rows = min(columns, max(8 * groups, _power_of_two(batch)))
    return Tiling(columns, columns // rows, groups, chunk, n, warps, stages)


def _why_not(u: Tensor, log_modes: Tensor, weights: Tensor, **_: object) -> str | None:
    if u.device.type != "cuda":
        return f"the tensor is on {u.device.type}"
    if u.dtype not in PRODUCTS:
        return f"dtype {u.dtype}: it takes {', '.join(str(dtype) for dtype in PRODUCTS)}"
    if log_modes.shape[1] > MODES:
        return f"{log_modes.shape[1]} modes are more than {MODES}"
    return _no_triton()


def _no_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


@diagonal_ssm.backend("triton", why_not=_why_not)
def _triton(
    u: Tensor,
    log_modes: Tensor,
    weights: Tensor,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(u.dtype).expand(u.shape).reshape(-1, *u.shape[-2:])

    before = None if state is None else state.reshape(-1, *state.shape[-2:])
    y, after = fused(
        u.reshape(-1, *u.shape[-2:]), log_modes, weights, skip=skip, pre=rows(pre_gate), post=rows(post_gate),
        state=before, return_state=return_state,
    )  # fmt: skip
    return y.reshape(u.shape), None if after is None else after.reshape(*u.shape[:-2], *after.shape[1:])


def fused(
    u: Tensor,
    log_modes: Tensor,
    weights: Tensor,
    *,
    taps: Tensor | None = None,
    skip: Tensor | None = None,
    pre: Tensor | None = None,
    post: Tensor | None = None,
    past: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """diagonal_ssm of a FIR of u: `taps` (H, T <= 64), `past` (B, H, P) the inputs before u. u and gates (B, H, L) of one dtype."""
    batch, modes = u.shape[0], log_modes.shape[1]
    if modes > MODES // 2 and u.dtype == torch.float32:
        # The tables of all modes together are more than shared memory holds.
        rest = {"taps": taps, "pre": pre, "post": post, "past": past, "return_state": return_state}
        parts = [
            fused(u, log_modes[:, at], weights[:, at], state=None if state is None else state[..., at], skip=with_skip, **rest)
            for at, with_skip in ((slice(MODES // 2), skip), (slice(MODES // 2, None), None))
        ]
        return parts[0][0] + parts[1][0], torch.cat([part[1] for part in parts], -1) if return_state else None
    plan = tiling(batch, modes, u.dtype)
    if taps is not None and taps.shape[1] > min(plan.T, tiling(batch, modes, u.dtype, backward=True).T):
        signal = u if past is None else torch.cat([past.to(u.dtype), u], -1)
        u, taps, past = long_conv(signal, taps)[..., signal.shape[-1] - u.shape[-1] :], None, None
    log_pairs, weight_pairs = (torch.view_as_real(t.to(torch.complex64).contiguous()) for t in (log_modes, weights))
    y, carry = torch.ops.hippodrome.diagonal_fused(
        u, pre, post, taps, log_pairs, weight_pairs, skip, past,
        None if state is None else torch.view_as_real(state.contiguous()), return_state,
    )  # fmt: skip
    if not return_state:
        return y, None
    done = _done(plan, u.shape[2])
    x = u[..., done:].float()
    if taps is not None:
        earlier = u[..., max(0, done - taps.shape[1]) : done].float()
        if past is not None and done == 0:
            earlier = past.float()
        x = long_conv(torch.cat([earlier, x], -1), taps)[..., earlier.shape[-1] :]
    if pre is not None:
        x = x * pre[..., done:].float()
    left = torch.exp((u.shape[2] - done) * log_modes.to(torch.complex128)).to(torch.complex64)
    return y, left * torch.view_as_complex(carry) + mode_states(log_modes, x)


@torch.library.custom_op("hippodrome::diagonal_fused", mutates_args=(), device_types="cuda")
def _fused(
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
) -> tuple[Tensor, Tensor]:
    """Outputs like u, and with `carry` the state (B, H, N, 2) before the last chunks, of which there are `Tiling.tokens` tokens."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    batch, channels, length = u.shape
    plan = tiling(batch, log_modes.shape[1], u.dtype)
    groups, span = plan.pieces(batch, channels, length)
    tables = _prepare(plan, log_modes, weights, skip, span, u.dtype, backward=False)
    y, after = _outputs(u, log_modes, carry)
    begin = _begin(plan, u, pre, taps, weights, past, state, tables, 2)
    kernels.forward[channels, -(-batch * groups // plan.Q)](
        u, _or(pre, u), _or(post, u), _or(past, u), y, tables[0], _or(taps, tables[0]), weights, *tables[1:], _or(begin, tables[0]), after,
        batch * groups, groups, span, length, log_modes.shape[1], *_taps_and_past(taps, past), _done(plan, length),
        *u.stride(), *_or(pre, u).stride(), *_or(post, u).stride(), *_or(past, u).stride()[:2], *y.stride(),
        R=plan.R, J=plan.J, W=plan.W, T=plan.T, N=plan.N, COUNT=2,
        HAS_FIR=taps is not None, HAS_PRE=pre is not None, HAS_POST=post is not None, HAS_PAST=past is not None,
        HAS_STATE=begin is not None, CARRY=carry, OUTPUT=True, **_arithmetic(u.dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return y, after


def _begin(
    plan: Tiling, u: Tensor, pre: Tensor | None, taps: Tensor | None, weights: Tensor, past: Tensor | None, state: Tensor | None,
    tables: tuple[Tensor, Tensor, Tensor], count: int,
) -> Tensor | None:  # fmt: skip
    """The states (rows, H, N, 2) before the pieces of all sequences. None: at rest."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    batch, channels, length = u.shape
    modes = weights.shape[1]
    groups, span = plan.pieces(batch, channels, length)
    if groups == 1:
        return state
    local, begin = (weights.new_empty(batch * groups, channels, modes, 2) for _ in range(2))
    kernels.forward[channels, -(-batch * groups // plan.Q)](
        u, _or(pre, u), u, _or(past, u), u, tables[0], _or(taps, tables[0]), weights, *tables[1:], local, local,
        batch * groups, groups, span, length, modes, *_taps_and_past(taps, past), 0,
        *u.stride(), *_or(pre, u).stride(), *u.stride(), *_or(past, u).stride()[:2], *u.stride(),
        R=plan.R, J=plan.J, W=plan.W, T=plan.T, N=plan.N, COUNT=count,
        HAS_FIR=taps is not None, HAS_PRE=pre is not None, HAS_POST=False, HAS_PAST=past is not None,
        HAS_STATE=False, CARRY=True, OUTPUT=False, **_arithmetic(u.dtype), num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    kernels.scan_groups[channels, batch](
        local, begin, _or(state, local), local, tables[2], groups, modes, 1.0,
        N=plan.N, HAS_STATE=state is not None, REVERSE=False, HAS_END=False, num_warps=1,
    )  # fmt: skip
    return begin


def _done(plan: Tiling, length: int) -> int:
    """Tokens before the last `plan.tokens`."""
    return (length - 1) // plan.tokens * plan.tokens


@_fused.register_fake
def _(
    u: Tensor, pre: Any, post: Any, taps: Any, log_modes: Tensor, weights: Any, skip: Any, past: Any, state: Any, carry: bool
) -> Any:
    return _outputs(u, log_modes, carry)


def _outputs(u: Tensor, log_modes: Tensor, carry: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), log_modes.new_empty(u.shape[0] if carry else 0, *log_modes.shape)


@torch.library.custom_op("hippodrome::diagonal_fused_backward", mutates_args=(), device_types="cuda")
def _fused_backward(
    dy: Tensor,
    dcarry: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, pre, post, taps, log_modes, weights, skip and state; of those not given they are empty."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    batch, channels, length = u.shape
    modes = log_modes.shape[1]
    plan = tiling(batch, modes, u.dtype, backward=True)
    groups, span = plan.pieces(batch, channels, length)
    tables = _prepare(plan, log_modes, weights, skip, span, u.dtype, backward=True)
    first, wide, decay = tables
    grads = _gradients(u, pre, post, taps, log_modes, weights, skip, state)
    du, dpre, dpost, dtaps, dmodes, dweights, dskip, dstate = grads
    rows, done = batch * groups, _done(tiling(batch, modes, u.dtype), length)
    tiles = -(-rows // plan.Q)
    begin = _begin(plan, u, pre, taps, weights, past, state, tables, 4)
    adjoint = None
    shape = {"R": plan.R, "J": plan.J, "W": plan.W, "T": plan.T, "N": plan.N}
    run = {"num_warps": plan.num_warps, "num_stages": plan.num_stages, **_arithmetic(u.dtype)}
    if groups > 1:
        local, adjoint = (first.new_empty(rows, channels, modes, 2) for _ in range(2))
        kernels.adjoints[channels, tiles](
            dy, _or(post, u), weights, wide, decay, _or(dcarry, first), local, rows, groups, span, length, modes, done,
            *dy.stride(), *_or(post, u).stride(), **shape, COUNT=4, HAS_POST=post is not None, HAS_CARRY=dcarry is not None, **run,
        )  # fmt: skip
        kernels.scan_groups[channels, batch](
            local, adjoint, local, dstate, decay, groups, modes, -1.0,
            N=plan.N, HAS_STATE=False, REVERSE=True, HAS_END=state is not None, num_warps=1,
        )  # fmt: skip
    states = wide.new_empty(channels, tiles, span // plan.tokens, 2 * plan.N, plan.R)
    scratch = first.new_empty(channels, tiles, plan.T, plan.T)
    halo = u.new_empty(rows, channels, plan.T if taps is not None else 0)
    part_taps, part_first = (first.new_empty(channels, tiles, plan.T) for _ in range(2))
    part_modes = first.new_empty(channels, tiles, 4, plan.N)
    kernels.backward[channels, tiles](
        dy, u, _or(pre, u), _or(post, u), _or(past, u), du, dpre, dpost, first, _or(taps, first), weights, wide, decay,
        _or(begin, first), _or(adjoint, first), _or(dcarry, first), dstate, states, scratch, halo, part_taps, part_first, part_modes,
        rows, groups, span, length, modes, *_taps_and_past(taps, past), done,
        *dy.stride(), *u.stride(), *_or(pre, u).stride(), *_or(post, u).stride(), *_or(past, u).stride()[:2],
        *du.stride(), *(dpre.stride() if pre is not None else du.stride()), *(dpost.stride() if post is not None else du.stride()),
        **shape, HAS_FIR=taps is not None, HAS_PRE=pre is not None, HAS_POST=post is not None, HAS_PAST=past is not None,
        HAS_STATE=begin is not None, HAS_ADJOINT=adjoint is not None, HAS_CARRY=dcarry is not None,
        HAS_DSTATE=state is not None and groups == 1, STAGES=STAGES, **run,
    )  # fmt: skip
    if taps is not None and groups > 1:
        kernels.mend[channels, batch * (groups - 1)](halo, taps, du, groups, span, taps.shape[1], *du.stride(), T=plan.T)
    kernels.finish[channels,](
        log_modes, weights, part_first, part_taps, part_modes, dmodes, dweights, dskip, dtaps,
        modes, _taps_and_past(taps, past)[0], tiles,
        T=plan.T, N=plan.N, HAS_SKIP=skip is not None, HAS_FIR=taps is not None,
    )  # fmt: skip
    return grads


@_fused_backward.register_fake
def _(dy: Any, dcarry: Any, u: Tensor, pre: Any, post: Any, taps: Any, log_modes: Tensor, weights: Tensor, skip: Any, past: Any, state: Any, carry: bool) -> Any:  # fmt: skip
    return _gradients(u, pre, post, taps, log_modes, weights, skip, state)


def _gradients(
    u: Tensor, pre: Tensor | None, post: Tensor | None, taps: Tensor | None, log_modes: Tensor, weights: Tensor,
    skip: Tensor | None, state: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    def like(t: Tensor | None) -> Tensor:
        return log_modes.new_empty(0) if t is None else torch.empty_like(t)

    return tuple(like(t) for t in (u, pre, post, taps, log_modes, weights, skip, state))


def _prepare(
    plan: Tiling, log_modes: Tensor, weights: Tensor, skip: Tensor | None, span: int, dtype: torch.dtype, *, backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The tables of all channels: first taps, tables of powers, powers of the decay. See `_kernels.prepare`."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    channels, modes = log_modes.shape[:2]
    first = log_modes.new_empty(channels, plan.T)
    tables = log_modes.new_empty(channels, 4 if backward else 2, 2 * plan.N, plan.T, dtype=PRODUCTS[dtype])
    decay = log_modes.new_empty(channels, 2, 4, plan.N)
    kernels.prepare[channels,](
        log_modes, weights, _or(skip, first), first, tables, decay, modes, span,
        T=plan.T, N=plan.N, HAS_SKIP=skip is not None, BACKWARD=backward,
    )  # fmt: skip
    return first, tables, decay


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    import triton.language as tl

    kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    return {"KIND": kind, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}


def _or(t: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is given in place of an absent tensor, which it never reads."""
    return other if t is None else t


def _taps_and_past(taps: Tensor | None, past: Tensor | None) -> Sequence[int]:
    return 0 if taps is None else taps.shape[1], 0 if past is None else past.shape[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.carry = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, dy: Tensor, dcarry: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    u, pre, post, taps, log_modes, weights, skip, past, state = inputs
    du, dpre, dpost, dtaps, dmodes, dweights, dskip, dstate = torch.ops.hippodrome.diagonal_fused_backward(
        dy.to(u.dtype), dcarry.contiguous() if ctx.carry else None, *inputs, ctx.carry
    )
    found = (du, dpre, dpost, dtaps, dmodes, dweights, dskip, None, dstate)
    return (*(None if given is None else grad for given, grad in zip(inputs, found, strict=True)), None)


_fused.register_autograd(_grad, setup_context=_save)
