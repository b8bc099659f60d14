"""h3: the token mixing of H3 in one call, from queries, keys and values to the gated output.

    k'_t = sum_(s < T) taps_s k_(t-s);   s_ij = diagonal_ssm(k'_i v_j);   y_j = sum_i q_i s_ij

i, j run over the p = D / H channels of a head; head h has the channels h p + i. Source: Dao, Fu et al. (ICLR 2023), section 3
and the fused kernel of section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippodrome.ops._op import Op
from hippodrome.ops.diagonal_ssm import diagonal_ssm
from hippodrome.ops.long_conv import long_conv


def outer(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Signals (B, D, ...) as views (B, i, j, H, ...): q and k have an i and no j, v has a j and no i."""
    q, k, v = (signal.unflatten(1, (heads, -1)).transpose(1, 2) for signal in (q, k, v))
    p = k.shape[1]
    shape = k.shape[0], p, p, *k.shape[2:]
    return q.unsqueeze(2).expand(shape), k.unsqueeze(2).expand(shape), v.unsqueeze(1).expand(shape)


def gather(y: Tensor) -> Tensor:
    """(B, i, j, H, ...) -> (B, D, ...): the sum over i, heads outside and j inside."""
    summed = y.squeeze(1) if y.shape[1] == 1 else y.sum(1)
    return summed.transpose(1, 2).flatten(1, 2)


def _composed(conv: Any, ssm: Any) -> Any:
    """The op as a short convolution, an outer product and a diagonal SSM, each by the given implementation."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        taps: Tensor | None,
        log_modes: Tensor,
        weights: Tensor,
        *,
        skip: Tensor | None = None,
        past: Tensor | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        real, dtype = torch.promote_types(q.dtype, torch.float32), q.dtype
        q, k, v = (signal.to(real) for signal in (q, k, v))
        if taps is not None:
            signal = k if past is None else torch.cat([past.to(real), k], -1)
            k = conv(signal, taps)[..., signal.shape[-1] - k.shape[-1] :]
        q, k, v = outer(q, k, v, log_modes.shape[0])
        y, after = ssm(k, log_modes, weights, skip=skip, pre_gate=v, post_gate=q, state=state, return_state=return_state)
        return gather(y).to(dtype), after

    return run


_reference = _composed(long_conv.reference, diagonal_ssm.reference)


@Op
def h3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor | None,
    log_modes: Tensor,
    weights: Tensor,
    *,
    skip: Tensor | None = None,
    past: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Outputs (B, D, L) in q's dtype, and the outgoing state of the diagonal systems if asked for.

    q, k, v: (B, D, L), any real dtype, any strides; taps: (D, T), the kernel of the shift, its skip in the first tap, None:
    k' = k; log_modes, weights: (H, N) complex, of the dtypes of diagonal_ssm; H divides D; skip: (H,); past: (B, D, P), the
    last keys before k, oldest first (those further back than P count as zeros); state: (B, p, p, H, N) complex. Arithmetic and
    state are at least float32.
    """
    return _reference(q, k, v, taps, log_modes, weights, skip=skip, past=past, state=state, return_state=return_state)


def _why_not(q: Tensor, *_: object, **__: object) -> str | None:
    return None if q.device.type == "cpu" else f"the tensor is on {q.device.type}"


h3.backend("cpu", why_not=_why_not)(_composed(long_conv, diagonal_ssm))


# Backends register themselves; the reference must exist first.
from hippodrome.ops.h3 import triton as _triton  # noqa: E402, F401
