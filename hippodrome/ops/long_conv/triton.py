"""long_conv on the GPU by the path that a table of times names: dense Toeplitz products, partitioned convolution, the fused
block FFT, or FFT.

One leaf forward and one backward; the path is chosen inside them, so that a compiled graph holds for every length. The backward
keeps the inputs and makes all else again.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops._flops import count_flops, register_flops
from hippodrome.ops._op import announced, capability, on_its_device
from hippodrome.ops.long_conv import _table, _tiles, long_conv
from hippodrome.ops.long_conv._taps import Taps, Wanted, empty
from hippodrome.part import BadInput, nearest

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not(u: Tensor, kernel: Tensor, **rest: Tensor | None) -> str | None:
    if u.device.type not in DEVICES:
        return f"the tensor is on {u.device.type}"
    if u.is_cuda and capability(u.device) < (8, 0):
        return f"compute capability {capability(u.device)} is under (8, 0)"
    if u.dtype not in DTYPES:
        return f"{u.dtype} has no tensor-core products here: float32, bfloat16 and float16 do"
    if wide := [
        f"{name} is {t.dtype}" for name, t in {"kernel": kernel, **rest}.items() if t is not None and t.dtype not in DTYPES
    ]:
        return f"{wide[0]}: the taps are computed in float32"
    return None


@long_conv.backend("triton", why_not=_why_not)
def _triton(
    u: Tensor,
    kernel: Tensor,
    *,
    kernel_rev: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    if u.ndim == 3 and pre_gate is None and post_gate is None:
        return _conv(u, kernel, kernel_rev, skip, None, None)
    shape = torch.broadcast_shapes(*(t.shape for t in (u, pre_gate, post_gate) if t is not None))
    rows = (math.prod(shape[:-2]), *shape[-2:])
    pre, post = (t if t is None else t.expand(shape).reshape(rows) for t in (pre_gate, post_gate))
    return _conv(u.expand(shape).reshape(rows), kernel, kernel_rev, skip, pre, post).reshape(shape)


def _taps(length: int, kernel: Tensor, kernel_rev: Tensor | None, skip: Tensor | None) -> Taps:
    """The taps that meet an input."""
    return Taps(kernel[:, :length], None if kernel_rev is None else kernel_rev[:, :length], skip)


forced: str | None = None
"""A path that every call is to take, for tests and measurements."""


@contextlib.contextmanager
def use_path(name: str) -> Iterator[None]:
    """Within the block every call, forward or backward, takes the path `name`, or raises BadInput that says why it cannot."""
    global forced
    if name not in _table.PATHS:
        raise BadInput(f"long_conv has no path {name!r}: {nearest(name, _table.PATHS)}")
    before, forced = forced, name
    try:
        yield
    finally:
        forced = before


def path(name: str) -> Any:
    """The module of a path: convolve and backward."""
    register_flops()
    return importlib.import_module(f"hippodrome.ops.long_conv._{name}")


def explain_paths(length: int, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """For each path "ok" or the reason why it cannot take sequences of this length."""
    reasons = {"block_fft": _tiles.why_not(length, dtype, device)}
    return {name: reasons.get(name) or "ok" for name in _table.PATHS}


def _path(which: str, u: Tensor, taps: Taps, *gates: Tensor | None) -> Any:
    batch, channels, length = u.shape
    said = explain_paths(length, u.dtype, u.device)
    if forced is not None and said[forced] != "ok":
        raise BadInput(f"long_conv cannot take the path {forced} asked for: {said[forced]}")
    first, last = taps.lags()
    point = _table.Point(batch, channels, length, max(last, -first) + 1)
    device = torch.cuda.get_device_name(u.device) if u.is_cuda else ""
    gated = any(gate is not None for gate in gates)
    able = tuple(name for name, reason in said.items() if reason == "ok")
    return path(forced or _table.fastest(which, u.dtype, device, point, gated, able))


def tune(
    device: torch.device,
    *,
    lengths: Sequence[int] = (),
    dtypes: Sequence[torch.dtype] = (),
    paths: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Measure the table anew on this GPU and write it beside this file; `progress` is told of each row. Returns its path.

    With lengths, dtypes or paths only those are measured; the other times of this device stay.
    """
    name, say = torch.cuda.get_device_name(device), progress or print
    rows = _table.tune(device, say, lengths=lengths, dtypes=dtypes, paths=paths)
    _table.save(name, rows + _table.without(name, rows) if lengths or dtypes or paths else rows)
    return _table.FILE


@torch.library.custom_op("hippodrome::long_conv", mutates_args=())
@announced("long_conv")
@on_its_device
def _conv(
    u: Tensor, kernel: Tensor, kernel_rev: Tensor | None, skip: Tensor | None, pre: Tensor | None, post: Tensor | None
) -> Tensor:
    if not u.numel():
        return empty(u)
    taps = _taps(u.shape[-1], kernel, kernel_rev, skip)
    return _path("forward", u, taps, pre, post).convolve(u, taps, pre, (post,))[0]


@_conv.register_fake
def _(u: Tensor, *rest: Tensor | None) -> Tensor:
    return empty(u)


@torch.library.custom_op("hippodrome::long_conv_backward", mutates_args=())
@announced("long_conv's backward")
@on_its_device
def _conv_backward(
    dy: Tensor,
    u: Tensor,
    kernel: Tensor,
    kernel_rev: Tensor | None,
    skip: Tensor | None,
    pre: Tensor | None,
    post: Tensor | None,
    want_inputs: bool,
    want_taps: bool,
    want_post: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, kernel, kernel_rev, skip, pre and post; without elements where there is none or it is not wanted."""
    if not u.numel():
        shapes = _fake_backward(dy, u, kernel, kernel_rev, skip, pre, post, want_inputs, want_taps, want_post)
        return _six(t.zero_() for t in shapes)
    taps = _taps(u.shape[-1], kernel, kernel_rev, skip)
    wanted = Wanted(want_inputs, want_taps, want_post)
    grads = _path("backward", u, taps, pre, post).backward(dy, u, taps, pre, post, wanted)
    dkernel = drev = dskip = None
    if grads.lags is not None:
        back = -taps.lags()[0]
        dkernel = _padded(grads.lags[:, back:], kernel)
        if kernel_rev is not None:
            drev = _padded(grads.lags[:, : back + 1].flip(1), kernel_rev)
        if skip is not None:
            dskip = grads.lags[:, back].to(skip.dtype, copy=True)
    du, dpre, dpost = grads[:3]
    return _six(u.new_empty(0) if g is None else g for g in (du, dkernel, drev, dskip, dpre, dpost))


def _six(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d, e, f = tensors
    return a, b, c, d, e, f


def _padded(grad: Tensor, like: Tensor) -> Tensor:
    """grad (H, lags) with zeros for the taps that met nothing."""
    missing = like.shape[1] - grad.shape[1]
    return (F.pad(grad, (0, missing)) if missing else grad.contiguous()).to(like.dtype)


@_conv_backward.register_fake
def _fake_backward(
    dy: Tensor,
    u: Tensor,
    kernel: Tensor,
    kernel_rev: Tensor | None,
    skip: Tensor | None,
    pre: Tensor | None,
    post: Tensor | None,
    want_inputs: bool,
    want_taps: bool,
    want_post: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor | None, wanted: bool, layout: Tensor | None = None) -> Tensor:
        if t is None or not wanted:
            return u.new_empty(0)
        return t.new_empty(t.shape) if layout is None else empty(layout)

    dkernel, drev, dskip = (like(t, want_taps) for t in (kernel, kernel_rev, skip))
    return like(u, want_inputs, dy), dkernel, drev, dskip, like(pre, want_inputs, dy), like(post, want_post, u)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    want = (wanted[0] or wanted[4], wanted[1] or wanted[2] or wanted[3], wanted[5])
    grads = torch.ops.hippodrome.long_conv_backward(dy, *ctx.saved_tensors, *want)
    return tuple(g if w else None for g, w in zip(grads, wanted, strict=True))


_conv.register_autograd(_grad, setup_context=_save)


def _flops(u: Tensor, kernel: Tensor, kernel_rev: Tensor | None) -> int:
    """The fewer operations of the direct sum and of real transforms of the zero-padded rows and of the product between."""
    batch, channels, length = u.shape
    taps = sum(min(length, k.shape[1]) for k in (kernel, kernel_rev) if k is not None)
    n = length + min(length, taps)
    return batch * channels * min(2 * taps * length, int(5 * n * math.log2(n)) + 3 * n)


def _conv_flops(u: Tensor, kernel: Tensor, kernel_rev: Tensor | None, *rest: Any, **out: Any) -> int:
    return _flops(u, kernel, kernel_rev)


def _backward_flops(dy: Any, u: Tensor, kernel: Tensor, kernel_rev: Tensor | None, *rest: Any, **out: Any) -> int:
    return sum(map(bool, rest[-3:])) * _flops(u, kernel, kernel_rev)


count_flops({torch.ops.hippodrome.long_conv: _conv_flops, torch.ops.hippodrome.long_conv_backward: _backward_flops})
