"""long_conv on the CPU for short kernels: two Toeplitz products a chunk, this chunk's inputs and the one's before.

With chunks as long as the kernel, y_c = u_c T0 + u_(c-1) T1, where T0 holds tap t - s and T1 tap T + t - s. That is 2 K
multiply-adds a token in matrix products, which for the shift SSM's 64 taps is 1.4 to 8 times faster than the FFT, forward and
backward, once there are tokens enough to be worth the K x K matrices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops.long_conv import long_conv

LONGEST = 64
"""Taps up to which the products are chosen over the FFT. At 128 taps they are between half and twice as fast."""
WORTH = 1.0
"""Tokens a channel over taps squared from which on the products are chosen: where both ways take the same time, measured with
16, 64 and 128 taps, 64 to 16,384 tokens, batches of 1 and 8."""


def _why_not(u: Tensor, kernel: Tensor, *, kernel_rev: Tensor | None = None, **_: object) -> str | None:
    if u.device.type != "cpu":
        return f"the tensor is on {u.device.type}"
    if kernel_rev is not None:
        return "two-sided kernels go by FFT"
    taps, tokens = min(kernel.shape[-1], u.shape[-1]), u.numel() // max(1, u.shape[-2])
    if taps > LONGEST:
        return f"{taps} taps are more than {LONGEST}: the FFT is faster"
    if tokens < WORTH * taps**2:
        return f"{tokens} tokens a channel are few for {taps} x {taps} matrices: the FFT is faster"
    return None


@long_conv.backend("cpu", why_not=_why_not)
def _cpu(
    u: Tensor,
    kernel: Tensor,
    *,
    kernel_rev: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    real = torch.promote_types(u.dtype, torch.float32)
    v = u.to(real) if pre_gate is None else u.to(real) * pre_gate.to(real)
    channels, length = u.shape[-2:]
    taps = kernel[:, :length].to(real)
    if skip is not None:
        taps = torch.cat([taps[:, :1] + skip.to(real).unsqueeze(-1), taps[:, 1:]], -1)
    y = _short(v.reshape(-1, channels, length).transpose(0, 1), taps).transpose(0, 1).reshape(u.shape)
    return (y if post_gate is None else y * post_gate.to(real)).to(u.dtype)


def _short(v: Tensor, taps: Tensor) -> Tensor:
    """v (H, B, L), taps (H, T) -> (H, B, L)."""
    channels, batch, length = v.shape
    chunk = taps.shape[1]
    n = -(-length // chunk)
    near, far = _toeplitz(taps)
    now = F.pad(v, (0, n * chunk - length)).reshape(channels, batch, n, chunk)
    if n == 1:
        return torch.bmm(now.flatten(1, 2), near).view(channels, batch, -1)[..., :length]
    before = F.pad(now[:, :, :-1], (0, 0, 1, 0))
    y = torch.baddbmm(torch.bmm(now.flatten(1, 2), near), before.flatten(1, 2), far)
    return y.view(channels, batch, -1)[..., :length]


def _toeplitz(taps: Tensor) -> tuple[Tensor, Tensor]:
    """(H, T, T) twice: row s to column t by tap t - s, and by tap T + t - s; zero where there is no such tap."""
    chunk = taps.shape[1]
    both = F.pad(taps, (chunk - 1, chunk)).unfold(-1, 2 * chunk, 1).flip(1)
    return both[..., :chunk], both[..., chunk:]
