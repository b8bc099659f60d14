"""A sum and its norm: the op against torch's modules, its kernel against the op."""

import pytest
import torch
from torch import nn

from hippodrome.ops._op import use_backend
from hippodrome.ops.add_norm import add_norm
from tests.support import assert_close, interpreted

CASES = [(3, 64, True, True), (2, 100, True, False), (5, 33, False, False)]
"""Rows, width, centred, with a bias."""


def inputs(batch, width, centred, biased, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    x, delta = torch.randn(2, batch, width, generator=g) + 1
    weight, bias = torch.randn(2, width, generator=g)
    return [None if t is None else t.to(device, dtype) for t in (x, delta, weight, bias if biased else None)]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_modules(case):
    x, delta, weight, bias = inputs(*case)
    centred = case[2]
    norm = nn.LayerNorm(case[1], eps=1e-3, bias=bias is not None) if centred else nn.RMSNorm(case[1], eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(weight)
        if bias is not None:
            norm.bias.copy_(bias)
        total, normed = add_norm(x, delta, weight, bias, 1e-3, centred=centred)
        assert torch.equal(total, x + delta)
        assert_close(normed, norm(x + delta), 1e-6)


def test_says_why_not():
    x, delta, weight, bias = inputs(*CASES[0])
    assert add_norm.explain(x, delta, weight, bias, 1e-5) == {"triton": "the tensors are on cpu", "reference": "ok"}


@interpreted
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_kernel_equals_the_reference_in_the_interpreter(case, dtype, tolerance):
    from hippodrome.ops.add_norm import _kernels

    given = inputs(*case, dtype)
    expected = add_norm.reference(*given, 1e-3, centred=case[2])
    for found, right in zip(_kernels.launch(*given, 1e-3, case[2]), expected, strict=True):
        assert found.dtype == dtype
        assert_close(found.float(), right.float(), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, (64, 2048, True, True), (1, 16384, False, False)])
def test_the_kernel_equals_the_reference_on_the_device(case, dtype):
    given = inputs(*case, dtype, "cuda")
    exact = [None if t is None else t.double() for t in given]
    with torch.no_grad():
        with use_backend("triton"):
            found = add_norm(*given, 1e-3, centred=case[2])
        total, _ = wanted = add_norm.reference(*exact, 1e-3, centred=case[2])
        if dtype != torch.float32:  # the norm is of the rounded sum
            wanted = total, add_norm.reference(found[0].double(), 0 * total, *exact[2:], 1e-3, centred=case[2])[1]
    for got, expected in zip(found, wanted, strict=True):
        assert_close(got.double(), expected, {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype])
