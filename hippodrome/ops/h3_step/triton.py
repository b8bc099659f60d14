"""h3_step on the GPU: one kernel that reads the ring and reads and writes the modes once, bound by those bytes.

The kernel itself is in `_kernels`, imported when the first CUDA tensor arrives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hippodrome.ops._op import announced
from hippodrome.ops.h3_step import h3_step


def _why_not(q: Tensor, *rest: Tensor) -> str | None:
    ring, _, state = rest[-3:]
    if not state.is_cuda:
        return f"the tensors are on {state.device.type}"
    for name, tensor in (("q", q), ("ring", ring), ("state", state)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} is {tensor.dtype}"
    if not (ring.is_contiguous() and state.is_contiguous()):
        return "ring or state is not contiguous"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, *rest)):
        return "a gradient is wanted, and the step is written in place"
    return None


@h3_step.backend("triton", why_not=_why_not)
def _triton(
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
    y = torch.ops.hippodrome.h3_step_in_place(
        q, k, v, taps, torch.view_as_real(modes), torch.view_as_real(weights), skip, ring, position, state
    )
    return y, ring, state


@torch.library.custom_op("hippodrome::h3_step_in_place", mutates_args=("ring", "state"))
@announced("h3_step")
def _h3_step_in_place(
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
) -> Tensor:
    from hippodrome.ops.h3_step import _kernels

    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    with torch.cuda.device_of(q):
        return _kernels.launch(q, k, v, taps, modes, weights, skip, ring, position, state, processors)


@_h3_step_in_place.register_fake
def _(q: Tensor, *rest: Tensor | None) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
