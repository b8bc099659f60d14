"""linear_attention on the GPU: one Triton program a head and piece of a sequence, forward and backward. See `_kernels.py`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops._op import announced, capability, on_its_device
from hippodrome.ops.linear_attention import EPS, check, linear_attention

HAS_TRITON = importlib.util.find_spec("triton") is not None
CAPABILITY = (9, 0)
"""Least compute capability: what the layout is made for. Its tiles need more shared memory than most others have."""
WIDEST = 128
"""Most features or values of a head: the sums stay in registers."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROGRAMS = 264
"""Programs from which on a GPU is busy: below, sequences are cut into pieces."""
SLICE = 64
"""Most columns of its result that a program makes, for the same reason; the gradient of q needs all."""
SHORTEST = 512
"""Fewest tokens of a piece."""
LAYOUTS = {"bf16": (64, 4, 3), "tf32": (32, 8, 1), "tf32x3": (16, 4, 1)}
"""Products -> tokens of a chunk, and for sums of up to 64 x 64 warps and stages: with these nothing or little leaves the
registers."""


@dataclass(frozen=True)
class Tiling:
    """How the kernels are laid out: chunks of T tokens, F padded features, M padded values; what their products are.

    Half precision is multiplied in bf16 if all is, or in tf32, which rounds as finely as fp16: sums of large features would
    overflow in that. With fp32 among the inputs a product is three of tf32, which is exact to 1e-6.
    """

    T: int
    F: int
    M: int
    products: str

    def pieces(self, rows: int, length: int) -> tuple[int, int]:
        """How many pieces every row is cut into, and how many tokens a piece has."""
        groups = max(1, min(PROGRAMS // rows, length // SHORTEST))
        span = -(-length // (groups * self.T)) * self.T
        return -(-length // span), span

    def arguments(self, inner: int, outer: int) -> dict[str, Any]:
        """What a kernel whose sums are (inner, outer) is compiled for."""
        import triton.language as tl

        _, warps, stages = LAYOUTS[self.products]
        if inner * outer > 64 * 64:
            warps, stages = 8, min(stages, 2)
        kind, precision = (tl.bfloat16, "tf32") if self.products == "bf16" else (tl.float32, self.products)
        return {"T": self.T, "KIND": kind, "PRECISION": precision, "num_warps": warps, "num_stages": stages}


def tiling(q: Tensor, k: Tensor, v: Tensor) -> Tiling:
    """The layout for tensors like these."""
    dtypes = {t.dtype for t in (q, k, v)}
    products = "bf16" if dtypes == {torch.bfloat16} else "tf32x3" if torch.float32 in dtypes else "tf32"
    F, M = (max(16, 1 << (n - 1).bit_length()) for n in (q.shape[3], v.shape[3]))
    return Tiling(16 if q.shape[2] <= 16 else LAYOUTS[products][0], F, M, products)


def refusal(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> str | None:
    """Why these kernels cannot take inputs like these; None: they can."""
    if q.device.type != "cuda":
        return f"the tensor is on {q.device.type}"
    if not HAS_TRITON:
        return "triton is not installed"
    if capability(q.device) < CAPABILITY:
        return f"compute capability {capability(q.device)} is under {CAPABILITY}"
    return unfit(q, k, v, state)


def unfit(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> str | None:
    """What of `refusal` is not the device's."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dtype not in DTYPES:
            return f"{name} is {t.dtype}: it takes {', '.join(map(str, DTYPES))}"
    if state is not None and state.dtype == torch.float64:
        return "the state is torch.float64, and sums are float32"
    for name, n in (("features", q.shape[3]), ("values", v.shape[3])):
        if not 1 <= n <= WIDEST:
            return f"a head has {n} {name}: it takes 1 to {WIDEST}"
    return "there is no token" if v.numel() == 0 else None


def _why_not(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, state: Tensor | None = None, **_: object) -> str | None:
    if not causal:
        return "without causality there is no order to walk in: two plain products"
    return refusal(q, k, v, state)


@linear_attention.backend("triton", why_not=_why_not)
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    state: Tensor | None = None,
    return_state: bool = False,
    eps: float = EPS,
) -> tuple[Tensor, Tensor | None]:
    check(q, k, v, causal)
    before = None if state is None else state.float().expand(*q.shape[:2], q.shape[3], v.shape[3] + 1).contiguous()
    q, k, v = (_lines(t) for t in (q, k, v))
    y, after, _ = torch.ops.hippodrome.linear_attention_fused(q, k, v, before, eps, return_state)
    return y, after if return_state else None


def _lines(t: Tensor) -> Tensor:
    """t with a token's numbers of a head side by side."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


@torch.library.custom_op("hippodrome::linear_attention_fused", mutates_args=(), device_types="cuda")
@announced("linear_attention")
@on_its_device
def _fused(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, eps: float, carry: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs like v, with `carry` the sums after them, and the denominators (B, H, L)."""
    plan = tiling(q, k, v)
    y, after, below = _outputs(q, v, carry)
    _walk("y", plan, q, k, v, q, below, below, _begin(plan, k, v, state), y, after if carry else None, eps)
    return y, after, below


def _outputs(q: Tensor, v: Tensor, carry: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, width = v.shape
    after = v.new_empty(batch if carry else 0, heads, q.shape[3], width + 1, dtype=torch.float32)
    return torch.empty_like(v), after, v.new_empty(batch, heads, length, dtype=torch.float32)


@_fused.register_fake
def _(q: Tensor, k: Any, v: Tensor, state: Any, eps: float, carry: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(q, v, carry)


def _begin(plan: Tiling, k: Tensor, v: Tensor, state: Tensor | None) -> Tensor | None:
    """The sums (rows, groups, F, M + 1) before the pieces of all rows. None: zero."""
    from hippodrome.ops.linear_attention import _kernels as kernels

    batch, heads, length, width = v.shape
    rows, features = batch * heads, k.shape[3]
    groups, span = plan.pieces(rows, length)
    if groups == 1:
        return state
    begin = k.new_empty(rows, groups, features, width + 1, dtype=torch.float32)
    kernels.sums[rows * (groups - 1),](
        k, v, begin, begin, begin, heads, groups - 1, 0, groups, span, length, features, width, 1.0, *_strides(k, v),
        F=plan.F, M=plan.M, ADJOINT=False, **plan.arguments(plan.F, plan.M),
    )  # fmt: skip
    _scan(begin, state, reverse=False)
    return begin


def _end(plan: Tiling, q: Tensor, d_y: Tensor, below: Tensor, slope: Tensor, d_after: Tensor | None) -> Tensor | None:
    """What is asked of the sums after the pieces of all rows, (rows, groups, F, M + 1). None: nothing."""
    from hippodrome.ops.linear_attention import _kernels as kernels

    batch, heads, length, width = d_y.shape
    rows, features = batch * heads, q.shape[3]
    groups, span = plan.pieces(rows, length)
    if groups == 1:
        return d_after
    end = q.new_empty(rows, groups, features, width + 1, dtype=torch.float32)
    kernels.sums[rows * (groups - 1),](
        q, d_y, below, slope, end, heads, groups - 1, 1, groups, span, length, features, width, 1.0, *_strides(q, d_y),
        F=plan.F, M=plan.M, ADJOINT=True, **plan.arguments(plan.F, plan.M),
    )  # fmt: skip
    _scan(end, d_after, reverse=True)
    return end


def _scan(pieces: Tensor, state: Tensor | None, *, reverse: bool) -> None:
    from hippodrome.ops.linear_attention import _kernels as kernels

    rows, groups = pieces.shape[:2]
    size, block = pieces[0, 0].numel(), 256
    kernels.scan_pieces[-(-size // block), rows](
        pieces, _or(state, pieces), groups, size, BLOCK=block, HAS_STATE=state is not None, REVERSE=reverse
    )


@torch.library.custom_op("hippodrome::linear_attention_fused_backward", mutates_args=(), device_types="cuda")
@announced("linear_attention's backward")
@on_its_device
def _fused_backward(
    d_y: Tensor,
    d_after: Tensor | None,
    below: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the sums before, empty if there are none."""
    plan, slope = tiling(q, k, v), torch.empty_like(below)
    d_q, d_k, d_v, d_state = _gradients(q, k, v, state)
    _walk("dq", plan, d_y, v, k, q, below, slope, _begin(plan, k, v, state), d_q, None)
    end = _end(plan, q, d_y, below, slope, d_after)
    _walk("dk", plan, v, d_y, q, q, below, slope, end, d_k, None if state is None else d_state)
    _walk("dv", plan, k, q, d_y, q, below, slope, end, d_v, None)
    return d_q, d_k, d_v, d_state


def _walk(
    role: str, plan: Tiling, a: Tensor, b: Tensor, c: Tensor, asked: Tensor, below: Tensor, slope: Tensor, begin: Tensor | None,
    out: Tensor, end: Tensor | None, eps: float = 0.0,
) -> None:  # fmt: skip
    """One role of the kernel: see `_kernels.walk`."""
    from hippodrome.ops.linear_attention import _kernels as kernels

    batch, heads, length = below.shape
    groups, span = plan.pieces(batch * heads, length)
    of_keys = role in ("y", "dv")
    features, width = (b.shape[3], c.shape[3]) if of_keys else (c.shape[3], b.shape[3])
    N, W = (plan.F, plan.M) if of_keys else (plan.M, plan.F)
    W = W if role == "dq" else min(W, SLICE)
    kernels.walk[batch * heads * groups, -(-c.shape[3] // W)](
        a, b, c, asked, below, slope, _or(begin, below), out, _or(end, below), heads, groups, span, length, features, width,
        eps, 1.0, *_strides(a, b, c, asked, out), N=N, W=W, ROLE=role, HAS_BEGIN=begin is not None, HAS_END=end is not None,
        **plan.arguments(N, W),
    )  # fmt: skip


def _gradients(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_state = v.new_empty(0, dtype=torch.float32) if state is None else torch.empty_like(state)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_state


@_fused_backward.register_fake
def _(
    d_y: Any, d_after: Any, below: Any, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(q, k, v, state)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of each: of a sequence, of a head, of a token."""
    return tuple(size for t in tensors for size in t.stride()[:3])


def _or(t: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is given in place of an absent tensor, which it never reads."""
    return other if t is None else t


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, ctx.carry = inputs
    ctx.save_for_backward(output[2], *tensors)


def _grad(ctx: Any, d_y: Tensor, d_after: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    below, q, k, v, state = ctx.saved_tensors
    asked = d_after.contiguous() if ctx.carry else None
    *grads, d_state = torch.ops.hippodrome.linear_attention_fused_backward(_lines(d_y), asked, below, q, k, v, state)
    return *grads, None if state is None else d_state, None, None


_fused.register_autograd(_grad, setup_context=_save)


def _flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **out: Any) -> int:
    """Two a multiply-add of the matrix products, whole chunks of the triangle; none for what finds where pieces begin."""
    features, width = q.shape[3], v.shape[3]
    return 2 * q[..., 0].numel() * (tiling(q, k, v).T * (features + width) + 2 * features * width)


def _flops_backward(d_y: Any, d_after: Any, below: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **out: Any) -> int:
    """Three roles; that of the queries needs its keys' running sums as well."""
    features, width = q.shape[3], v.shape[3]
    return 2 * q[..., 0].numel() * (tiling(q, k, v).T * (4 * features + 3 * width) + 6 * features * width)


count_flops(
    {
        torch.ops.hippodrome.linear_attention_fused: _flops,
        torch.ops.hippodrome.linear_attention_fused_backward: _flops_backward,
    }
)
