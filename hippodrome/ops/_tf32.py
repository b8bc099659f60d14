"""Products of fp32 matrices on the tensor cores of a GPU, for what was rounded to half precision before or will be after.

tf32 keeps ten bits of a factor's fraction, as float16 does and three more than bfloat16, and sums are fp32. The switch is
torch's own and global, so it is turned for the product alone, in the backward too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops._flops import count_flops


def linear(x: Tensor, weight: Tensor, *, rough: bool) -> Tensor:
    """x (..., I) times weight (O, I), (..., O), both fp32. rough: factors may be rounded to tf32, where that is faster."""
    if not (rough and x.is_cuda and x.dtype == weight.dtype == torch.float32):
        return F.linear(x, weight)
    return torch.ops.hippodrome.tf32_product(x.flatten(0, -2), weight.T).unflatten(0, x.shape[:-1])


@torch.library.custom_op("hippodrome::tf32_product", mutates_args=())
def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, K) times b (K, M)."""
    with _allowed():
        return a @ b


@_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@contextmanager
def _allowed() -> Iterator[None]:
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    product = torch.ops.hippodrome.tf32_product
    wanted = ctx.needs_input_grad
    return product(d, b.T) if wanted[0] else None, product(a.T, d) if wanted[1] else None


_product.register_autograd(_grad, setup_context=_save)
count_flops({torch.ops.hippodrome.tf32_product: lambda a, b, **_: 2 * a.shape[0] * a.shape[1] * b.shape[1]})
