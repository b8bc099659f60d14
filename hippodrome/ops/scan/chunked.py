"""scan in chunks that advance side by side, on any device: memory linear in the length, some sqrt(L) steps one after another.

    within a chunk:  x_t = a_t x_(t-1) + b_t from zero,   p_t = a_t ... a_1
    over the chunks: carry_c = p_T carry_(c-1) + x_T,     and then x_t += p_t carry_(c-1)

The gradient is the same recurrence from right to left, with the conjugate of the coefficient one token ahead. Coefficients that
rows or tokens share are powers of their own small shape. These are torch's own pointwise operations, a pair a step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops.scan import arguments, in_one_dtype, scan


def _why_not(*_: object, **__: object) -> str | None:
    return None


@scan.backend("chunked", why_not=_why_not)
def _chunked(a: Tensor, b: Tensor, state: Tensor | None = None) -> Tensor:
    return torch.ops.hippodrome.scan_chunks(*in_one_dtype(*arguments(a, b, state))).to(b.dtype)


@torch.library.custom_op("hippodrome::scan_chunks", mutates_args=())
def _chunks(a: Tensor, b: Tensor, before: Tensor) -> Tensor:
    """All x (B, L, N) of a (B or 1, L or 1, N), b (B, L, N) and before (B, N), all of one dtype."""
    length = b.shape[1]
    chunk = max(1, math.isqrt(length))
    whole = length - length % chunk
    x = b.clone(memory_format=torch.contiguous_format)
    same = a.shape[1] == 1
    carry = _advance(a if same else a[:, :whole], x[:, :whole], before, chunk)
    if whole < length:
        _advance(a if same else a[:, whole:], x[:, whole:], carry, length - whole)
    return x


@_chunks.register_fake
def _(a: Tensor, b: Tensor, before: Tensor) -> Tensor:
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def _advance(a: Tensor, x: Tensor, before: Tensor, chunk: int) -> Tensor:
    """Turn x, which holds b, into the states in place, for whole chunks of `chunk` tokens. Returns the last."""
    steps = x.unflatten(1, (-1, chunk))
    ladder = (a.expand(-1, chunk, -1) if a.shape[1] == 1 else a).clone(memory_format=torch.contiguous_format)
    ladder = ladder.unflatten(1, (-1, chunk))
    for t in range(1, chunk):
        steps[:, :, t].addcmul_(ladder[:, :, t], steps[:, :, t - 1])
        ladder[:, :, t].mul_(ladder[:, :, t - 1])
    powers, carries = ladder[:, :, -1].expand(-1, steps.shape[1], -1), [before]
    for power, end in zip(powers.unbind(1), steps[:, :, -1].unbind(1), strict=True):
        carries.append(torch.addcmul(end, power, carries[-1]))
    steps.addcmul_(ladder, torch.stack(carries[:-1], 1).unsqueeze(2))
    return carries[-1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, before = inputs
    ctx.save_for_backward(a, before, output)


def _grad(ctx: Any, d_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, before, x = ctx.saved_tensors
    conj = a.conj().resolve_conj()
    # From the last token, whose gradient nothing follows: its coefficient meets a zero.
    ahead = conj if a.shape[1] == 1 else torch.cat([conj[:, 1:], torch.zeros_like(conj[:, :1])], 1)
    zero = torch.zeros_like(before)
    d_b = torch.ops.hippodrome.scan_chunks(ahead.flip(1), d_x.flip(1), zero).flip(1)
    d_a = d_b * torch.cat([before.unsqueeze(1), x[:, :-1]], 1).conj()
    return d_a.sum_to_size(a.shape), d_b, conj[:, 0] * d_b[:, 0]


_chunks.register_autograd(_grad, setup_context=_save)


def scan_flops(a: Any, b: Tensor, *rest: Any, **out: Any) -> int:
    """Two multiply-adds and a product a number; complex, of 8, 8 and 6 real operations."""
    return b.numel() * (22 if b.is_complex() else 5)


count_flops({torch.ops.hippodrome.scan_chunks: scan_flops})
