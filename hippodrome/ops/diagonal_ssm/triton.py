"""diagonal_ssm on the GPU: one Triton program a channel and tile of rows, forward and backward. See `_kernels.py` and
`_gradients.py`."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops._op import announced, capability, on_its_device
from hippodrome.ops.diagonal_ssm import diagonal_ssm, mode_states
from hippodrome.ops.diagonal_ssm._backward import fused_backward
from hippodrome.ops.diagonal_ssm._tiling import PRODUCTS, SLICE, Tiling, alike, counts, either, layout, prepare, repeated
from hippodrome.ops.long_conv import long_conv

HAS_TRITON = importlib.util.find_spec("triton") is not None
CAPABILITY = (9, 0)
"""Least compute capability: what the kernels were measured on. Their tables need more shared memory than most others have."""
MODES = 256
"""Most complex modes a channel."""


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

    u and gates (B, H, L) of one dtype, pre also (B / n, H, L) for n times the same; taps (H, any number); past (B, H, P), the
    inputs before u, gets no gradient; state (B, H, N). log_modes in complex128 reach the kernels so: a phase rounded to float32
    is wrong by 3e-2 rad a million tokens later.
    """
    if u.numel() == 0:
        return u.clone(), state if return_state else None
    modes = log_modes.shape[1]
    if modes > SLICE:
        rest: dict[str, Any] = {"taps": taps, "pre": pre, "post": post, "past": past, "return_state": return_state}
        return _in_slices(u, log_modes, weights, skip, state, rest)
    u, pre, post = (None if t is None else _time_last(t) for t in (u, pre, post))  # type: ignore[assignment]
    plan = Tiling.of(modes, u.dtype)
    if taps is not None and taps.shape[1] > plan.T:
        signal = u if past is None else torch.cat([past.to(u.dtype), u], -1)
        u, taps, past = long_conv(signal, taps)[..., signal.shape[-1] - u.shape[-1] :], None, None
    weight_pairs, state_pairs = (None if t is None else _pairs(t.to(torch.complex64)) for t in (weights, state))
    taps, skip, past = (None if t is None else t.contiguous() for t in (taps, skip, past))
    y, carry, _ = torch.ops.hippodrome.diagonal_fused(
        u, pre, post, taps, _pairs(log_modes), weight_pairs, skip, past, state_pairs, return_state
    )
    if not return_state:
        return y, None
    done = plan.done(u.shape[2])
    x = u[..., done:].float()
    if taps is not None:
        earlier = u[..., max(0, done - taps.shape[1]) : done].float()
        if past is not None and done == 0:
            earlier = past.float()
        x = long_conv(torch.cat([earlier, x], -1), taps)[..., earlier.shape[-1] :]
    if pre is not None:
        x = x * pre[..., done:].float().repeat(len(x) // len(pre), 1, 1)
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
    return torch.view_as_real(t.resolve_conj().contiguous())


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs like u; with `carry` the state (B, H, N, 2) before the last chunk; the states (rows, H, N, 2) before all pieces,
    where there are several, for the backward."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    batch, channels, length = u.shape
    plan = Tiling.of(log_modes.shape[1], u.dtype)
    groups, span = plan.pieces(batch, channels, length)
    tables = prepare(plan, log_modes, weights, skip, groups, span, u.dtype, backward=False)
    y, after, begin = _outputs(u, weights, carry)
    if groups > 1:
        _walk(plan, u, pre, None, taps, weights, past, None, tables, begin)
        local, begin = begin, torch.empty_like(begin)
        kernels.scan_groups[channels, batch](
            local, begin, either(state, local), local, tables[2], groups, weights.shape[1], 1.0,
            N=plan.N, HAS_STATE=state is not None, REVERSE=False, HAS_END=False, num_warps=1,
        )  # fmt: skip
    _walk(plan, u, pre, post, taps, weights, past, begin if groups > 1 else state, tables, after if carry else None, y)
    return y, after, begin


@_fused.register_fake
def _(
    u: Tensor, pre: Any, post: Any, taps: Any, log_modes: Any, weights: Tensor, skip: Any, past: Any, state: Any, carry: bool
) -> Any:
    return _outputs(u, weights, carry)


def _outputs(u: Tensor, weights: Tensor, carry: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, length = u.shape
    groups, _ = Tiling.of(weights.shape[1], u.dtype).pieces(batch, channels, length)
    rows = batch * groups if groups > 1 else 0
    after, begin = (weights.new_empty(n, *weights.shape) for n in (batch if carry else 0, rows))
    return torch.empty_like(u), after, begin


def _walk(
    plan: Tiling, u: Tensor, pre: Tensor | None, post: Tensor | None, taps: Tensor | None, weights: Tensor, past: Tensor | None,
    begin: Tensor | None, tables: tuple[Tensor, Tensor, Tensor], after: Tensor | None, y: Tensor | None = None,
) -> None:  # fmt: skip
    """Walk along all rows from the states `begin`: outputs into y, and what `_kernels.forward` carries into `after`."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    batch, channels, length = u.shape
    groups, span = plan.pieces(batch, channels, length)
    signals = (u, either(pre, u), either(post, u), either(past, u), either(y, u))
    strides = [size for signal in signals for size in signal.stride()]
    del strides[11]  # The past is contiguous.
    kernels.forward[channels, -(-batch * groups // plan.R)](
        *signals, tables[0], either(taps, tables[0]), weights, *tables[1:], either(begin, tables[0]), either(after, tables[0]),
        batch * groups, groups, span, length, weights.shape[1], *counts(u, taps, past, pre), plan.done(length), *strides,
        HAS_FIR=taps is not None, HAS_PRE=pre is not None, HAS_POST=post is not None, HAS_PAST=past is not None,
        HAS_STATE=begin is not None, CARRY=after is not None, OUTPUT=y is not None, ALIKE=alike(u, pre, post),
        REPEAT=repeated(u, pre),
        **layout(plan, u.dtype),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.carry = inputs
    ctx.save_for_backward(output[2], *tensors)


def _grad(ctx: Any, dy: Tensor, dcarry: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    begin, *inputs = ctx.saved_tensors
    du, dpre, dpost, dtaps, dmodes, dweights, dskip, dstate = fused_backward(
        dy.to(inputs[0].dtype), dcarry.contiguous() if ctx.carry else None, begin, *inputs, ctx.carry
    )
    found = (du, dpre, dpost, dtaps, dmodes, dweights, dskip, None, dstate)
    return (*(None if given is None else grad for given, grad in zip(inputs, found, strict=True)), None)


_fused.register_autograd(_grad, setup_context=_save)


def _flops(u: Tensor, pre: Any, post: Any, taps: Tensor | None, log_modes: Tensor, *rest: Any, **out: Any) -> int:
    """Two a multiply-add of the matrix products, but for those that find where pieces begin."""
    plan, modes = Tiling.of(log_modes.shape[1], u.dtype), log_modes.shape[1]
    return 2 * u.numel() * ((1 if taps is None else 3) * plan.T + 4 * modes)


count_flops({torch.ops.hippodrome.diagonal_fused: _flops})
