"""scan in chunks that advance side by side, on any device: memory linear in the length, some sqrt(L) steps one after another.

    within a chunk:  x_t = a_t x_(t-1) + b_t from zero,   p_t = a_t ... a_1
    over the chunks: carry_c = p_T carry_(c-1) + x_T,     and then x_t += p_t carry_(c-1)

The gradient is the same recurrence the other way round, with the conjugate of the coefficient one token ahead. Of coefficients
that rows or tokens share, the p are as few. These are torch's own pointwise operations, a pair a step.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops.scan import arguments, in_one_dtype, in_order, scan


def _why_not(*_: object, **__: object) -> str | None:
    return None


@scan.backend("chunked", why_not=_why_not)
def _chunked(a: Tensor, b: Tensor, state: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    return torch.ops.hippodrome.scan_chunks(*in_one_dtype(*arguments(a, b, state)), reverse).to(b.dtype)


@torch.library.custom_op("hippodrome::scan_chunks", mutates_args=())
def _chunks(a: Tensor, b: Tensor, before: Tensor, reverse: bool) -> Tensor:
    """All x (B, L, N) of a (B or 1, L or 1, N), b (B, L, N) and before (B, N), all of one dtype."""
    length = b.shape[1]
    chunk = max(1, math.isqrt(length))
    cut = length - length % chunk
    pieces = [(slice(0, cut), chunk), (slice(cut, length), length - cut)][: 1 if cut == length else 2]
    x, carry = b.clone(memory_format=torch.contiguous_format), before
    for tokens, size in reversed(pieces) if reverse else pieces:
        carry = _advance(a if a.shape[1] == 1 else a[:, tokens], x[:, tokens], carry, size, reverse)
    return x


@_chunks.register_fake
def _(a: Tensor, b: Tensor, before: Tensor, reverse: bool) -> Tensor:
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def _advance(a: Tensor, x: Tensor, before: Tensor, chunk: int, reverse: bool) -> Tensor:
    """Turn x, which holds b, into the states in place, for whole chunks of `chunk` tokens. Returns the last."""
    steps = x.unflatten(1, (-1, chunk))
    ladder = (a.expand(-1, chunk, -1) if a.shape[1] == 1 else a).clone(memory_format=torch.contiguous_format)
    ladder = ladder.unflatten(1, (-1, chunk))
    order = in_order(chunk, reverse)
    for earlier, t in itertools.pairwise(order):
        steps[:, :, t].addcmul_(ladder[:, :, t], steps[:, :, earlier])
        ladder[:, :, t].mul_(ladder[:, :, earlier])
    ends, powers = steps[:, :, order[-1]], ladder[:, :, order[-1]].expand(-1, steps.shape[1], -1)
    carries = [before]
    for c in in_order(steps.shape[1], reverse):
        carries.append(torch.addcmul(ends[:, c], powers[:, c], carries[-1]))
    starts = carries[-2::-1] if reverse else carries[:-1]
    steps.addcmul_(ladder, torch.stack(starts, 1).unsqueeze(2))
    return carries[-1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, before, ctx.reverse = inputs
    ctx.save_for_backward(a, before, output)


def _grad(ctx: Any, d_x: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    a, before, x = ctx.saved_tensors
    conj = a.conj().resolve_conj()
    # The last token read has no follower: what would be its follower's coefficient meets a zero.
    ahead = conj if a.shape[1] == 1 else _shifted(conj, torch.zeros_like(conj[:, :1]), not ctx.reverse)
    d_b = torch.ops.hippodrome.scan_chunks(ahead, d_x, torch.zeros_like(before), not ctx.reverse)
    d_a = d_b * _shifted(x, before.unsqueeze(1), ctx.reverse).conj()
    first = -1 if ctx.reverse else 0
    return d_a.sum_to_size(a.shape), d_b, conj[:, first] * d_b[:, first], None


def _shifted(t: Tensor, edge: Tensor, left: bool) -> Tensor:
    """t (B, L, N) moved by one token to the left or to the right, with `edge` (B, 1, N) where it left a gap."""
    return torch.cat([t[:, 1:], edge] if left else [edge, t[:, :-1]], 1)


_chunks.register_autograd(_grad, setup_context=_save)


def scan_flops(a: Any, b: Tensor, *rest: Any, **out: Any) -> int:
    """Two multiply-adds and a product a number; complex, of 8, 8 and 6 real operations."""
    return b.numel() * (22 if b.is_complex() else 5)


count_flops({torch.ops.hippodrome.scan_chunks: scan_flops})
