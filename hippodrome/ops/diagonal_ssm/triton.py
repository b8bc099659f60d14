"""diagonal_ssm on the GPU: one Triton program a channel and tile of rows, forward and backward. See `_kernels.py`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops._op import announced, capability, on_its_device
from hippodrome.ops.diagonal_ssm import diagonal_ssm, mode_states
from hippodrome.ops.long_conv import long_conv

HAS_TRITON = importlib.util.find_spec("triton") is not None
CAPABILITY = (9, 0)
"""Least compute capability: what the kernels were measured on. Their tables need more shared memory than most others have."""
MODES = 256
"""Most complex modes a channel."""
SLICE = 64
"""Most modes that go through a kernel at once; with more, their states do not fit the registers."""
PRODUCTS = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32, torch.float32: torch.float32}
"""Dtype of inputs -> dtype of tables and of the operands of products. States of large inputs would overflow in fp16, so its
products are in tf32, which rounds as finely; those of fp32 are three of tf32, which is exact to 1e-6."""

PROGRAMS = 264
"""Programs from which on a GPU is busy: below, sequences are cut into pieces."""
SHORTEST = 8
"""Fewest chunks of a piece."""


@dataclass(frozen=True)
class Tiling:
    """How a kernel is laid out: R rows, chunks of T tokens, N padded modes."""

    R: int
    T: int
    N: int
    num_warps: int
    num_stages: int

    def pieces(self, batch: int, channels: int, length: int) -> tuple[int, int]:
        """How many pieces every sequence is cut into, and how many tokens a piece has."""
        wanted = max(self.R // batch, PROGRAMS * self.R // (channels * batch), 1)
        groups = max(1, min(wanted, length // (SHORTEST * self.T)))
        span = -(-length // (groups * self.T)) * self.T
        return -(-length // span), span


def tiling(modes: int, dtype: torch.dtype, *, backward: bool = False) -> Tiling:
    """The layout for this many modes, at most `SLICE`. Only warps and stages depend on the direction: both share scratch."""
    half = dtype == torch.bfloat16
    n = max(32 if half else 16, 1 << max(0, modes - 1).bit_length())
    chunk = 64 if n <= 32 and dtype != torch.float32 else 32
    if half and n <= 32:
        return Tiling(64, chunk, n, 8 if backward else 4, 2 if backward else 3)
    return Tiling(16, chunk, n, 4, 1)


def refusal(u: Tensor, log_modes: Tensor) -> str | None:
    """Why these kernels cannot take inputs like u with these modes; None: they can."""
    if u.device.type != "cuda":
        return f"the tensor is on {u.device.type}"
    if not HAS_TRITON:
        return "triton is not installed"
    if capability(u.device) < CAPABILITY:
        return f"compute capability {capability(u.device)} is under {CAPABILITY}"
    if u.dtype not in PRODUCTS:
        return f"dtype {u.dtype}: it takes {', '.join(str(dtype) for dtype in PRODUCTS)}"
    if log_modes.shape[1] > MODES:
        return f"{log_modes.shape[1]} modes are more than {MODES}"
    return None


def _why_not(
    u: Tensor,
    log_modes: Tensor,
    weights: Tensor,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    **_: object,
) -> str | None:
    for gate in (pre_gate, post_gate):
        if gate is not None and torch.promote_types(u.dtype, gate.dtype) != u.dtype:
            return f"a gate of {gate.dtype} would be rounded to the inputs' {u.dtype}"
    return refusal(u, log_modes)


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

    before = None if state is None else state.expand(*u.shape[:-1], state.shape[-1]).reshape(-1, *state.shape[-2:])
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
    """diagonal_ssm of a FIR of u.

    u and gates (B, H, L) of one dtype; taps (H, any number); past (B, H, P), the inputs before u, gets no gradient; state
    (B, H, N).
    """
    if u.numel() == 0:
        return u.clone(), state if return_state else None
    modes = log_modes.shape[1]
    if modes > SLICE:
        rest: dict[str, Any] = {"taps": taps, "pre": pre, "post": post, "past": past, "return_state": return_state}
        return _in_slices(u, log_modes, weights, skip, state, rest)
    u, pre, post = (None if t is None else _time_last(t) for t in (u, pre, post))  # type: ignore[assignment]
    plan = tiling(modes, u.dtype)
    if taps is not None and taps.shape[1] > plan.T:
        signal = u if past is None else torch.cat([past.to(u.dtype), u], -1)
        u, taps, past = long_conv(signal, taps)[..., signal.shape[-1] - u.shape[-1] :], None, None
    log_pairs, weight_pairs, state_pairs = (None if t is None else _pairs(t) for t in (log_modes, weights, state))
    taps, skip, past = (None if t is None else t.contiguous() for t in (taps, skip, past))
    y, carry = torch.ops.hippodrome.diagonal_fused(
        u, pre, post, taps, log_pairs, weight_pairs, skip, past, state_pairs, return_state
    )
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


def _in_slices(
    u: Tensor, log_modes: Tensor, weights: Tensor, skip: Tensor | None, state: Tensor | None, rest: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Systems add up: the outputs of `SLICE` modes at a time, the skip with the first."""
    total, states = torch.zeros((), device=u.device), list[Tensor]()
    for start in range(0, log_modes.shape[1], SLICE):
        at = slice(start, start + SLICE)
        before = None if state is None else state[..., at]
        y, after = fused(u, log_modes[:, at], weights[:, at], skip=None if start else skip, state=before, **rest)
        total = total + y.float()
        if after is not None:
            states.append(after)
    return total.to(u.dtype), torch.cat(states, -1) if states else None


def _pairs(t: Tensor) -> Tensor:
    """Complex t (...) as its contiguous real and imaginary parts (..., 2)."""
    return torch.view_as_real(t.to(torch.complex64).resolve_conj().contiguous())


def _time_last(t: Tensor) -> Tensor:
    """t (B, H, L) with time contiguous: a program reads one channel, and of anything else a sixteenth of what memory hands
    out."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.transpose(0, 1).contiguous().transpose(0, 1)


@torch.library.custom_op("hippodrome::diagonal_fused", mutates_args=(), device_types="cuda")
@announced("diagonal_ssm")
@on_its_device
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
    """Outputs like u, and with `carry` the state (B, H, N, 2) before the last chunk."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    batch, channels, length = u.shape
    plan = tiling(log_modes.shape[1], u.dtype)
    groups, span = plan.pieces(batch, channels, length)
    tables = _prepare(plan, log_modes, weights, skip, groups, span, u.dtype, backward=False)
    y, after = _outputs(u, log_modes, carry)
    begin = _begin(plan, u, pre, taps, weights, past, state, tables, 2)
    kernels.forward[channels, -(-batch * groups // plan.R)](
        u, _or(pre, u), _or(post, u), _or(past, u), y, tables[0], _or(taps, tables[0]), weights, *tables[1:],
        _or(begin, tables[0]), after, tables[1], batch * groups, groups, span, length, log_modes.shape[1],
        *_taps_and_past(taps, past), _done(plan, length),
        *u.stride(), *_or(pre, u).stride(), *_or(post, u).stride(), *_or(past, u).stride()[:2], *y.stride(),
        HAS_FIR=taps is not None, HAS_PRE=pre is not None, HAS_POST=post is not None, HAS_PAST=past is not None, COUNT=2,
        HAS_STATE=begin is not None, CARRY=carry, OUTPUT=True, TRACE=False, ALIKE=_alike(u, pre, post),
        **_layout(plan, u.dtype),
    )  # fmt: skip
    return y, after


@_fused.register_fake
def _(
    u: Tensor, pre: Any, post: Any, taps: Any, log_modes: Tensor, weights: Any, skip: Any, past: Any, state: Any, carry: bool
) -> Any:
    return _outputs(u, log_modes, carry)


def _outputs(u: Tensor, log_modes: Tensor, carry: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), log_modes.new_empty(u.shape[0] if carry else 0, *log_modes.shape)


def _walk(
    plan: Tiling, u: Tensor, pre: Tensor | None, taps: Tensor | None, weights: Tensor, past: Tensor | None,
    begin: Tensor | None, tables: tuple[Tensor, Tensor, Tensor], count: int, after: Tensor | None,
    trace: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Walk along the inputs without outputs: the states after all rows into `after`, or those before all chunks and FIR(u)."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    batch, channels, length = u.shape
    groups, span = plan.pieces(batch, channels, length)
    states, x = trace or (tables[1], u)
    kernels.forward[channels, -(-batch * groups // plan.R)](
        u, _or(pre, u), u, _or(past, u), x, tables[0], _or(taps, tables[0]), weights, *tables[1:], _or(begin, tables[0]),
        _or(after, tables[0]), states, batch * groups, groups, span, length, weights.shape[1], *_taps_and_past(taps, past), 0,
        *u.stride(), *_or(pre, u).stride(), *u.stride(), *_or(past, u).stride()[:2], *x.stride(),
        HAS_FIR=taps is not None, HAS_PRE=pre is not None, HAS_POST=False, HAS_PAST=past is not None, COUNT=count,
        HAS_STATE=begin is not None, CARRY=after is not None, OUTPUT=False, TRACE=trace is not None, ALIKE=_alike(u, pre),
        **_layout(plan, u.dtype),
    )  # fmt: skip


def _begin(
    plan: Tiling, u: Tensor, pre: Tensor | None, taps: Tensor | None, weights: Tensor, past: Tensor | None,
    state: Tensor | None, tables: tuple[Tensor, Tensor, Tensor], count: int,
) -> Tensor | None:  # fmt: skip
    """The states (rows, H, N, 2) before the pieces of all sequences. None: at rest."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    batch, channels, length = u.shape
    groups, _ = plan.pieces(batch, channels, length)
    if groups == 1:
        return state
    local, begin = (weights.new_empty(batch * groups, *weights.shape) for _ in range(2))
    _walk(plan, u, pre, taps, weights, past, None, tables, count, local, None)
    kernels.scan_groups[channels, batch](
        local, begin, _or(state, local), local, tables[2], groups, weights.shape[1], 1.0,
        N=plan.N, HAS_STATE=state is not None, REVERSE=False, HAS_END=False, num_warps=1,
    )  # fmt: skip
    return begin


def _done(plan: Tiling, length: int) -> int:
    """Tokens before the last chunk."""
    return (length - 1) // plan.T * plan.T


@torch.library.custom_op("hippodrome::diagonal_fused_backward", mutates_args=(), device_types="cuda")
@announced("diagonal_ssm's backward")
@on_its_device
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
) -> list[Tensor]:
    """Gradients of u, pre, post, taps, log_modes, weights, skip and state; of those not given they are empty."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    if dy.stride() != u.stride():
        dy = torch.empty_like(u).copy_(dy)
    batch, channels, length = u.shape
    modes = log_modes.shape[1]
    plan, ahead = tiling(modes, u.dtype, backward=True), tiling(modes, u.dtype)
    groups, span = plan.pieces(batch, channels, length)
    rows, done = batch * groups, _done(ahead, length)
    tiles = -(-rows // plan.R)
    tables = _prepare(plan, log_modes, weights, skip, groups, span, u.dtype, backward=True)
    first, powers, decay = tables
    grads = _gradients(u, pre, post, taps, log_modes, weights, skip, state)
    du, dpre, dpost, dtaps, dmodes, dweights, dskip, dstate = grads

    begin = _begin(ahead, u, pre, taps, weights, past, state, tables, 4)
    states = powers.new_empty(channels, tiles, span // plan.T, plan.R, 2 * plan.N)
    x, dx = (u, du) if taps is None else (torch.empty_like(u), torch.empty_like(u))
    _walk(ahead, u, pre, taps, weights, past, begin, tables, 4, None, (states, x))
    adjoint = _adjoint(plan, dy, dcarry, post, weights, state, dstate, tables, done)
    scratch, part_first = first.new_empty(channels, tiles, plan.T, plan.T), first.new_empty(channels, tiles, plan.T)
    part_modes = first.new_empty(channels, tiles, 4, plan.N)
    signals = (dy, x, _or(pre, x), _or(post, x), dx, x if pre is None else dpre, x if post is None else dpost)
    kernels.backward[channels, tiles](
        *signals, first, weights, powers, decay, states, _or(adjoint, first), _or(dcarry, first), dstate, scratch, part_first,
        part_modes, rows, groups, span, length, modes, done, *(size for signal in signals for size in signal.stride()),
        HAS_PRE=pre is not None, HAS_POST=post is not None, HAS_ADJOINT=adjoint is not None, HAS_CARRY=dcarry is not None,
        HAS_DSTATE=state is not None and groups == 1, ALIKE=_alike(x, *signals), **_layout(plan, u.dtype),
    )  # fmt: skip
    parts, part_taps = 1, first
    if taps is not None:
        parts, part_taps = _filter_backward(plan, u, past, dx, du, taps)
    kernels.finish[channels,](
        log_modes, weights, part_first, part_taps, part_modes, dmodes, dweights, dskip, dtaps,
        modes, _taps_and_past(taps, past)[0], parts, tiles,
        T=plan.T, N=plan.N, HAS_SKIP=skip is not None, HAS_FIR=taps is not None,
    )  # fmt: skip
    return grads


def _adjoint(
    plan: Tiling, dy: Tensor, dcarry: Tensor | None, post: Tensor | None, weights: Tensor, state: Tensor | None, dstate: Tensor,
    tables: tuple[Tensor, Tensor, Tensor], done: int,
) -> Tensor | None:  # fmt: skip
    """The adjoints (rows, H, N, 2) after the pieces of all sequences, and into dstate that before them all. None: zero."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    batch, channels, length = dy.shape
    groups, span = plan.pieces(batch, channels, length)
    if groups == 1:
        return None
    local, adjoint = (weights.new_empty(batch * groups, *weights.shape) for _ in range(2))
    kernels.adjoints[channels, -(-batch * groups // plan.R)](
        dy, _or(post, dy), weights, *tables[1:], _or(dcarry, local), local, batch * groups, groups, span, length,
        weights.shape[1], done, *dy.stride(), *_or(post, dy).stride(), HAS_POST=post is not None, HAS_CARRY=dcarry is not None,
        **_layout(plan, dy.dtype),
    )  # fmt: skip
    kernels.scan_groups[channels, batch](
        local, adjoint, local, dstate, tables[2], groups, weights.shape[1], -1.0,
        N=plan.N, HAS_STATE=False, REVERSE=True, HAS_END=state is not None, num_warps=1,
    )  # fmt: skip
    return adjoint


def _filter_backward(plan: Tiling, u: Tensor, past: Tensor | None, dx: Tensor, du: Tensor, taps: Tensor) -> tuple[int, Tensor]:
    """Fill du; the number of parts of the gradient of the taps, and those (H, parts, T)."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    batch, channels, length = u.shape
    n_chunks = -(-length // plan.T)
    n_tiles = -(-batch * n_chunks // plan.R)
    parts = max(1, min(n_tiles, 4 * PROGRAMS // channels))
    part_taps, scratch = taps.new_empty(channels, parts, plan.T), taps.new_empty(channels, parts, plan.T, plan.T)
    layout = _layout(plan, u.dtype) | {"num_warps": 4}
    del layout["N"]
    kernels.filter_backward[channels, parts](
        u, _or(past, u), dx, du, taps, scratch, part_taps, batch, n_chunks, length, *_taps_and_past(taps, past), n_tiles,
        *u.stride(), *_or(past, u).stride()[:2], *dx.stride(), *du.stride(),
        HAS_PAST=past is not None, ALIKE=_alike(u, dx, du), **layout,
    )  # fmt: skip
    return parts, part_taps


@_fused_backward.register_fake
def _(
    dy: Any, dcarry: Any, u: Tensor, pre: Any, post: Any, taps: Any, log_modes: Tensor, weights: Tensor, skip: Any, past: Any,
    state: Any, carry: bool,
) -> Any:  # fmt: skip
    return _gradients(u, pre, post, taps, log_modes, weights, skip, state)


def _gradients(
    u: Tensor, pre: Tensor | None, post: Tensor | None, taps: Tensor | None, log_modes: Tensor, weights: Tensor,
    skip: Tensor | None, state: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    def like(t: Tensor | None) -> Tensor:
        return log_modes.new_empty(0) if t is None else torch.empty_like(t)

    return [like(t) for t in (u, pre, post, taps, log_modes, weights, skip, state)]


def _prepare(
    plan: Tiling,
    log_modes: Tensor,
    weights: Tensor,
    skip: Tensor | None,
    groups: int,
    span: int,
    dtype: torch.dtype,
    *,
    backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tables of all channels: first taps, tables of powers, powers of the decay. See `_kernels.prepare`."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    channels, modes = log_modes.shape[:2]
    first = log_modes.new_empty(channels, plan.T)
    tables = log_modes.new_empty(channels, 4 if backward else 2, 2 * plan.N, plan.T, dtype=PRODUCTS[dtype])
    decay = log_modes.new_empty(channels, 2, 4, plan.N)
    kernels.prepare[channels,](
        log_modes, weights, _or(skip, first), first, tables, decay, modes, span, T=plan.T, N=plan.N, HAS_SKIP=skip is not None,
        BACKWARD=backward, EXACT=PRODUCTS[dtype] == torch.float32, PIECES=groups > 1,
    )  # fmt: skip
    return first, tables, decay


def _layout(plan: Tiling, dtype: torch.dtype) -> dict[str, Any]:
    import triton.language as tl

    kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    return {
        "R": plan.R, "T": plan.T, "N": plan.N, "KIND": kind, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "num_warps": plan.num_warps, "num_stages": plan.num_stages,
    }  # fmt: skip


def _alike(u: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel may use one set of addresses: all others, outputs like u included, lie like u."""
    dense = torch.empty_like(u, device="meta").stride() == u.stride()
    return dense and all(t is None or t.stride() == u.stride() for t in others)


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
    du, dpre, dpost, dtaps, dmodes, dweights, dskip, dstate = torch.ops.hippodrome.diagonal_fused_backward(
        dy.to(inputs[0].dtype), dcarry.contiguous() if ctx.carry else None, *inputs, ctx.carry
    )
    found = (du, dpre, dpost, dtaps, dmodes, dweights, dskip, None, dstate)
    return (*(None if given is None else grad for given, grad in zip(inputs, found, strict=True)), None)


_fused.register_autograd(_grad, setup_context=_save)


def _flops(u: Tensor, pre: Any, post: Any, taps: Tensor | None, log_modes: Tensor, *rest: Any, **out: Any) -> int:
    """Two a multiply-add of the matrix products, but for those that find where pieces begin."""
    plan, modes = tiling(log_modes.shape[1], u.dtype), log_modes.shape[1]
    return 2 * u.numel() * ((1 if taps is None else 3) * plan.T + 4 * modes)


def _flops_backward(
    dy: Any,
    dcarry: Any,
    u: Tensor,
    pre: Any,
    post: Tensor | None,
    taps: Tensor | None,
    log_modes: Tensor,
    *rest: Any,
    **out: Any,
) -> int:
    """The states again, all gradients, with a gate behind the outputs again, with a FIR that again and its two gradients."""
    plan, modes = tiling(log_modes.shape[1], u.dtype, backward=True), log_modes.shape[1]
    again = 0 if post is None else plan.T + 2 * modes
    fir = 0 if taps is None else 6 * plan.T
    return 2 * u.numel() * (2 * plan.T + 10 * modes + again + fir)


count_flops({torch.ops.hippodrome.diagonal_fused: _flops, torch.ops.hippodrome.diagonal_fused_backward: _flops_backward})
