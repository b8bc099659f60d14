"""diagonal_ssm: a bank of diagonal state spaces, one a channel, with gates fused and the state carried.

    z_t = exp(log_modes) z_(t-1) + pre_t u_t,    y_t = post_t (Re sum_n weights_n z_t,n + skip pre_t u_t)

Source: H3 (Dao, Fu et al., ICLR 2023), section 4 and appendix C ("state passing"), in a form that serves S4D, DSS, DLR and
EMA as well: whatever the discretisation, a diagonal system is its modes and its output weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops._op import Op
from hippodrome.ops.long_conv import fft_conv


def _coarse_and_fine(log_modes: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(c step log_modes), (..., N, C), and exp(f log_modes), (..., N, step), with C step >= length, of this complex dtype.

    Any power below `length` is a product of two entries. Both are computed in float64: a float32 phase l * Im(log_modes)
    would be wrong by 0.25 rad at l = 1M.
    """
    step = max(1, int(length**0.5))
    double = log_modes.to(torch.complex128).unsqueeze(-1)
    fine = torch.exp(double * torch.arange(step, device=log_modes.device))
    coarse = torch.exp(double * (step * torch.arange(-(-length // step), device=log_modes.device)))
    return coarse.to(dtype), fine.to(dtype)


def mode_powers(log_modes: Tensor, length: int, dtype: torch.dtype | None = None) -> Tensor:
    """exp(l log_modes) for l = 0 ... length-1: (..., N) complex -> (..., N, length) of `dtype`; None: log_modes' own."""
    coarse, fine = _coarse_and_fine(log_modes, length, dtype or log_modes.dtype)
    return (coarse.unsqueeze(-1) * fine.unsqueeze(-2)).flatten(-2)[..., :length]


def mode_kernel(log_modes: Tensor, weights: Tensor, length: int) -> Tensor:
    """The impulse response Re sum_n weights_n exp(l log_modes_n), l < length: (..., H, N) complex -> (..., H, length) real.

    One matrix product of the two tables a channel, so that N x length powers never exist. Channels that share their modes
    give log_modes (N,), and share the tables.
    """
    coarse, fine = _coarse_and_fine(log_modes, length, weights.dtype)
    weighted = weights.unsqueeze(-1) * coarse
    left, right = torch.cat([weighted.real, -weighted.imag], -2), torch.cat([fine.real, fine.imag], -2)
    return (left.transpose(-1, -2) @ right).flatten(-2)[..., :length]


def mode_states(log_modes: Tensor, u: Tensor) -> Tensor:
    """The modes at rest after the inputs: sum_l exp((L-1-l) log_modes) u_l, (H, N) and (..., H, L) real -> (..., H, N)."""
    length = u.shape[-1]
    coarse, fine = _coarse_and_fine(log_modes, length, u.dtype.to_complex())
    backwards = F.pad(u.contiguous().flip(-1), (0, coarse.shape[-1] * fine.shape[-1] - length)).unflatten(
        -1, (-1, fine.shape[-1])
    )
    pairs = backwards @ torch.view_as_real(fine.transpose(-1, -2)).flatten(-2)
    return (torch.view_as_complex(pairs.unflatten(-1, (-1, 2))) * coarse.transpose(-1, -2)).sum(-2)


@Op
def diagonal_ssm(
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
    """Outputs (..., H, L) in u's dtype, and the outgoing state if asked for.

    u, pre_gate, post_gate: (..., H, L), any real dtype; log_modes, weights: (H, N) complex64 (complex128 for float64), the
    logarithm of the discrete eigenvalues and the output weights with B folded in; skip: (H,); state: (..., H, N) complex,
    the z after the tokens before u. Arithmetic and state are at least float32. log_modes may be complex128 beside complex64
    weights: a phase rounded to float32 is wrong by 0.1 rad after a million tokens.
    """
    real = torch.promote_types(u.dtype, torch.float32)
    v = u.to(real) if pre_gate is None else u.to(real) * pre_gate.to(real)
    length = u.shape[-1]
    y = fft_conv(v, mode_kernel(log_modes, weights, length))
    after = mode_states(log_modes, v) if return_state else None
    if state is not None:
        y = y + mode_kernel(log_modes, state * weights * torch.exp(log_modes).to(weights.dtype), length)
        if after is not None:
            after = after + torch.exp(length * log_modes.to(torch.complex128)).to(state.dtype) * state
    if skip is not None:
        y = y + skip.to(real).unsqueeze(-1) * v
    if post_gate is not None:
        y = y * post_gate.to(real)
    return y.to(u.dtype), after


# Backends register themselves; the reference must exist first.
from hippodrome.ops.diagonal_ssm import cpu as _cpu  # noqa: E402, F401
from hippodrome.ops.diagonal_ssm import triton as _triton  # noqa: E402, F401
