"""diagonal_ssm on the CPU: a state passed between chunks of matrix products. The length-L kernel never exists.

With chunks of T tokens and states s_c before chunk c (H3, section 4.2: "state passing"):

    y_c = [u_c | s_c] [Toeplitz(K[:T]); Re(w lambda^(t+1))],      s_(c+1) = lambda^T s_c + sum_t lambda^(T-1-t) u_(c,t)

All is real matrix products batched over channels, but for the recurrence over chunks. The backward is the same algebra from
right to left: with d the gradients of the outputs and o those of the states after each chunk, one product [u | s]^T [d | o]
gives the gradients of all tables. It recomputes the states. Channels go a block at a time through one workspace, which stays
in the cache and costs no page faults; memory beyond inputs and outputs is a small multiple of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops.diagonal_ssm import diagonal_ssm, mode_powers

CHUNKS = ((32_768, 64), (2_048, 32), (0, 16))
"""(tokens a channel, chunk): the length of chunks from so many tokens on, each the fastest there with 32 modes. A chunk of T
makes tables of T (T + 2N) numbers a channel, L / T steps of recurrence, and T + 4 N multiply-adds a token."""
WORKSPACE = 1 << 22
"""Numbers in the workspace of a block of channels, or one channel's if that is more."""
STEPS = 1 << 10
"""Most steps that the recurrence takes one by one."""
WIDE = 1 << 10
"""States in a step from which on its arithmetic outweighs the call."""


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
    chunk = next(chunk for tokens, chunk in CHUNKS if u.numel() >= tokens * channels)
    # Even in any case: the states behind a chunk in a row of the workspace are then aligned as complex numbers.
    tables = _tables(log_modes, weights, skip, min(chunk, length + length % 2), real)

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.expand(u.shape).reshape(-1, channels, length)

    before = None
    if state is not None:
        before = torch.view_as_real(state).to(real).reshape(-1, channels, log_modes.shape[1], 2)
    y, after = torch.ops.hippodrome.diagonal_chunks(
        u.reshape(-1, channels, length), rows(pre_gate), rows(post_gate), *tables, before
    )
    y = y.reshape(u.shape)
    return y, torch.view_as_complex(after.reshape(*lead, *after.shape[1:])) if return_state else None


def _tables(
    log_modes: Tensor, weights: Tensor, skip: Tensor | None, chunk: int, real: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """out_map (H, T+2N, T); in_map (H, T+1, 2N), its rows lambda^T ... lambda^0; lambda^T (H, N, 2) in float64."""
    powers = mode_powers(log_modes, chunk + 1)
    answer = weights.unsqueeze(-1) * powers
    taps = answer[..., :chunk].real.sum(1)
    if skip is not None:
        taps = torch.cat([taps[:, :1] + skip.to(taps.dtype).unsqueeze(-1), taps[:, 1:]], -1)
    toeplitz = F.pad(taps, (chunk - 1, 0)).unfold(-1, chunk, 1).flip(1)
    owed = torch.stack([answer[..., 1:].real, -answer[..., 1:].imag], 2).flatten(1, 2)
    in_map = torch.view_as_real(powers.flip(-1).transpose(1, 2)).flatten(2)
    decay = torch.view_as_real(torch.exp(chunk * log_modes.to(torch.complex128)))
    return torch.cat([toeplitz, owed], 1).to(real), in_map.to(real).contiguous(), decay


@torch.library.custom_op("hippodrome::diagonal_chunks", mutates_args=(), device_types="cpu")
def _chunks(
    u: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    out_map: Tensor,
    in_map: Tensor,
    decay: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, L) and the state (B, H, N, 2) after them, of inputs (B, H, L) and the tables of `_tables`."""
    y, after = u.new_empty(u.shape), in_map.new_empty(u.shape[0], *decay.shape)
    _, wide, chunk = out_map.shape
    for at, (x, answers) in _blocks(u, out_map, (wide, chunk)):
        last = _fill_forward(x, u[:, at], _of(pre, at), in_map[at], decay[at], _of(state, at))
        after[:, at] = torch.view_as_real(last).transpose(0, 1)
        torch.bmm(x, out_map[at], out=answers)
        _write(answers, y[:, at], _of(post, at))
    return y, after


@_chunks.register_fake
def _(u: Tensor, pre: Any, post: Any, out_map: Tensor, in_map: Tensor, decay: Tensor, state: Any) -> Any:
    return u.new_empty(u.shape), in_map.new_empty(u.shape[0], *decay.shape)


@torch.library.custom_op("hippodrome::diagonal_chunks_backward", mutates_args=(), device_types="cpu")
def _chunks_backward(
    d_y: Tensor,
    d_after: Tensor,
    u: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    out_map: Tensor,
    in_map: Tensor,
    decay: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, pre, post, out_map, in_map, decay and state; those of gates not given are empty."""
    d_u, d_pre, d_post, d_out, d_in, d_decay, d_state = grads = _new_gradients(u, pre, post, out_map, in_map, decay)
    _, wide, chunk = out_map.shape
    for at, (x, g, answers) in _blocks(u, out_map, (wide, wide, chunk)):
        into, out = in_map[at], out_map[at]
        _fill_forward(x, u[:, at], _of(pre, at), into, decay[at], _of(state, at))
        if post is not None:
            torch.bmm(x, out, out=answers)
            _write(answers, d_post[:, at], d_y[:, at])
        d_last = torch.view_as_complex(d_after[:, at].transpose(0, 1).contiguous())
        d_begin = _fill_backward(g, d_y[:, at], _of(post, at), out, into, decay[at], d_last)
        d_state[:, at] = torch.view_as_real(d_begin).transpose(0, 1)
        _table_gradients(x, g, d_out[at], d_in[at], d_decay[at])
        torch.bmm(g, torch.cat([out[:, :chunk].transpose(1, 2), into[:, 1:].transpose(1, 2)], 1), out=answers)
        _last_chunk_gradients(x, d_last, into, answers, d_in[at], u.shape[2])
        _write(answers, d_u[:, at], _of(pre, at))
        if pre is not None:
            _write(answers, d_pre[:, at], u[:, at])
    return grads


@_chunks_backward.register_fake
def _(
    d_y: Tensor, d_after: Tensor, u: Tensor, pre: Any, post: Any, out_map: Tensor, in_map: Tensor, decay: Tensor, state: Any
) -> Any:
    return _new_gradients(u, pre, post, out_map, in_map, decay)


def _new_gradients(
    u: Tensor, pre: Tensor | None, post: Tensor | None, out_map: Tensor, in_map: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_pre, d_post = (u.new_empty(0) if gate is None else gate.new_empty(gate.shape) for gate in (pre, post))
    d_out, d_in, d_decay = (table.new_empty(table.shape) for table in (out_map, in_map, decay))
    return u.new_empty(u.shape), d_pre, d_post, d_out, d_in, d_decay, in_map.new_empty(u.shape[0], *decay.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, d_y: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    grads = torch.ops.hippodrome.diagonal_chunks_backward(d_y, d_after, *inputs)
    return tuple(None if given is None else grad for given, grad in zip(inputs, grads, strict=True))


_chunks.register_autograd(_grad, setup_context=_save)


def _blocks(u: Tensor, out_map: Tensor, widths: Sequence[int]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of the channels, and for each the rows (H', C B, width) of one workspace: chunk by chunk, then by batch."""
    batch, channels, length = u.shape
    rows = -(-length // out_map.shape[2]) * batch
    size = min(channels, max(1, WORKSPACE // (rows * max(widths))))
    spaces = [out_map.new_empty(size, rows, width) for width in widths]
    for start in range(0, channels, size):
        stop = min(start + size, channels)
        yield slice(start, stop), [space[: stop - start] for space in spaces]


def _of(t: Tensor | None, at: slice) -> Tensor | None:
    return None if t is None else t[:, at]


def _fill_forward(x: Tensor, u: Tensor, pre: Tensor | None, in_map: Tensor, decay: Tensor, state: Tensor | None) -> Tensor:
    """Fill x (H, C B, T + 2N) with the gated inputs and the states before each chunk. Returns the last state (H, B, N)."""
    batch, chunk = u.shape[0], in_map.shape[1] - 1
    v, s = x[..., :chunk], x[..., chunk:]
    _read(u, v, pre)
    z = _states(s, batch)
    if state is None:
        z[:, 0] = 0
    else:
        z[:, 0] = torch.view_as_complex(state).transpose(0, 1)
    if z.shape[1] > 1:
        torch.bmm(v[:, :-batch], in_map[:, 1:], out=s[:, batch:])
        _scan(z, _column(decay))
    tail = _tail(u.shape[2], chunk)
    driven = torch.bmm(v[:, -batch:, :tail], in_map[:, -tail:])
    return torch.addcmul(_complex(driven), _power(in_map, tail), z[:, -1])


def _fill_backward(
    g: Tensor, d_y: Tensor, post: Tensor | None, out_map: Tensor, in_map: Tensor, decay: Tensor, d_last: Tensor
) -> Tensor:
    """Fill g (H, C B, T + 2N) with the gradients of the ungated outputs and of the states after each chunk.

    d_last (H, B, N) is the gradient of the last state, of which only what it asks of the state before the last chunk enters g.
    Returns the gradient of the first state.
    """
    batch, chunk = d_y.shape[0], in_map.shape[1] - 1
    d, o = g[..., :chunk], g[..., chunk:]
    _read(d_y, d, post)
    z = _states(o, batch)
    z[:, -1] = 0
    owed = out_map[:, chunk:].transpose(1, 2)
    begin = _complex(torch.bmm(d[:, :batch], owed))
    last = _power(in_map, _tail(d_y.shape[2], chunk)).conj() * d_last
    if z.shape[1] == 1:
        return begin + last
    torch.bmm(d[:, batch:], owed, out=o[:, :-batch])
    z[:, -2] += last
    power = _column(decay).conj().resolve_conj()
    _scan(z[:, :-1], power, reverse=True)
    return begin + power[:, 0].to(begin.dtype) * z[:, 0]


def _scan(z: Tensor, power: Tensor, *, reverse: bool = False) -> None:
    """z[:, c] += power z[:, c-1], or c+1 in reverse, one after the other in place: (H, C, B, N) by (H, 1, 1, N) complex128.

    Many chunks are cut into groups, all of which advance at once: first each alone, then their ends by this same scan, then
    what a group owes to the end of the one before. That makes wide steps of narrow ones. It also keeps long memories exact: a
    power rounded to float32, 6e-8 off, is never applied more than STEPS times in a row, larger powers come from float64.
    """
    size = int(z.shape[1] ** 0.5)
    if size < 8 or (z.shape[1] <= STEPS and z[:, 0].numel() >= WIDE):
        lanes = z.split(1, 1)
        _advance(lanes[::-1] if reverse else lanes, power)
        return
    rest = z.shape[1] % size
    grouped = z[:, rest:] if reverse else z[:, : z.shape[1] - rest]
    lanes = grouped.unflatten(1, (-1, size)).unbind(2)
    *inner, ends = lanes[::-1] if reverse else lanes
    _advance([*inner, ends], power)
    powers = list(accumulate([power] * size, torch.mul))
    _scan(ends, powers[-1], reverse=reverse)
    for lane, to_here in zip(inner, powers, strict=False):
        _advance([ends[:, 1:], lane[:, :-1]] if reverse else [ends[:, :-1], lane[:, 1:]], to_here)
    if rest:
        _scan(z[:, : rest + 1] if reverse else z[:, -rest - 1 :], power, reverse=reverse)


def _advance(lanes: Sequence[Tensor], power: Tensor) -> None:
    power = power.to(lanes[0].dtype)
    for before, here in pairwise(lanes):
        here.addcmul_(power, before)


def _table_gradients(x: Tensor, g: Tensor, d_out: Tensor, d_in: Tensor, d_decay: Tensor) -> None:
    """Gradients of the tables from all whole chunks."""
    chunk = d_out.shape[2]
    square = torch.bmm(x.transpose(1, 2), g)
    d_out.copy_(square[..., :chunk])
    d_in[:, 0] = 0
    d_in[:, 1:] = square[:, :chunk, chunk:]
    # conj(s) o, of which the product of interleaved pairs holds the four parts on its diagonal of 2 x 2 blocks.
    re_re, re_im, im_re, im_im = (
        square[:, chunk + i :: 2, chunk + j :: 2].diagonal(dim1=1, dim2=2) for i in (0, 1) for j in (0, 1)
    )
    d_decay.copy_(torch.stack([re_re + im_im, re_im - im_re], -1))


def _last_chunk_gradients(x: Tensor, d_last: Tensor, in_map: Tensor, d_v: Tensor, d_in: Tensor, length: int) -> None:
    """Add to d_v and d_in what the last state, whose gradient is d_last (H, B, N), asks of the last chunk."""
    batch, chunk = d_last.shape[1], d_v.shape[2]
    tail = _tail(length, chunk)
    d_pairs = torch.view_as_real(d_last).flatten(2)
    d_v[:, -batch:, :tail] += torch.bmm(d_pairs, in_map[:, -tail:].transpose(1, 2))
    d_in[:, -tail:] += torch.bmm(x[:, -batch:, :tail].transpose(1, 2), d_pairs)
    _power(d_in, tail).add_((_complex(x[:, -batch:, chunk:]).conj() * d_last).sum(1, keepdim=True))


def _tail(length: int, chunk: int) -> int:
    """Tokens in the last chunk."""
    return (length - 1) % chunk + 1


def _power(in_map: Tensor, exponent: int) -> Tensor:
    """The row lambda^exponent of an in_map, (H, 1, N) complex."""
    return _complex(in_map[:, in_map.shape[1] - 1 - exponent]).unsqueeze(1)


def _complex(pairs: Tensor) -> Tensor:
    """(..., 2N) of interleaved pairs as a complex view (..., N)."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


def _states(pairs: Tensor, batch: int) -> Tensor:
    """(H, C B, 2N) as a complex view (H, C, B, N)."""
    return _complex(pairs.unflatten(1, (-1, batch)))


def _column(decay: Tensor) -> Tensor:
    """(H, N, 2) as complex numbers (H, 1, 1, N)."""
    return torch.view_as_complex(decay)[:, None, None]


def _pieces(chunks: Tensor, signal: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views (H, C, B, T) of chunks (H, C B, T) beside those of a signal (B, H, L): all whole chunks, then the rest."""
    chunk = chunks.shape[2]
    grid = chunks.unflatten(1, (-1, signal.shape[0]))
    n, rest = divmod(signal.shape[2], chunk)
    if n:
        yield grid[:, :n], signal[..., : n * chunk].unflatten(-1, (n, chunk)).permute(1, 2, 0, 3)
    if rest:
        yield grid[:, n:, :, :rest], signal[..., n * chunk :].unsqueeze(2).permute(1, 2, 0, 3)


def _read(signal: Tensor, chunks: Tensor, gate: Tensor | None) -> None:
    """Copy a signal (B, H, L), times its gate, into chunks (H, C B, T), zeros behind the last token."""
    batch, _, length = signal.shape
    chunks[:, -batch:, _tail(length, chunks.shape[2]) :] = 0
    gates = [None, None] if gate is None else [piece for _, piece in _pieces(chunks, gate)]
    for (target, piece), by in zip(_pieces(chunks, signal), gates, strict=False):
        _product(piece, by, target)


def _write(chunks: Tensor, signal: Tensor, gate: Tensor | None) -> None:
    """Copy chunks (H, C B, T), times the gate (B, H, L), into a signal (B, H, L)."""
    gates = [None, None] if gate is None else [piece for _, piece in _pieces(chunks, gate)]
    for (piece, target), by in zip(_pieces(chunks, signal), gates, strict=False):
        _product(piece, by, target)


def _product(a: Tensor, b: Tensor | None, out: Tensor) -> None:
    """a b, or a, into `out`, rounded once."""
    if b is None:
        out.copy_(a)
    elif a.dtype == b.dtype == out.dtype:
        torch.mul(a, b, out=out)
    else:
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        out.copy_(a.to(wide) * b.to(wide))
