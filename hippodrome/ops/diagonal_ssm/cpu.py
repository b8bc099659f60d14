"""diagonal_ssm on the CPU: a state passed between chunks of matrix products. The length-L kernel never exists.

With chunks of T tokens and states s_c before chunk c (H3, section 4.2: "state passing"):

    y_c = u_c Toeplitz(K[:T]) + s_c Re(w lambda^(t+1)),      s_(c+1) = lambda^T s_c + sum_t lambda^(T-1-t) u_(c,t)

All is real matrix products batched over channels, but for the recurrence over chunks. The backward is the same algebra from
right to left. A block of channels takes a segment of chunks at a time through one workspace, which stays in the cache and
costs no page faults. The forward keeps the states between segments, and from those the backward recomputes the others:
memory beyond inputs and outputs is a small part of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops.diagonal_ssm import diagonal_ssm

CHUNKS = ((16_384, 64), (1_024, 32), (0, 16))
"""(tokens a channel, chunk): the length of chunks from so many tokens on, each the fastest there with 32 modes. A chunk of T
makes tables of T (T + 4N) numbers a channel, L / T steps of recurrence, and T + 4N multiply-adds a token forward."""
ROWS = 512
"""Rows of a matrix product, which are the chunks of a segment times the batch, unless a batch has more."""
WORKSPACE = 1 << 21
"""Numbers in the workspace of a block of channels, or one channel's if that is more."""
LANES = 8
"""Most steps that the recurrence takes one by one in the signal's precision."""

Tables = tuple[Tensor, Tensor, Tensor, Tensor]
"""toeplitz (H, T, T), owed (H, 2N, T) and in_map (H, T, 2N), the powers lambda^(T-1) ... lambda^0; last lambda^T."""


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
    tables = _tables(log_modes, weights, skip, min(chunk, length), real)

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.expand(u.shape).reshape(-1, channels, length)

    before = None
    if state is not None:
        before = torch.view_as_real(state).to(real).reshape(-1, channels, log_modes.shape[1], 2)
    groups = ROWS // (LANES * max(1, prod(lead)))
    y, after, _ = torch.ops.hippodrome.diagonal_chunks(
        u.reshape(-1, channels, length), rows(pre_gate), rows(post_gate), *tables, before, max(1, groups) * LANES
    )
    y = y.reshape(u.shape)
    return y, torch.view_as_complex(after.reshape(*lead, *after.shape[1:])) if return_state else None


def _tables(log_modes: Tensor, weights: Tensor, skip: Tensor | None, chunk: int, real: torch.dtype) -> Tables:
    """For chunks of `chunk` tokens, lambda^T as pairs (H, N, 2) in float64."""
    taps, owed, in_map, decay = _TablesOfPowers.apply(log_modes, weights, chunk)
    if skip is not None:
        taps = torch.cat([taps[:, :1] + skip.to(taps.dtype).unsqueeze(-1), taps[:, 1:]], -1)
    toeplitz = F.pad(taps, (chunk - 1, 0)).unfold(-1, chunk, 1).flip(1)
    return toeplitz.to(real), owed.to(real), in_map.to(real), decay


class _TablesOfPowers(torch.autograd.Function):
    """The first taps (H, T), owed, in_map and lambda^T, with gradients in fewer passes than those of the single steps."""

    @staticmethod
    def forward(ctx: Any, log_modes: Tensor, weights: Tensor, chunk: int) -> Tables:
        step = max(1, int(chunk**0.5))
        # Any power to T is a product of two, which come from complex128: float32 phases would be off.
        fine = _powers(torch.exp(log_modes.to(torch.complex128)), step)
        coarse = _powers(fine[:, step], chunk // step)
        decay = coarse[:, -1] * fine[:, chunk % step]
        fine, coarse = fine[:, :step].to(weights.dtype), coarse.to(weights.dtype)
        powers = (coarse.mT.unsqueeze(-1) * fine.mT.unsqueeze(-2)).flatten(-2)[..., : chunk + 1]
        backwards = (coarse.flip(1).unsqueeze(2) * fine.flip(1).unsqueeze(1)).flatten(1, 2)[:, -chunk:].contiguous()
        answer = weights.unsqueeze(-1) * powers
        owed = torch.stack([answer[..., 1:].real, -answer[..., 1:].imag], 2).flatten(1, 2)
        ctx.save_for_backward(weights, powers, backwards, decay)
        return answer[..., :chunk].real.sum(1), owed, torch.view_as_real(backwards).flatten(2), torch.view_as_real(decay)

    @staticmethod
    def backward(ctx: Any, d_taps: Tensor, d_owed: Tensor, d_in: Tensor, d_decay: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, powers, backwards, decay = ctx.saved_tensors
        chunk = d_taps.shape[1]
        d_re, d_im = d_owed.unflatten(1, (-1, 2)).unbind(2)
        d_answer = F.pad(torch.complex(d_re, -d_im), (1, 0))
        d_answer[..., :chunk] += d_taps.unsqueeze(1)
        exponents = torch.arange(chunk + 1, device=powers.device).to(powers.dtype)
        plain, times_exponent = (
            (powers.conj() * d_answer).matmul(torch.stack([torch.ones_like(exponents), exponents], 1)).unbind(-1)
        )
        of_states = (backwards.conj() * _complex(d_in)).mul_(exponents[:chunk].flip(0).unsqueeze(-1)).sum(1)
        of_decay = chunk * decay.conj() * torch.view_as_complex(d_decay)
        return weights.conj() * times_exponent + of_states + of_decay.to(weights.dtype), plain, None


def _powers(base: Tensor, most: int) -> Tensor:
    """base^0 ... base^most of (H, N) as (H, most + 1, N)."""
    return torch.stack(list(accumulate([base] * most, torch.mul, initial=torch.ones_like(base))), 1)


@torch.library.custom_op("hippodrome::diagonal_chunks", mutates_args=(), device_types="cpu")
def _chunks(
    u: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    toeplitz: Tensor,
    owed: Tensor,
    in_map: Tensor,
    decay: Tensor,
    state: Tensor | None,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, H, L) and the state (B, H, N, 2) after them, of inputs (B, H, L) and the tables of `_tables`.

    Third the states (S, B, H, N, 2) before each segment of at most `most` chunks, for the backward.
    """
    y, after, starts = _new_outputs(u, in_map, decay, most)
    tables = (toeplitz, owed, in_map, decay)
    for at, cut in _blocks(u, in_map, most, signals=1, states=1):
        z = _state_of(torch.zeros_like(after[:, at]) if state is None else state[:, at].contiguous())
        for index, segment in enumerate(_segments(u.shape[2], in_map.shape[1], most)):
            v, s, answers = cut(segment)
            part, tokens = _part(tables, at, segment.chunk), segment.tokens
            _state_of(starts[index][:, at]).copy_(z)
            z = _run(u[:, at, tokens], _of(pre, at, tokens), part, z, v, s)
            _answer(v, s, part, answers)
            _write(answers, y[:, at, tokens], _of(post, at, tokens))
        _state_of(after[:, at]).copy_(z)
    return y, after, starts


@_chunks.register_fake
def _(
    u: Tensor, pre: Any, post: Any, toeplitz: Any, owed: Any, in_map: Tensor, decay: Tensor, state: Any, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_outputs(u, in_map, decay, most)


def _new_outputs(u: Tensor, in_map: Tensor, decay: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    # `_segments` makes up to three that are shorter than the others: unused places are zero.
    segments, state = u.shape[2] // (most * in_map.shape[1]) + 3, (u.shape[0], *decay.shape)
    return u.new_empty(u.shape), in_map.new_empty(state), in_map.new_zeros(segments, *state)


@torch.library.custom_op("hippodrome::diagonal_chunks_backward", mutates_args=(), device_types="cpu")
def _chunks_backward(
    d_y: Tensor,
    d_after: Tensor,
    starts: Tensor,
    u: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    toeplitz: Tensor,
    owed: Tensor,
    in_map: Tensor,
    decay: Tensor,
    most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, pre, post, toeplitz, owed, in_map, decay and state; those of gates not given are empty."""
    grads = _new_gradients(d_after, u, pre, post, toeplitz, owed, in_map, decay)
    d_u, d_pre, d_post, *d_tables, d_state = grads
    tables = (toeplitz, owed, in_map, decay)
    for at, cut in _blocks(u, in_map, most, signals=2, states=2):
        q = _state_of(d_after[:, at].contiguous())
        for index, segment in reversed(list(enumerate(_segments(u.shape[2], in_map.shape[1], most)))):
            v, d, s, o, answers = cut(segment)
            part, tokens = _part(tables, at, segment.chunk), segment.tokens
            _run(u[:, at, tokens], _of(pre, at, tokens), part, _state_of(starts[index][:, at]), v, s)
            if post is not None:
                _answer(v, s, part, answers)
                _write(answers, d_post[:, at, tokens], d_y[:, at, tokens])
            q = _run_back(d_y[:, at, tokens], _of(post, at, tokens), part, q, d, o)
            _table_gradients(v, s, d, o, _part(d_tables, at, segment.chunk))
            _answer_back(d, o, part, answers)
            _write(answers, d_u[:, at, tokens], _of(pre, at, tokens))
            if pre is not None:
                _write(answers, d_pre[:, at, tokens], u[:, at, tokens])
        _state_of(d_state[:, at]).copy_(q)
    return grads


@_chunks_backward.register_fake
def _(
    d_y: Any, d_after: Tensor, starts: Any, u: Tensor, pre: Any, post: Any, toeplitz: Tensor, owed: Tensor, in_map: Tensor,
    decay: Tensor, most: int,
) -> Any:  # fmt: skip
    return _new_gradients(d_after, u, pre, post, toeplitz, owed, in_map, decay)


def _new_gradients(
    d_after: Tensor, u: Tensor, pre: Tensor | None, post: Tensor | None, *tables: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_u, d_pre, d_post = (u.new_empty(0) if t is None else t.new_empty(t.shape) for t in (u, pre, post))
    d_toeplitz, d_owed, d_in, d_decay = (table.new_zeros(table.shape) for table in tables)
    return d_u, d_pre, d_post, d_toeplitz, d_owed, d_in, d_decay, d_after.new_empty(d_after.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.most = inputs
    ctx.save_for_backward(output[2], *tensors)


def _grad(ctx: Any, d_y: Tensor, d_after: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    starts, *inputs = ctx.saved_tensors
    grads = torch.ops.hippodrome.diagonal_chunks_backward(d_y, d_after, starts, *inputs[:-1], ctx.most)
    return *(None if given is None else grad for given, grad in zip(inputs, grads, strict=True)), None


_chunks.register_autograd(_grad, setup_context=_save)


def _flops(u: Tensor, pre: Any, post: Any, toeplitz: Any, owed: Tensor, *rest: Any, **out: Any) -> int:
    """Two a multiply-add of the matrix products."""
    _, pairs, chunk = owed.shape
    return 2 * u.numel() * (chunk + 2 * pairs)


def _flops_backward(
    d_y: Any,
    d_after: Any,
    starts: Any,
    u: Tensor,
    pre: Any,
    post: Tensor | None,
    toeplitz: Any,
    owed: Tensor,
    *rest: Any,
    **out: Any,
) -> int:
    """The states again, their gradients, the inputs', the tables'; with a gate behind, the outputs again."""
    _, pairs, chunk = owed.shape
    again = 0 if post is None else chunk + pairs
    return 2 * u.numel() * (2 * chunk + 5 * pairs + again)


count_flops({torch.ops.hippodrome.diagonal_chunks: _flops, torch.ops.hippodrome.diagonal_chunks_backward: _flops_backward})


class _Segment(NamedTuple):
    """Some chunks of `chunk` tokens each, which are `tokens` of the signal."""

    tokens: slice
    chunks: int
    chunk: int


def _segments(length: int, chunk: int, most: int) -> list[_Segment]:
    """`most` whole chunks each; then those left in groups of LANES, those left then, and the last one, not whole."""
    whole, rest = divmod(length, chunk)
    left = whole % most
    alone = left % LANES
    counts = [*[most] * (whole // most), left - alone, alone]
    segments, end = [], 0
    for chunks, wide in (*((n, chunk) for n in counts), (1, rest)):
        if chunks * wide:
            start, end = end, end + chunks * wide
            segments.append(_Segment(slice(start, end), chunks, wide))
    return segments


def _blocks(
    u: Tensor, in_map: Tensor, most: int, *, signals: int, states: int
) -> Iterator[tuple[slice, Callable[[_Segment], list[Tensor]]]]:
    """Slices of the channels, and for each how one workspace is cut for a segment: chunk by chunk, then by batch.

    That is `signals` of (H', (C + 1) B, T), `states` of (H', C B, 2N) and one of (H', C B, T).
    """
    batch, channels, length = u.shape
    chunk, pairs = in_map.shape[1:]
    rows = batch * min(most, -(-length // chunk))
    widths = [(rows + batch, chunk)] * signals + [(rows, pairs)] * states + [(rows, chunk)]
    size = min(channels, max(1, WORKSPACE // sum(tall * wide for tall, wide in widths)))
    spaces = [in_map.new_empty(size * tall * wide) for tall, wide in widths]

    def cut(count: int, segment: _Segment) -> list[Tensor]:
        tall, wide = batch * segment.chunks, segment.chunk
        shapes = [(tall + batch, wide)] * signals + [(tall, pairs)] * states + [(tall, wide)]
        return [space[: count * prod(shape)].view(count, *shape) for space, shape in zip(spaces, shapes, strict=True)]

    for start in range(0, channels, size):
        stop = min(start + size, channels)
        yield slice(start, stop), partial(cut, stop - start)


def _part(tables: Sequence[Tensor], at: slice, chunk: int) -> Tables:
    """Views of tables, or of their gradients, for some channels and chunks of so many tokens; lambda^T (H', N) complex."""
    toeplitz, owed, in_map, decay = (table[at] for table in tables)
    short = in_map.shape[1] - chunk
    if short == 0:
        return toeplitz, owed, in_map, torch.view_as_complex(decay)
    return toeplitz[:, :chunk, :chunk], owed[..., :chunk], in_map[:, short:], _complex(in_map[:, short - 1])


def _run(u: Tensor, pre: Tensor | None, part: Tables, z: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Fill v behind its first B rows with the gated inputs and s with the states before each chunk. Returns the last."""
    batch, (_, _, in_map, decay) = u.shape[0], part
    _read(u, v[:, batch:], pre)
    # A chunk's state is driven by the chunk before it. Before the first there is z.
    torch.bmm(v[:, :-batch], in_map, out=s)
    s[:, :batch] = 0
    return _scan(_grid(s, batch), z, decay) + _complex(torch.bmm(v[:, -batch:], in_map))


def _run_back(d_y: Tensor, post: Tensor | None, part: Tables, q: Tensor, d: Tensor, o: Tensor) -> Tensor:
    """Fill d but for its last B rows with the gradients of ungated outputs, o with those of the states after each chunk.

    From the gradient of the state after all, returns that of the state before all.
    """
    batch, owed, decay = d_y.shape[0], part[1].transpose(1, 2), part[3].conj()
    _read(d_y, d[:, :-batch], post)
    torch.bmm(d[:, batch:], owed, out=o)
    o[:, -batch:] = 0
    return _scan(_grid(o, batch), q, decay, reverse=True) + _complex(torch.bmm(d[:, :batch], owed))


def _scan(z: Tensor, carry: Tensor, decay: Tensor, *, reverse: bool = False) -> Tensor:
    """z_c += decay z_(c-1) in place, for z (H, C, B, N) and with `carry` (H, B, N) added to z_0; c+1 and the last in reverse.

    Returns decay times the last, in complex128. Groups of LANES steps advance at once, each by itself; then what each carries
    into the next, in complex128 one after the other; then what was carried into a group reaches all of its steps. A power
    rounded to float32, 6e-8 off, is so never applied more than LANES times: long memories stay exact.
    """
    lanes, batch, one = min(LANES, z.shape[1]), z.shape[2], decay.to(torch.complex128)
    *powers, over = accumulate([one] * lanes, torch.mul, initial=torch.ones_like(one))
    order = slice(None, None, -1 if reverse else 1)

    def over_the_batch(t: Tensor) -> Tensor:
        # Not broadcast: one long inner loop instead of many short ones.
        return t.to(z.dtype).unsqueeze(-2).expand(*t.shape[:-1], batch, -1).contiguous()

    groups, step = z.unflatten(1, (-1, lanes)), over_the_batch(one).unsqueeze(1)
    steps = groups.unbind(2)[order]
    for before, here in pairwise(steps):
        here.addcmul_(step, before)
    ends, given = one[:, None, None] * steps[-1], carry.unsqueeze(1)
    carries = torch.cat([ends, given] if reverse else [given, ends], 1)
    for before, here in pairwise(carries.unbind(1)[order]):
        here.addcmul_(over.unsqueeze(1), before)
    carried, last = (carries[:, 1:], carries[:, 0]) if reverse else (carries[:, :-1], carries[:, -1])
    ladder = over_the_batch(torch.stack(powers[order], 1)).unsqueeze(1)
    groups.addcmul_(ladder, carried.to(z.dtype).unsqueeze(2))
    return last


def _answer(v: Tensor, s: Tensor, part: Tables, answers: Tensor) -> None:
    """The outputs before their gate."""
    batch, (toeplitz, owed, _, _) = v.shape[1] - s.shape[1], part
    torch.bmm(v[:, batch:], toeplitz, out=answers).baddbmm_(s, owed)


def _answer_back(d: Tensor, o: Tensor, part: Tables, answers: Tensor) -> None:
    """The gradients of the gated inputs."""
    batch, (toeplitz, _, in_map, _) = d.shape[1] - o.shape[1], part
    torch.bmm(d[:, :-batch], toeplitz.transpose(1, 2), out=answers).baddbmm_(o, in_map.transpose(1, 2))


def _table_gradients(v: Tensor, s: Tensor, d: Tensor, o: Tensor, into: Tables) -> None:
    """Add the gradients of the tables, but for what is always zero in the Toeplitz matrix."""
    batch, (d_toeplitz, d_owed, d_in, d_decay) = v.shape[1] - s.shape[1], into
    v, d = v[:, batch:], d[:, :-batch]
    for target, left, right in ((d_toeplitz, v, d), (d_owed, s, d), (d_in, v, o)):
        if target.is_contiguous():
            target.baddbmm_(left.transpose(1, 2), right)
        else:
            target += torch.bmm(left.transpose(1, 2), right)
    d_decay += torch.linalg.vecdot(_complex(s), _complex(o), dim=1)


def _complex(pairs: Tensor) -> Tensor:
    """(..., 2N) of interleaved pairs as a complex view (..., N)."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


def _grid(pairs: Tensor, batch: int) -> Tensor:
    """(H, C B, 2N) as a complex view (H, C, B, N)."""
    return _complex(pairs.unflatten(1, (-1, batch)))


def _state_of(pairs: Tensor) -> Tensor:
    """(B, H, N, 2) as a complex view (H, B, N)."""
    return torch.view_as_complex(pairs).transpose(0, 1)


def _of(t: Tensor | None, at: slice, tokens: slice) -> Tensor | None:
    return None if t is None else t[:, at, tokens]


def _by_chunks(signal: Tensor, chunk: int) -> Tensor:
    """(B, H, C T) as a view (H, C, B, T)."""
    return signal.unflatten(2, (-1, chunk)).permute(1, 2, 0, 3)


def _read(signal: Tensor, chunks: Tensor, gate: Tensor | None) -> None:
    """Copy a signal (B, H, C T), times its gate, into chunks (H, C B, T)."""
    chunk, batch = chunks.shape[2], signal.shape[0]
    by = None if gate is None else _by_chunks(gate, chunk)
    _product(_by_chunks(signal, chunk), by, chunks.unflatten(1, (-1, batch)))


def _write(chunks: Tensor, signal: Tensor, gate: Tensor | None) -> None:
    """Copy chunks (H, C B, T), times the gate (B, H, C T), into a signal (B, H, C T)."""
    chunk, batch = chunks.shape[2], signal.shape[0]
    by = None if gate is None else _by_chunks(gate, chunk)
    _product(chunks.unflatten(1, (-1, batch)), by, _by_chunks(signal, chunk))


def _product(a: Tensor, b: Tensor | None, out: Tensor) -> None:
    """a b, or a, into `out`, rounded once."""
    if b is None:
        out.copy_(a)
    elif a.dtype == b.dtype == out.dtype:
        torch.mul(a, b, out=out)
    else:
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        out.copy_(a.to(wide) * b.to(wide))
