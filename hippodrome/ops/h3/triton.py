"""h3 on the GPU. Heads of one channel are one kernel: `diagonal_ssm` with the FIR in front, v before it and q behind it.

Heads of p channels: the FIR once, then for each of the p channels of v one call with all p channels of k as rows, whose
outputs are summed. The outer product exists in registers only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippodrome.ops.diagonal_ssm.triton import fused, refusal
from hippodrome.ops.h3 import h3
from hippodrome.ops.long_conv import long_conv


def _why_not(q: Tensor, k: Tensor, v: Tensor, taps: Tensor | None, log_modes: Tensor, *_: object, **__: object) -> str | None:
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
    return refusal(k, log_modes)


@h3.backend("triton", why_not=_why_not)
def _triton(
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
    heads = log_modes.shape[0]
    kept: dict[str, Any] = {"skip": skip, "return_state": return_state}
    wide = k.shape[1] // heads
    if taps is not None and (wide > 1 or (past is not None and past.requires_grad)):
        signal = k if past is None else torch.cat([past.to(k.dtype), k], -1)
        k, taps, past = long_conv(signal, taps)[..., signal.shape[-1] - k.shape[-1] :], None, None
    if wide == 1:
        before = None if state is None else state[:, 0, 0]
        y, after = fused(k, log_modes, weights, taps=taps, pre=v, post=q, past=past, state=before, **kept)
        return y, None if after is None else after[:, None, None]
    return _heads(q, k, v, log_modes, weights, state, kept)


def _heads(
    q: Tensor, k: Tensor, v: Tensor, log_modes: Tensor, weights: Tensor, state: Tensor | None, kept: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    heads, batch, length = log_modes.shape[0], k.shape[0], k.shape[2]

    def rows(signal: Tensor) -> Tensor:
        """(B, h p + i, L) as (i B, h, L): a view where the channels come first."""
        return signal.unflatten(1, (heads, -1)).permute(2, 0, 1, 3).reshape(-1, heads, length)

    q_rows, k_rows = rows(q), rows(k)
    outputs, states = [], []
    for j, gate in enumerate(v.unflatten(1, (heads, -1)).unbind(2)):
        before = None if state is None else state[:, :, j].transpose(0, 1).reshape(-1, *state.shape[3:])
        y, after = fused(k_rows, log_modes, weights, pre=gate, post=q_rows, state=before, **kept)
        outputs.append(y.unflatten(0, (-1, batch)).float().sum(0).to(q.dtype))
        if after is not None:
            states.append(after.unflatten(0, (-1, batch)).transpose(0, 1))
    return torch.stack(outputs, 2).flatten(1, 2), torch.stack(states, 2) if states else None
