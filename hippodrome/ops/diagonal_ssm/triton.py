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


@dataclass(frozen=True)
class Tiling:
    """How a kernel is laid out: R columns of T tokens, of which J G are successive chunks of a sequence; N padded modes."""

    R: int
    J: int
    G: int
    T: int
    N: int
    num_warps: int
    num_stages: int

    @property
    def tokens(self) -> int:
        """Tokens of a sequence that are computed at once."""
        return self.T * self.J * self.G

    @property
    def sequences(self) -> int:
        """Sequences in a tile."""
        return self.R // (self.J * self.G)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def tiling(batch: int, modes: int, dtype: torch.dtype, *, backward: bool = False) -> Tiling:
    """The layout for `batch` sequences. Columns that no sequence fills take successive chunks, eight of them within a thread."""
    n = max(32 if dtype == torch.bfloat16 else 16, _power_of_two(modes))
    half = dtype == torch.bfloat16
    chunk = 64 if n <= 32 else 32 if n <= 64 else 16
    if dtype == torch.float32:
        chunk = min(chunk, 32)
    columns = (32 if backward else 64) if half and n <= 32 else 16
    warps, stages = 8 if n > 64 else 4, (2 if backward else 3) if half and n <= 32 else 1
    rows = min(_power_of_two(batch), columns)
    # Within a thread lie the columns above the low three bits; the rest of the chunks are groups.
    inner = min(columns // rows, columns // 8)
    return Tiling(columns, inner, columns // rows // inner, chunk, n, warps, stages)


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
        None if state is None else torch.view_as_real(state.contiguous()), 1 if return_state else 0,
    )  # fmt: skip
    if not return_state:
        return y, None
    done = (u.shape[2] - 1) // plan.tokens * plan.tokens
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
    carry: int,
) -> tuple[Tensor, Tensor]:
    """Outputs like u, and a state (B, H, N, 2): none (carry 0), that before the last `Tiling.tokens` (1), or that after all (2, where
    there are no outputs and L is a multiple of `Tiling.tokens`)."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    plan = tiling(u.shape[0], log_modes.shape[1], u.dtype)
    first, tables, decay = _prepare(plan, log_modes, weights, skip, u.dtype, backward=False)
    y, after = _outputs(u, log_modes, carry)
    grid = (u.shape[1], -(-u.shape[0] // plan.sequences))
    kernels.forward[grid](
        u, _or(pre, u), _or(post, u), _or(past, u), y, first, _or(taps, first), weights, tables, decay, _or(state, first), after,
        u.shape[0], u.shape[2], log_modes.shape[1], *_taps_and_past(taps, past), -(-u.shape[2] // plan.tokens),
        *u.stride(), *_or(pre, u).stride(), *_or(post, u).stride(), *_or(past, u).stride()[:2], *y.stride(),
        R=plan.R, J=plan.J, G=plan.G, T=plan.T, N=plan.N, COUNT=2,
        HAS_FIR=taps is not None, HAS_PRE=pre is not None, HAS_POST=post is not None, HAS_PAST=past is not None,
        HAS_STATE=state is not None, CARRY=carry, **_arithmetic(u.dtype), num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    return y, after


@_fused.register_fake
def _(
    u: Tensor, pre: Any, post: Any, taps: Any, log_modes: Tensor, weights: Any, skip: Any, past: Any, state: Any, carry: int
) -> Any:
    return _outputs(u, log_modes, carry)


def _outputs(u: Tensor, log_modes: Tensor, carry: int) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(u) if carry < 2 else u.new_empty(0, 0, 0)
    rows = u.shape[0] if carry else 0
    return y, log_modes.new_empty(rows, *log_modes.shape)


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
    carry: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, pre, post, taps, log_modes, weights, skip and state; of those not given they are empty."""
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    batch, channels, length = u.shape
    plan, ahead = (tiling(batch, log_modes.shape[1], u.dtype, backward=way) for way in (True, False))
    first, tables, decay = _prepare(plan, log_modes, weights, skip, u.dtype, backward=True)
    grads = _gradients(u, pre, post, taps, log_modes, weights, skip, state)
    du, dpre, dpost, dtaps, dmodes, dweights, dskip, dstate = grads
    tiles, n_super = -(-batch // plan.sequences), -(-length // plan.tokens)
    inject = n_super if carry == 2 else (length - 1) // ahead.tokens * ahead.tokens // plan.tokens
    states = tables.new_empty(channels, tiles, n_super, 2 * plan.N, plan.R)
    scratch = first.new_empty(channels, tiles, plan.T, plan.T)
    part_taps, part_first = (first.new_empty(channels, tiles, plan.T) for _ in range(2))
    part_modes = first.new_empty(channels, tiles, 4, plan.N)
    kernels.backward[(channels, tiles)](
        dy, u, _or(pre, u), _or(post, u), _or(past, u), du, dpre, dpost, first, _or(taps, first), weights, tables, decay,
        _or(state, first), _or(dcarry, first), dstate, states, scratch, part_taps, part_first, part_modes,
        batch, length, log_modes.shape[1], *_taps_and_past(taps, past), n_super, inject,
        *dy.stride(), *u.stride(), *_or(pre, u).stride(), *_or(post, u).stride(), *_or(past, u).stride()[:2],
        *du.stride(), *(dpre.stride() if pre is not None else du.stride()), *(dpost.stride() if post is not None else du.stride()),
        R=plan.R, J=plan.J, G=plan.G, T=plan.T, N=plan.N,
        HAS_FIR=taps is not None, HAS_PRE=pre is not None, HAS_POST=post is not None, HAS_PAST=past is not None,
        HAS_STATE=state is not None, HAS_CARRY=dcarry is not None, STAGES=STAGES, **_arithmetic(u.dtype),
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    kernels.finish[(channels,)](
        log_modes, weights, part_first, part_taps, part_modes, dmodes, dweights, dskip, dtaps,
        log_modes.shape[1], _taps_and_past(taps, past)[0], tiles,
        T=plan.T, N=plan.N, HAS_SKIP=skip is not None, HAS_FIR=taps is not None,
    )  # fmt: skip
    return grads


@_fused_backward.register_fake
def _(dy: Any, dcarry: Any, u: Tensor, pre: Any, post: Any, taps: Any, log_modes: Tensor, weights: Tensor, skip: Any, past: Any, state: Any, carry: int) -> Any:  # fmt: skip
    return _gradients(u, pre, post, taps, log_modes, weights, skip, state)


def _gradients(
    u: Tensor, pre: Tensor | None, post: Tensor | None, taps: Tensor | None, log_modes: Tensor, weights: Tensor,
    skip: Tensor | None, state: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    def like(t: Tensor | None) -> Tensor:
        return log_modes.new_empty(0) if t is None else torch.empty_like(t)

    return tuple(like(t) for t in (u, pre, post, taps, log_modes, weights, skip, state))


def _prepare(
    plan: Tiling, log_modes: Tensor, weights: Tensor, skip: Tensor | None, dtype: torch.dtype, *, backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from hippodrome.ops.diagonal_ssm import _kernels as kernels

    channels, modes = log_modes.shape[:2]
    first = log_modes.new_empty(channels, plan.T)
    tables = log_modes.new_empty(channels, 4 if backward else 2, 2 * plan.N, plan.T, dtype=PRODUCTS[dtype])
    decay = log_modes.new_empty(channels, plan.G + 2, 4, plan.N)
    kernels.prepare[(channels,)](
        log_modes, weights, _or(skip, first), first, tables, decay, modes,
        T=plan.T, N=plan.N, J=plan.J, G=plan.G, HAS_SKIP=skip is not None, BACKWARD=backward,
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
    if ctx.carry == 2:
        dy = torch.zeros_like(u)
    du, dpre, dpost, dtaps, dmodes, dweights, dskip, dstate = torch.ops.hippodrome.diagonal_fused_backward(
        dy.to(u.dtype), dcarry.contiguous() if ctx.carry else None, *inputs, ctx.carry
    )
    found = (du, dpre, dpost, dtaps, dmodes, dweights, dskip, None, dstate)
    return (*(None if given is None else grad for given, grad in zip(inputs, found, strict=True)), None)


_fused.register_autograd(_grad, setup_context=_save)
