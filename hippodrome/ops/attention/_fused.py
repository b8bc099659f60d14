"""The leaves of the graph that run the kernels, forward and backward, and what torch must know of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops._op import announced, on_its_device
from hippodrome.ops.attention._call import Call, listed, walks
from hippodrome.ops.attention._launch import asides, bias_strides, ends, layout, members, pieces, programs, strides, switches
from hippodrome.ops.attention._work import flops, flops_backward
from hippodrome.patterns import Pattern


def launched(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, slopes: Tensor | None, counters: Tensor | None,
    offsets: Tensor | None, k_offsets: Tensor | None, k_lengths: Tensor | None, numbers: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`counters`: of dropout, the seed and the numbers of the first query and key. `numbers`: scale, softcap and dropout."""
    call, spelling = walks(q, k, pattern, numbers)
    q, k, v = (lines(t) for t in (q, k, v))
    given = q, k, v, bias, slopes, counters, offsets, k_offsets, k_lengths
    return torch.ops.hippodrome.attention_fused(*given, *spelling, *call.numbers())


def lines(t: Tensor) -> Tensor:
    """t with a token's numbers of a head side by side and within 32 bits of its first."""
    near = t.stride(2) * t.shape[2] < 2**31
    return t if near and (t.stride(-1) == 1 or t.shape[-1] == 1) else t.contiguous()


@torch.library.custom_op("hippodrome::attention_fused", mutates_args=(), device_types="cuda")
@announced("attention")
@on_its_device
def fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, slopes: Tensor | None, seed: Tensor | None, offsets: Tensor | None,
    k_offsets: Tensor | None, k_lengths: Tensor | None, pattern: str, sizes: list[int], code: int, a: int, r: int, tile: int,
    scale: float, cap: float, drop: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs like q and log-sum-exps (B, H, Lq)."""
    from hippodrome.ops.attention import _forward as kernels

    call, slots_q, _, lists = listed(q, k, pattern, sizes, Call(code, a, r, tile, scale, cap, drop))
    y, lse = outputs(q)
    batch, heads, n_q, width = q.shape
    D, M, N, ways = layout(0, q, bias is not None, call)
    split, slots, joins = pieces(q, k, M, call, slots_q, lists, offsets)
    part = q.new_empty(batch * heads * slots, M, D, dtype=torch.float32)
    part_lse = q.new_empty(batch * heads * slots, M, dtype=torch.float32)
    plan, grid = programs(0, M, q, n_q, offsets, lists)
    kernels.forward[grid, batch * heads, split](
        q, k, v, *asides(q, bias, slopes, seed), plan, *members(0, lists, plan), *ends(plan, offsets, k_offsets, k_lengths),
        y, lse, part, part_lse, heads, heads // k.shape[1], n_q, k.shape[2], n_q, width, grid, slots, scale, cap, drop, a, r,
        *strides(q, k, v, y), *bias_strides(bias), T=call.side, D=D, M=M, N=N, SPLIT=split > 1,
        EVEN=call.even(k.shape[2], offsets, k_lengths), **switches(call, bias, slopes, offsets, k_lengths, lists), **ways,
    )  # fmt: skip
    if slots:
        kernels.merge[joins.shape[1], batch * heads](
            joins, part, part_lse, y, lse, heads, n_q, width, joins.shape[1], slots, *strides(y), D=D, M=M,
            PER_HEAD=joins.shape[0] > 1,
        )  # fmt: skip
    return y, lse


def outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    # Contiguous whatever q is: the fake must know the layout.
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@fused.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return outputs(q)


@torch.library.custom_op("hippodrome::attention_fused_backward", mutates_args=(), device_types="cuda")
@announced("attention's backward")
@on_its_device
def fused_backward(
    d_y: Tensor, d_lse: Tensor | None, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    slopes: Tensor | None, seed: Tensor | None, offsets: Tensor | None, k_offsets: Tensor | None, k_lengths: Tensor | None,
    pattern: str, sizes: list[int], code: int, a: int, r: int, tile: int, scale: float, cap: float, drop: float, of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and of the bias (B, H, Lq, Lk), empty if none is asked for."""
    from hippodrome.ops.attention import _backward as kernels

    call, slots_q, slots_k, lists = listed(q, k, pattern, sizes, Call(code, a, r, tile, scale, cap, drop))
    batch, heads, n_q, width = q.shape
    group, n_k, rows = heads // k.shape[1], k.shape[2], batch * heads
    d_q, d_k, d_v, d_bias = gradients(q, k, bias, of_bias)
    d_bias.zero_()
    delta = torch.empty_like(lse)
    flags = switches(call, bias, slopes, offsets, k_lengths, lists)
    D, M, N, ways = layout(1, q, bias is not None, call)
    # Where a program meets few tiles, a pass over y and d_y more is felt.
    with_delta = tile > 0 and not slots_q and d_lse is None and y.stride() == d_q.stride()
    if not with_delta:
        kernels.dot_products[-(-n_q // 64), rows](
            y, d_y, q if d_lse is None else d_lse, delta, heads, n_q, width, *strides(y, d_y), D=D, M=64,
            HAS_LSE=d_lse is not None,
        )  # fmt: skip
    part = q.new_empty(rows * slots_q, M, D, dtype=torch.float32)
    plan, grid = programs(1, M, q, n_q, offsets, lists)
    kernels.gradient_q[grid, rows](
        q, k, v, *asides(q, bias, slopes, seed), plan, *members(1, lists, plan), *ends(plan, offsets, k_offsets, k_lengths),
        d_y, y, lse, delta, d_q, d_bias, part, heads, group, n_q, n_k, n_q, n_k, width, grid, slots_q, scale, cap, drop, a, r,
        *strides(q, k, v, d_y, d_q), *bias_strides(bias), T=call.side, D=D, M=M, N=N, D_BIAS=of_bias,
        EVEN=call.even(n_k, offsets, k_lengths), DELTA=with_delta, **flags, **ways,
    )  # fmt: skip
    if slots_q:
        _total(lists[3], part, d_q, heads, n_q, slots_q, M, 0, D, M)
    D, M, N, ways = layout(2, q, bias is not None, call)
    together = group == 1 or not (slots_k or flags["PER_HEAD"])
    many = k.shape[1] if together else heads
    to_k, to_v = (d_k, d_v) if together else (k.new_empty(batch, heads, n_k, width, dtype=torch.float32) for _ in "kv")
    part = q.new_empty(batch * many * slots_k * 2, N, D, dtype=torch.float32)
    plan, grid = programs(2, N, q, n_k, k_offsets, lists)
    kernels.gradient_kv[grid, batch * many](
        q, k, v, *asides(q, bias, slopes, seed), plan, *members(2, lists, plan), *ends(plan, offsets, k_offsets, k_lengths),
        d_y, lse, delta, to_k, to_v, part, heads, group, n_q, n_k, n_q, n_k, width, grid, slots_k, scale, cap, drop, a, r,
        *strides(q, k, v, d_y, to_k), *bias_strides(bias), T=call.side, D=D, M=M, N=N, GROUPED=together,
        EVEN=call.even(n_q, offsets, k_lengths), **flags, **ways,
    )  # fmt: skip
    if slots_k:
        _total(lists[7], part, to_k, many, n_k, slots_k, 2 * N, 0, D, N)
        _total(lists[7], part, to_v, many, n_k, slots_k, 2 * N, N, D, N)
    if not together:
        d_k, d_v = (t.view(batch, -1, group, n_k, width).sum(2).to(k.dtype) for t in (to_k, to_v))
    return d_q, d_k, d_v, d_bias


def _total(
    joins: Tensor, part: Tensor, out: Tensor, heads: int, n: int, slots: int, stride: int, offset: int, D: int, M: int
) -> None:
    from hippodrome.ops.attention import _backward as kernels

    kernels.total[joins.shape[1], out.shape[0] * heads](
        joins, part, out, heads, n, out.shape[3], joins.shape[1], slots, stride, offset, *strides(out), D=D, M=M,
        PER_HEAD=joins.shape[0] > 1,
    )  # fmt: skip


def gradients(q: Tensor, k: Tensor, bias: Tensor | None, of_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*q.shape[:3], k.shape[2]) if of_bias else (0,)
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape), q.new_empty(shape, dtype=torch.float32)


@fused_backward.register_fake
def _(d_y: Any, d_lse: Any, y: Any, lse: Any, q: Tensor, k: Tensor, v: Any, bias: Tensor | None, *rest: Any) -> Any:
    return gradients(q, k, bias, rest[-1])


def differentiate(leaf: Any, backward: Any, tensors: int) -> None:
    """Autograd of a leaf that takes q, k, v, bias, other tensors and numbers. `backward` takes the gradients of y and lse, both
    of them, then the same, and whether the bias wants a gradient.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.numbers = inputs[tensors:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[:tensors])

    def grad(ctx: Any, d_y: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        y, lse, *given = ctx.saved_tensors
        bias = given[3]
        of_bias = bias is not None and ctx.needs_input_grad[3]
        d_y = torch.zeros_like(y) if d_y is None else lines(d_y)
        d_lse = None if d_lse is None else d_lse.contiguous()
        *grads, d_bias = backward(d_y, d_lse, y, lse, *given, *ctx.numbers, of_bias)
        return *grads, d_bias.to(bias.dtype) if of_bias else None, *[None] * (tensors - 4 + len(ctx.numbers))

    leaf.register_autograd(grad, setup_context=save)


differentiate(fused, torch.ops.hippodrome.attention_fused_backward, tensors=9)
count_flops({torch.ops.hippodrome.attention_fused: flops, torch.ops.hippodrome.attention_fused_backward: flops_backward})
