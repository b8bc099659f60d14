"""scan: a linear recurrence, each channel by itself, whose coefficients may change from token to token.

    x_t = a_t x_(t-1) + b_t,    or from right to left  x_t = a_t x_(t+1) + b_t

Source: S5 (Smith, Warrington, Linderman, ICLR 2023), which computes it by a parallel scan (Blelloch, 1990).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hippodrome.ops._op import Op
from hippodrome.part import BadInput


@Op
def scan(a: Tensor, b: Tensor, state: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """All x, (B, L, N) in b's dtype; the last, with `reverse` the first, is the state after them.

    b (B, L, N), real or complex; a, broadcastable to it: (N,) for a system that does not change, (B, L, N) for irregular
    time steps, (L, N) where all rows share them; state (B, N), the x before all that is read, None: zero. Arithmetic is at
    least float32.
    """
    a, b, before = arguments(a, b, state)
    dtype, states = b.dtype, []
    a, b = at_least_single(a).expand(b.shape), at_least_single(b)
    x = at_least_single(before)
    for t in in_order(b.shape[1], reverse):
        x = a[:, t] * x + b[:, t]
        states.append(x)
    return torch.stack(states[::-1] if reverse else states, 1).to(dtype)


def in_order(count: int, reverse: bool) -> range:
    """0 ... count-1, or from the last to the first."""
    return range(count)[::-1] if reverse else range(count)


def arguments(a: Tensor, b: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """a as (B or 1, L or 1, N), b, and the state that is meant, after a look at their shapes and kinds."""
    if b.dim() != 3 or b.shape[1] < 1:
        raise BadInput(f"b of shape {tuple(b.shape)} is not (B, L, N) with at least one token")
    if a.is_complex() and not b.is_complex():
        raise BadInput(f"a is {a.dtype} and b {b.dtype}: the states would be complex, so b must be")
    if a.dim() > 3 or any(mine not in (1, whole) for mine, whole in zip(a.shape[::-1], b.shape[::-1], strict=False)):
        raise BadInput(f"a of shape {tuple(a.shape)} does not broadcast to b's {tuple(b.shape)}")
    before = b.new_zeros(b.shape[0], b.shape[2]) if state is None else state
    # Rows and tokens that share a coefficient keep sharing it: a system that does not change has N of them, not B L N.
    a = a.reshape(*[1] * (3 - a.dim()), *a.shape)
    return a.expand(-1, -1, b.shape[2]), b, before


def at_least_single(t: Tensor) -> Tensor:
    """Half precision becomes float32."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def in_one_dtype(a: Tensor, b: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in the dtype that the states have, at least single precision: what backends compute with."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype), before.to(dtype)


# Backends register themselves; the reference must exist first.
from hippodrome.ops.scan import chunked as _chunked  # noqa: E402, F401
from hippodrome.ops.scan import triton as _triton  # noqa: E402, F401
