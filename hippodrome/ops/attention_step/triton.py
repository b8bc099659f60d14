"""attention_step on the GPU: reads of keys and values what each row has filled and nothing more, and never waits for it.

The kernels are in `_kernels`, imported when the first CUDA tensor arrives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hippodrome.ops._op import announced
from hippodrome.ops.attention_step import attention_step

MOST_WIDTH = 256
"""Widest head whose tiles stay in registers."""


def _why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    frequency: Tensor | None = None,
    *,
    scale: float | None = None,
) -> str | None:
    if not q.is_cuda:
        return f"the tensors are on {q.device.type}"
    for name, tensor in (("q", q), ("keys", keys), ("values", values)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} is {tensor.dtype}"
    if keys.dtype != values.dtype:
        return f"keys and values differ in dtype: {keys.dtype}, {values.dtype}"
    if not (keys.is_contiguous() and values.is_contiguous()):
        return "keys or values are not contiguous"
    if q.shape[2] > MOST_WIDTH:
        return f"heads are {q.shape[2]} wide, and at most {MOST_WIDTH} fit"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, keys, values)):
        return "a gradient is wanted, and the step is written in place"
    return None


@attention_step.backend("triton", why_not=_why_not)
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    frequency: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[2] ** -0.5 if scale is None else scale
    y = torch.ops.hippodrome.attention_step_in_place(q, k, v, keys, values, position, frequency, scale)
    return y, keys, values


@torch.library.custom_op("hippodrome::attention_step_in_place", mutates_args=("keys", "values"))
@announced("attention_step")
def _attention_step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    frequency: Tensor | None,
    scale: float,
) -> Tensor:
    from hippodrome.ops.attention_step import _kernels

    programs = 4 * torch.cuda.get_device_properties(q.device).multi_processor_count
    with torch.cuda.device_of(q):
        return _kernels.launch(q, k, v, keys, values, position, frequency, scale, programs)


@_attention_step_in_place.register_fake
def _(q: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
