"""The tables of diagonal_ssm on the CPU: what a chunk of T tokens does to its outputs and to the state. See `cpu.py`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Tables = tuple[Tensor, Tensor, Tensor, Tensor]
"""toeplitz (H, T, T), owed (H, 2N, T) and in_map (H, T, 2N), the powers lambda^(T-1) ... lambda^0; last lambda^T."""


def tables_of(log_modes: Tensor, weights: Tensor, skip: Tensor | None, chunk: int, real: torch.dtype) -> Tables:
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
        of_states = (backwards.conj() * as_complex(d_in)).mul_(exponents[:chunk].flip(0).unsqueeze(-1)).sum(1)
        of_decay = chunk * decay.conj() * torch.view_as_complex(d_decay)
        return weights.conj() * times_exponent + of_states + of_decay.to(weights.dtype), plain, None


def _powers(base: Tensor, most: int) -> Tensor:
    """base^0 ... base^most of (H, N) as (H, most + 1, N)."""
    return torch.stack(list(accumulate([base] * most, torch.mul, initial=torch.ones_like(base))), 1)


def part_of(tables: Sequence[Tensor], at: slice, chunk: int) -> Tables:
    """Views of tables, or of their gradients, for some channels and chunks of so many tokens; lambda^T (H', N) complex."""
    toeplitz, owed, in_map, decay = (table[at] for table in tables)
    short = in_map.shape[1] - chunk
    if short == 0:
        return toeplitz, owed, in_map, torch.view_as_complex(decay)
    return toeplitz[:, :chunk, :chunk], owed[..., :chunk], in_map[:, short:], as_complex(in_map[:, short - 1])


def as_complex(pairs: Tensor) -> Tensor:
    """(..., 2N) of interleaved pairs as a complex view (..., N)."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))
