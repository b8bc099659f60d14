"""add_norm: what a residual stream does between two maps of a decoding step, x + delta and its norm.

total = x + delta;   layer: (total - mean) / sqrt(var + eps) * weight + bias;   rms: total / sqrt(mean square + eps) * weight
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops._op import Op


@Op
def add_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centred: bool = True
) -> tuple[Tensor, Tensor]:
    """x + delta and its norm over the last axis, both (B, D). centred: LayerNorm; else RMSNorm, which has no bias."""
    total = x + delta
    if centred:
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)
    return total, F.rms_norm(total, weight.shape, weight, eps)


# Backends register themselves; the reference must exist first.
from hippodrome.ops.add_norm import triton as _triton  # noqa: E402, F401
