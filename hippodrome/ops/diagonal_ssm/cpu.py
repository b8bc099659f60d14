"""diagonal_ssm on the CPU: a state passed between chunks of matrix products. The length-L kernel never exists.

With chunks of T tokens and states s_c before chunk c (H3, section 4.2: "state passing"):

    y_c = u_c Toeplitz(K[:T]) + s_c Re(w lambda^(t+1)),      s_(c+1) = lambda^T s_c + sum_t lambda^(T-1-t) u_(c,t)

All is real matrix products batched over channels, but for the recurrence over chunks. The backward is the same algebra from
right to left. A block of channels takes a segment of chunks at a time through one workspace, which stays in the cache and
costs no page faults. The forward keeps the states between segments, and from those the backward recomputes the others:
memory beyond inputs and outputs is a small part of theirs.

`_cpu_tables.py`: what a chunk does; `_cpu_segments.py`: which chunks at a time, and where; `_cpu_chunks.py`: the products.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops.diagonal_ssm import diagonal_ssm
from hippodrome.ops.diagonal_ssm._cpu_chunks import answer, answer_back, run, run_back, state_of, table_gradients, write
from hippodrome.ops.diagonal_ssm._cpu_segments import blocks_of, most_chunks, segments_of
from hippodrome.ops.diagonal_ssm._cpu_tables import part_of, tables_of

CHUNKS = ((16_384, 64), (1_024, 32), (0, 16))
"""(tokens a channel, chunk): the length of chunks from so many tokens on, each the fastest there with 32 modes. A chunk of T
makes tables of T (T + 4N) numbers a channel, L / T steps of recurrence, and T + 4N multiply-adds a token forward."""


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
    tables = tables_of(log_modes, weights, skip, min(chunk, length), real)

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.expand(u.shape).reshape(-1, channels, length)

    before = None
    if state is not None:
        before = torch.view_as_real(state).to(real).reshape(-1, channels, log_modes.shape[1], 2)
    y, after, _ = torch.ops.hippodrome.diagonal_chunks(
        u.reshape(-1, channels, length), rows(pre_gate), rows(post_gate), *tables, before, most_chunks(prod(lead))
    )
    y = y.reshape(u.shape)
    return y, torch.view_as_complex(after.reshape(*lead, *after.shape[1:])) if return_state else None


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
    """Outputs (B, H, L) and the state (B, H, N, 2) after them, of inputs (B, H, L) and the tables of `tables_of`.

    Third the states (S, B, H, N, 2) before each segment of at most `most` chunks, for the backward.
    """
    y, after, starts = _new_outputs(u, in_map, decay, most)
    tables = (toeplitz, owed, in_map, decay)
    for at, cut in blocks_of(u, in_map, most, signals=1, states=1):
        z = state_of(torch.zeros_like(after[:, at]) if state is None else state[:, at].contiguous())
        for index, segment in enumerate(segments_of(u.shape[2], in_map.shape[1], most)):
            v, s, answers = cut(segment)
            part, tokens = part_of(tables, at, segment.chunk), segment.tokens
            state_of(starts[index][:, at]).copy_(z)
            z = run(u[:, at, tokens], _of(pre, at, tokens), part, z, v, s)
            answer(v, s, part, answers)
            write(answers, y[:, at, tokens], _of(post, at, tokens))
        state_of(after[:, at]).copy_(z)
    return y, after, starts


@_chunks.register_fake
def _(
    u: Tensor, pre: Any, post: Any, toeplitz: Any, owed: Any, in_map: Tensor, decay: Tensor, state: Any, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_outputs(u, in_map, decay, most)


def _of(t: Tensor | None, at: slice, tokens: slice) -> Tensor | None:
    return None if t is None else t[:, at, tokens]


def _new_outputs(u: Tensor, in_map: Tensor, decay: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    # `segments_of` makes up to three that are shorter than the others: unused places are zero.
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
    for at, cut in blocks_of(u, in_map, most, signals=2, states=2):
        q = state_of(d_after[:, at].contiguous())
        for index, segment in reversed(list(enumerate(segments_of(u.shape[2], in_map.shape[1], most)))):
            v, d, s, o, answers = cut(segment)
            part, tokens = part_of(tables, at, segment.chunk), segment.tokens
            run(u[:, at, tokens], _of(pre, at, tokens), part, state_of(starts[index][:, at]), v, s)
            if post is not None:
                answer(v, s, part, answers)
                write(answers, d_post[:, at, tokens], d_y[:, at, tokens])
            q = run_back(d_y[:, at, tokens], _of(post, at, tokens), part, q, d, o)
            table_gradients(v, s, d, o, part_of(d_tables, at, segment.chunk))
            answer_back(d, o, part, answers)
            write(answers, d_u[:, at, tokens], _of(pre, at, tokens))
            if pre is not None:
                write(answers, d_pre[:, at, tokens], u[:, at, tokens])
        state_of(d_state[:, at]).copy_(q)
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
