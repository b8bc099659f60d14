"""diagonal_ssm on the CPU: a state passed between chunks of matrix products. The length-L kernel never exists.

With chunks of T tokens and states s_c before chunk c (H3, section 4.2: "state passing"):

    y_c = u_c Toeplitz(K[:T]) + Re(w lambda^(t+1)) s_c,      s_(c+1) = lambda^T s_c + sum_t lambda^(T-1-t) u_(c,t)

All sums are real matrix products batched over channels; only the recurrence over chunks is sequential, and it runs in float64,
so that a rounded lambda^T is not raised to the power L/T. The backward is the same algebra from right to left. It recomputes the
states, so that memory beyond inputs and outputs is a few tensors of the input's size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippodrome.ops.diagonal_ssm import diagonal_ssm, mode_powers

CHUNK = 64
"""Tokens a chunk: the three products cost T + 2 * 2N multiply-adds a token, and tables of 64 x 64 stay in the cache."""


def _why_not(u: Tensor, log_modes: Tensor, weights: Tensor, **_: object) -> str | None:
    return None if u.device.type == "cpu" else f"the tensor is on {u.device.type}"


@diagonal_ssm.backend("cpu", why_not=_why_not)
def _cpu(
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
    real = torch.promote_types(u.dtype, torch.float32)
    lead, (channels, length) = u.shape[:-2], u.shape[-2:]
    taps, in_map, out_map, decay = _tables(log_modes, weights, skip, min(CHUNK, length), real)

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.expand(u.shape).reshape(-1, channels, length)

    before = None
    if state is not None:
        before = torch.view_as_real(state).to(real).reshape(-1, channels, *decay.shape[1:])
    y, after = torch.ops.hippodrome.diagonal_chunks(
        u.reshape(-1, channels, length), rows(pre_gate), rows(post_gate), taps, in_map, out_map, decay, before
    )
    y = y.reshape(u.shape)
    if not return_state:
        return y, None
    after = torch.view_as_complex(after.reshape(*lead, *after.shape[1:]))
    return y, after


def _tables(
    log_modes: Tensor, weights: Tensor, skip: Tensor | None, chunk: int, real: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel taps (H, T) with the skip in tap 0, in-map (H, T, 2N), out-map (H, 2N, T), lambda^T (H, N, 2) in float64."""
    powers = mode_powers(log_modes, chunk + 1)
    answer = weights.unsqueeze(-1) * powers
    decay = torch.exp(chunk * log_modes.to(torch.complex128))
    taps = answer[..., :chunk].real.sum(1)
    if skip is not None:
        taps = torch.cat([taps[:, :1] + skip.to(taps.dtype).unsqueeze(-1), taps[:, 1:]], -1)
    in_map = torch.view_as_real(powers[..., :chunk].flip(-1).transpose(1, 2)).flatten(2)
    out_map = torch.stack([answer[..., 1:].real, -answer[..., 1:].imag], 2).flatten(1, 2)
    return taps.to(real), in_map.to(real), out_map.to(real), torch.view_as_real(decay)


@torch.library.custom_op("hippodrome::diagonal_chunks", mutates_args=(), device_types="cpu")
def _chunks(
    u: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    taps: Tensor,
    in_map: Tensor,
    out_map: Tensor,
    decay: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, L) and the state (B, H, N, 2) after them, of inputs (B, H, L) and the tables of `_tables`."""
    v = _split(u, pre, taps)
    states, last = _forward_states(v, in_map, decay, state, u.shape[0])
    after = _final_state(v, states, last, in_map, u.shape)
    y = _join(_answers(v, states, taps, out_map), u.shape, post, u.dtype)
    return y, after


@_chunks.register_fake
def _(u: Tensor, pre: Any, post: Any, taps: Tensor, in_map: Tensor, out_map: Tensor, decay: Tensor, state: Any) -> Any:
    return u.new_empty(u.shape), taps.new_empty(u.shape[0], *decay.shape)


@torch.library.custom_op("hippodrome::diagonal_chunks_backward", mutates_args=(), device_types="cpu")
def _chunks_backward(
    d_y: Tensor,
    d_after: Tensor,
    u: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    taps: Tensor,
    in_map: Tensor,
    out_map: Tensor,
    decay: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, pre, post, taps, in_map, out_map, decay and state, empty where there is no such input."""
    batch, _, length = u.shape
    chunk = taps.shape[1]
    v = _split(u, pre, taps)
    states, _ = _forward_states(v, in_map, decay, state, batch)
    d_post = u.new_empty(0)
    if post is not None:
        d_post = _join(_answers(v, states, taps, out_map), u.shape, d_y, u.dtype)
    d = _split(d_y, post, taps)
    owed = torch.bmm(d, out_map.transpose(1, 2))
    tail = length % chunk
    d_last = torch.view_as_complex(d_after.transpose(0, 1).contiguous())
    d_state = _backward_states(owed, decay, d_last, _tail_power(in_map, tail).conj() * d_last if tail else None, batch)
    d_in = torch.bmm(v.transpose(1, 2), owed)
    d_decay = torch.linalg.vecdot(_complex(states), _complex(owed), dim=1)
    d_v = torch.bmm(d, _toeplitz(taps).transpose(1, 2)).baddbmm_(owed, in_map.transpose(1, 2))
    if tail:
        _tail_backward(v, states, d_v, d_in, d_last, in_map, tail)
    d_taps = _diagonal_sums(torch.bmm(v.transpose(1, 2), d))
    d_out = torch.bmm(states.transpose(1, 2), d)
    d_u = _join(d_v, u.shape, pre, u.dtype)
    d_pre = u.new_empty(0) if pre is None else _join(d_v, u.shape, u, u.dtype)
    d_begin = torch.view_as_real(d_state.transpose(0, 1).to(_complex(states).dtype)).contiguous()
    return d_u, d_pre, d_post, d_taps, d_in, d_out, torch.view_as_real(d_decay).to(decay.dtype).contiguous(), d_begin


@_chunks_backward.register_fake
def _(
    d_y: Tensor, d_after: Tensor, u: Tensor, pre: Any, post: Any, taps: Tensor, in_map: Tensor, out_map: Tensor,
    decay: Tensor, state: Any,
) -> Any:  # fmt: skip
    gates = [u.new_empty(0) if gate is None else u.new_empty(u.shape) for gate in (pre, post)]
    tables = [t.new_empty(t.shape) for t in (taps, in_map, out_map, decay)]
    return u.new_empty(u.shape), *gates, *tables, taps.new_empty(u.shape[0], *decay.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, d_y: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    grads = torch.ops.hippodrome.diagonal_chunks_backward(d_y, d_after, *inputs)
    return tuple(None if given is None else grad for given, grad in zip(inputs, grads, strict=True))


_chunks.register_autograd(_grad, setup_context=_save)


def _split(x: Tensor, gate: Tensor | None, taps: Tensor) -> Tensor:
    """x (B, H, L), times the gate, as chunks (H, B C, T) in the tables' dtype, zeros behind the last token."""
    batch, channels, length = x.shape
    chunk = taps.shape[1]
    n = -(-length // chunk)
    if batch == 1 and gate is None and n * chunk == length and x.dtype == taps.dtype and x.is_contiguous():
        return x.view(channels, n, chunk)
    out = taps.new_empty(channels, batch, n * chunk)
    out[..., length:] = 0
    target = out[..., :length].transpose(0, 1)
    if gate is None:
        target.copy_(x)
    else:
        torch.mul(x.to(taps.dtype), gate.to(taps.dtype), out=target)
    return out.view(channels, batch * n, chunk)


def _join(chunks: Tensor, shape: torch.Size, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Chunks (H, B C, T) as (B, H, L) in `dtype`, times the gate."""
    whole = chunks.view(shape[1], shape[0], -1)[..., : shape[2]].transpose(0, 1)
    out = torch.empty(shape, dtype=dtype)
    if gate is None:
        return out.copy_(whole)
    if dtype == chunks.dtype:
        return torch.mul(whole, gate.to(dtype), out=out)
    return out.copy_(whole * gate.to(chunks.dtype))


def _complex(pairs: Tensor) -> Tensor:
    """(..., 2N) of interleaved pairs as a complex view (..., N)."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


def _toeplitz(taps: Tensor) -> Tensor:
    """(H, T, T): row s to column t by tap t - s, zero below the diagonal."""
    padded = torch.nn.functional.pad(taps, (0, 1))
    return padded[:, _lag(taps.shape[1])]


def _lag(chunk: int) -> Tensor:
    """(T, T): t - s, and T where that is negative."""
    at = torch.arange(chunk)
    lag = at[None, :] - at[:, None]
    return torch.where(lag < 0, chunk, lag)


def _diagonal_sums(square: Tensor) -> Tensor:
    """(H, T, T) -> (H, T): what each tap of a Toeplitz matrix receives."""
    chunk = square.shape[1]
    sums = square.new_zeros(square.shape[0], chunk + 1)
    return sums.index_add_(1, _lag(chunk).flatten(), square.flatten(1))[:, :chunk].contiguous()


def _answers(v: Tensor, states: Tensor, taps: Tensor, out_map: Tensor) -> Tensor:
    return torch.bmm(v, _toeplitz(taps)).baddbmm_(states, out_map)


def _forward_states(v: Tensor, in_map: Tensor, decay: Tensor, state: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
    """States before each chunk, (H, B C, 2N), and the one after the last, (H, B, N) complex128."""
    driven = torch.bmm(v, in_map)
    by_chunk = _complex(driven).unflatten(1, (batch, -1))
    power = torch.view_as_complex(decay).unsqueeze(1)
    carry = torch.zeros(by_chunk.shape[0], batch, by_chunk.shape[3], dtype=torch.complex128)
    if state is not None:
        carry.copy_(torch.view_as_complex(state).transpose(0, 1))
    for c in range(by_chunk.shape[2]):
        after = torch.addcmul(by_chunk[:, :, c].to(carry.dtype), power, carry)
        by_chunk[:, :, c] = carry
        carry = after
    return driven, carry


def _backward_states(owed: Tensor, decay: Tensor, d_last: Tensor, d_tail: Tensor | None, batch: int) -> Tensor:
    """Turn gradients of the states before each chunk, from its outputs alone, into those of the states after it, in place.

    d_last is the gradient of the final state; d_tail, if that lies within the last chunk, what it asks of the state before
    the chunk. Returns the gradient of the first state. All (H, B, N) complex.
    """
    by_chunk = _complex(owed).unflatten(1, (batch, -1))
    power = torch.view_as_complex(decay).conj().resolve_conj().unsqueeze(1)
    carry = d_last.to(torch.complex128) if d_tail is None else torch.zeros_like(d_last, dtype=torch.complex128)
    for c in reversed(range(by_chunk.shape[2])):
        before = torch.addcmul(by_chunk[:, :, c].to(carry.dtype), power, carry)
        by_chunk[:, :, c] = carry
        carry = before
        if d_tail is not None and c == by_chunk.shape[2] - 1:
            carry = carry + d_tail
    return carry


def _final_state(v: Tensor, states: Tensor, last: Tensor, in_map: Tensor, shape: torch.Size) -> Tensor:
    """The state (B, H, N, 2) after the last token, which may lie within a chunk."""
    tail = shape[2] % v.shape[2]
    if tail:
        v_last, s_last = (t.unflatten(1, (shape[0], -1))[:, :, -1] for t in (v, states))
        driven = torch.bmm(v_last[..., :tail], in_map[:, -tail:])
        last = _complex(driven) + _tail_power(in_map, tail) * _complex(s_last)
    return torch.view_as_real(last.transpose(0, 1).to(_complex(states).dtype)).contiguous()


def _tail_power(in_map: Tensor, tail: int) -> Tensor:
    """lambda^tail, (H, 1, N): row T-1-r of the in-map is lambda^r."""
    return _complex(in_map[:, in_map.shape[1] - 1 - tail]).unsqueeze(1)


def _tail_backward(
    v: Tensor, states: Tensor, d_v: Tensor, d_in: Tensor, d_last: Tensor, in_map: Tensor, tail: int
) -> None:
    """Add to d_v and d_in what a final state within the last chunk, whose gradient is d_last (H, B, N), asks of them."""
    batch = d_last.shape[1]
    d_pairs = torch.view_as_real(d_last).flatten(-2)
    v_last, s_last, d_v_last = (t.unflatten(1, (batch, -1))[:, :, -1] for t in (v, states, d_v))
    d_v_last[..., :tail] += torch.bmm(d_pairs, in_map[:, -tail:].transpose(1, 2))
    d_in[:, -tail:] += torch.bmm(v_last[..., :tail].transpose(1, 2), d_pairs)
    _complex(d_in[:, in_map.shape[1] - 1 - tail]).add_((_complex(s_last).conj() * d_last).sum(1))
