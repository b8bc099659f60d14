"""How the Triton programs of `diagonal_ssm` are laid out, and what their launches share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    @classmethod
    def of(cls, modes: int, dtype: torch.dtype) -> Tiling:
        """The layout for this many modes, at most `SLICE`."""
        half = dtype == torch.bfloat16
        n = max(32 if half else 16, 1 << max(0, modes - 1).bit_length())
        chunk = 64 if n <= 32 and dtype != torch.float32 else 32
        if half and n <= 32:
            return cls(64, chunk, n, 4, 3)
        return cls(16, chunk, n, 4, 1)

    def pieces(self, batch: int, channels: int, length: int) -> tuple[int, int]:
        """How many pieces every sequence is cut into, and how many tokens a piece has."""
        # In functions that a compiled graph of any length keeps as they are.
        wanted = torch.sym_max(torch.sym_max(self.R // batch, PROGRAMS * self.R // (channels * batch)), 1)
        groups = torch.sym_max(1, torch.sym_min(wanted, length // (SHORTEST * self.T)))
        span = -(-length // (groups * self.T)) * self.T
        return -(-length // span), span

    def done(self, length: int) -> int:
        """Tokens before the last chunk."""
        return (length - 1) // self.T * self.T


def prepare(
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
    first = weights.new_empty(channels, plan.T)
    tables = weights.new_empty(channels, 4 if backward else 2, 2 * plan.N, plan.T, dtype=PRODUCTS[dtype])
    decay = weights.new_empty(channels, 2, 4, plan.N)
    kernels.prepare[channels,](
        log_modes, weights, either(skip, first), first, tables, decay, modes, span, T=plan.T, N=plan.N,
        HAS_SKIP=skip is not None, BACKWARD=backward, EXACT=PRODUCTS[dtype] == torch.float32, PIECES=groups > 1,
    )  # fmt: skip
    return first, tables, decay


def layout(plan: Tiling, dtype: torch.dtype, stages: int | None = None) -> dict[str, Any]:
    """The constants of a launch. `stages`: in place of the plan's."""
    import triton.language as tl

    kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    return {
        "R": plan.R, "T": plan.T, "N": plan.N, "KIND": kind, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "num_warps": plan.num_warps, "num_stages": stages or plan.num_stages,
    }  # fmt: skip


def alike(u: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel may use one set of addresses: all others, outputs like u included, lie like u."""
    dense = torch.empty_like(u, device="meta").stride() == u.stride()
    return dense and all(t is None or t.stride() == u.stride() for t in others)


def either(t: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is given in place of an absent tensor, which it never reads."""
    return other if t is None else t


def counts(u: Tensor, taps: Tensor | None, past: Tensor | None, pre: Tensor | None) -> tuple[int, int, int]:
    """Taps, tokens of the past, and sequences of pre."""
    return 0 if taps is None else taps.shape[1], 0 if past is None else past.shape[2], len(either(pre, u))


def repeated(u: Tensor, pre: Tensor | None) -> bool:
    """Whether the sequences of pre stand for several of u each."""
    return pre is not None and len(pre) < len(u)
