"""diagonal_ssm: a bank of diagonal state spaces, one a channel, with gates fused and the state carried.

    z_t = exp(log_modes) z_(t-1) + pre_t u_t,    y_t = post_t (Re sum_n weights_n z_t,n + skip pre_t u_t)

Source: H3 (Dao, Fu et al., ICLR 2023), section 4 and appendix C ("state passing"), in a form that serves S4D, DSS, DLR and
EMA as well: whatever the discretisation, a diagonal system is its modes and its output weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hippodrome.ops._op import Op
from hippodrome.ops.long_conv import fft_conv


def mode_powers(log_modes: Tensor, length: int) -> Tensor:
    """exp(l log_modes) for l = 0 ... length-1: (..., N) complex -> (..., N, length).

    Powers are products of a coarse and a fine table, l = coarse * step + fine, the coarse one computed in float64: a
    float32 phase l * Im(log_modes) would be wrong by 0.25 rad at l = 1M.
    """
    step = max(1, int(length**0.5))
    double = log_modes.to(torch.complex128).unsqueeze(-1)
    fine = torch.exp(double * torch.arange(step, device=log_modes.device)).to(log_modes.dtype)
    coarse = torch.exp(double * (step * torch.arange(-(-length // step), device=log_modes.device))).to(log_modes.dtype)
    return (coarse.unsqueeze(-1) * fine.unsqueeze(-2)).flatten(-2)[..., :length]


def mode_kernel(log_modes: Tensor, weights: Tensor, length: int) -> Tensor:
    """The impulse response Re sum_n weights_n exp(l log_modes_n), l < length: (H, N) complex -> (H, length) real."""
    return torch.einsum("hn,hnl->hl", weights, mode_powers(log_modes, length)).real


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
    the z after the tokens before u. Arithmetic and state are at least float32.
    """
    real = torch.promote_types(u.dtype, torch.float32)
    v = u.to(real) if pre_gate is None else u.to(real) * pre_gate.to(real)
    length = u.shape[-1]
    y = fft_conv(v, mode_kernel(log_modes, weights, length))
    after = None
    if state is not None or return_state:
        powers = mode_powers(log_modes, length + 1)
        if state is not None:
            y = y + torch.einsum("...hn,hnl->...hl", state * weights, powers[..., 1:]).real
        if return_state:
            after = torch.einsum("...hl,hnl->...hn", v.to(powers.dtype), powers[..., :length].flip(-1))
            after = after if state is None else after + powers[..., length] * state
    if skip is not None:
        y = y + skip.to(real).unsqueeze(-1) * v
    if post_gate is not None:
        y = y * post_gate.to(real)
    return y.to(u.dtype), after

# Backends register themselves; the reference must exist first.
from hippodrome.ops.diagonal_ssm import cpu as _cpu  # noqa: E402, F401
