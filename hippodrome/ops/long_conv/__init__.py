"""long_conv: the causal (or two-sided) convolution with one kernel a channel, gates fused.

    y_t = post_t (sum_(s<=t) k[t-s] pre_s u_s + sum_(s>=t) k_rev[s-t] pre_s u_s + skip pre_t u_t)

Source: FlashConv in H3 (Dao, Fu et al., ICLR 2023), section 4. Both directions include lag 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hippodrome.ops._op import Op


def fft_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """sum_(s<=t) kernel[t-s] u[s] along the last axis, by FFT in u's dtype (float32 or float64). Broadcasts in front."""
    length = u.shape[-1]
    n = length + min(kernel.shape[-1], length)
    # In two dimensions, since torch 2.11 compiles transforms of more for strides that their results need not have.
    rows = torch.fft.rfft(u.flatten(0, -2), n).unflatten(0, u.shape[:-1])
    spectrum = rows * torch.fft.rfft(kernel[..., :length].to(u.dtype), n)
    return torch.fft.irfft(spectrum.flatten(0, -2), n).unflatten(0, spectrum.shape[:-1])[..., :length]


@Op
def long_conv(
    u: Tensor,
    kernel: Tensor,
    *,
    kernel_rev: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    """Outputs (..., H, L) in u's dtype.

    u, pre_gate, post_gate: (..., H, L); kernel, kernel_rev: (H, K) for any K (taps beyond L meet nothing); skip: (H,).
    Arithmetic is at least float32.
    """
    real = torch.promote_types(u.dtype, torch.float32)
    v = u.to(real) if pre_gate is None else u.to(real) * pre_gate.to(real)
    y = fft_conv(v, kernel)
    if kernel_rev is not None:
        y = y + fft_conv(v.flip(-1), kernel_rev).flip(-1)
    if skip is not None:
        y = y + skip.to(real).unsqueeze(-1) * v
    if post_gate is not None:
        y = y * post_gate.to(real)
    return y.to(u.dtype)


# Backends register themselves; the reference must exist first.
from hippodrome.ops.long_conv import cpu as _cpu  # noqa: E402, F401
from hippodrome.ops.long_conv import triton as _triton  # noqa: E402, F401
