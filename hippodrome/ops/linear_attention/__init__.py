"""linear_attention: attention whose weights are products of features, so that the past is a matrix of fixed size.

    y_t = sum_s (q_t . k_s) v_s / (sum_s q_t . k_s + eps)
        = q_t S_t / (q_t z_t + eps),    S_t = sum_s k_s v_s^T,  z_t = sum_s k_s

over the keys s <= t if causal, else over all; q and k are features already, such as elu(x) + 1. z is S's column for a value
that is always one: the sums (F, M + 1) hold S and, last, z.

Source: Transformers are RNNs (Katharopoulos et al., ICML 2020), sections 3.2 to 3.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops._op import Op
from hippodrome.part import BadInput

EPS = 1e-6
"""The authors' addend to the denominator."""


def with_ones(v: Tensor) -> Tensor:
    """Values (..., M) and behind them a one (..., M + 1), at least float32."""
    return F.pad(v.to(torch.promote_types(v.dtype, torch.float32)), (0, 1), value=1.0)


@Op
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    state: Tensor | None = None,
    return_state: bool = False,
    eps: float = EPS,
) -> tuple[Tensor, Tensor | None]:
    """Outputs (B, H, L, M) in v's dtype, and the sums after all keys (B, H, F, M + 1) if asked for.

    q (B, H, L, F), k (B, H, S, F) features; v (B, H, S, M); any real dtypes; causal: L = S. state: the sums of the keys before
    these, which every query sees; at least float32, as are all sums here whatever the dtype of the inputs.
    """
    check(q, k, v, causal)
    with torch.autocast(q.device.type, enabled=False):
        values = with_ones(v)
        queries, keys = q.to(values.dtype), k.to(values.dtype)
        weights = queries @ keys.mT
        if causal:
            weights = weights.tril()
        sums = weights @ values
        if state is not None:
            sums = sums + queries @ state
        y = (sums[..., :-1] / (sums[..., -1:] + eps)).to(v.dtype)
        if not return_state:
            return y, None
        after = keys.mT @ values
        return y, after if state is None else state + after


def check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Raise `BadInput` unless the shapes fit each other."""
    fits = q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] == k.shape[3] and k.shape[2] == v.shape[2]
    if not fits:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise BadInput(f"q, k and v of shapes {shapes} are not (B, H, L, F), (B, H, S, F) and (B, H, S, M)")
    if causal and q.shape[2] != k.shape[2]:
        raise BadInput(f"{q.shape[2]} queries and {k.shape[2]} keys: causal attention takes as many of each")


# Backends register themselves; the reference must exist first.
from hippodrome.ops.linear_attention import chunked as _chunked  # noqa: E402, F401
from hippodrome.ops.linear_attention import triton as _triton  # noqa: E402, F401
