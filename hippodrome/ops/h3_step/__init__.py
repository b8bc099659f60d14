"""h3_step: one token through H3's two systems and two gates.

    k'_i = sum_a taps_a,i k_i(a tokens ago);   z_ij = modes z_ij + k'_i v_j
    y_j  = sum_i q_i (Re sum_n weights_n z_ij,n + skip k'_i v_j)

i, j run over the p channels of a head. Source: H3 (Dao, Fu et al., ICLR 2023), section 3, one step of its recurrence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hippodrome.ops._op import Op


@Op
def h3_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    modes: Tensor,
    weights: Tensor,
    skip: Tensor | None,
    ring: Tensor,
    position: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, D) in q's dtype, the ring and the state after the token.

    q, k, v (B, D), any strides; taps (T, D), modes and weights (H, N) complex, skip (H,), at least float32, D = H p.
    ring (B, T, D): the last T k's, that of position s in slot s % T. position (B,) int64: the tokens each row has seen.
    state (B, p, p, H, N, 2): (re, im) of z. Ring and state are stored in any real dtype and are consumed: backends write
    them in place where no gradient is wanted. A k counts as the ring stores it; arithmetic is at least float32.
    """
    real = torch.promote_types(torch.promote_types(q.dtype, state.dtype), torch.float32)
    age = ages(position, ring.shape[1])
    ring = torch.where((age == 0)[..., None], k.to(ring.dtype)[:, None], ring)
    filtered = (taps[age] * ring.to(real)).sum(1)
    queries, keys, values = (x.to(real).unflatten(1, (modes.shape[0], -1)).transpose(1, 2) for x in (q, filtered, v))
    driven = keys[:, :, None] * values[:, None]
    z = modes * torch.view_as_complex(state.to(real)) + driven.unsqueeze(-1)
    s = (weights * z).real.sum(-1)
    if skip is not None:
        s = s + skip * driven
    y = (queries[:, :, None] * s).sum(1).transpose(1, 2).flatten(1)
    return y.to(q.dtype), ring, torch.view_as_real(z).to(state.dtype)


def ages(position: Tensor, length: int) -> Tensor:
    """(B, T): how many tokens before the one at `position` (B,) the k of each slot was seen; 0 where the new one goes."""
    return (position[:, None] - torch.arange(length, device=position.device)) % length


# Backends register themselves; the reference must exist first.
from hippodrome.ops.h3_step import cpu as _cpu  # noqa: E402, F401
from hippodrome.ops.h3_step import triton as _triton  # noqa: E402, F401
