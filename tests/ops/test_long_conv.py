"""long_conv: against the authors' fused convolution, and where the products for short kernels are chosen."""

import pytest
import torch
import torch.nn.functional as F

from hippodrome.ops._op import use_backend
from hippodrome.ops.long_conv import cpu, long_conv
from hippodrome.part import BadInput
from tests.golden_files import cases, load, relative_error
from tests.support import assert_close


def leaves(golden, *names):
    return {name: golden[f"in/{name}"].clone().requires_grad_() for name in names if f"in/{name}" in golden}


def assert_golden(y, golden, given):
    assert relative_error(y, golden["out/y"]) < 1e-5
    y.backward(golden["in/g"])
    for name, leaf in given.items():
        assert relative_error(leaf.grad, golden[f"grad/{name}"]) < 1e-5, name


@pytest.mark.parametrize("name", cases("fftconv_ref"))
def test_the_authors_convolution(name):
    golden = load(name)
    given = leaves(golden, "u", "k", "k_rev", "D")
    y = long_conv(given["u"], given["k"], kernel_rev=given.get("k_rev"), skip=given["D"])
    if "gelu1" in name or "oddlen" in name:
        y = F.gelu(y)
    if "in/dropout_mask" in golden:
        y = y * golden["in/dropout_mask"].unsqueeze(-1)
    assert_golden(y, golden, given)


@pytest.mark.parametrize("name", cases("fftconv_h3_ref"))
def test_the_authors_gated_convolution(name):
    """One kernel a head for all p x p products of a key and a value; the query sums over keys."""
    golden = load(name)
    given = leaves(golden, "k", "ssm_kernel", "D", "q", "v", "ssm_kernel_rev")
    batch, width, length = golden["in/k"].shape
    heads = golden["in/D"].shape[0]
    k, q, v = (given[name].view(batch, heads, width // heads, length) for name in ("k", "q", "v"))
    # The heads last but one, where the op has its channels; keys i and values j in front of them.
    pair = {"pre_gate": v.permute(0, 2, 1, 3).unsqueeze(1), "post_gate": q.permute(0, 2, 1, 3).unsqueeze(2)}
    u = k.permute(0, 2, 1, 3).unsqueeze(2).expand(-1, -1, width // heads, -1, -1)
    y = long_conv(u, given["ssm_kernel"], kernel_rev=given.get("ssm_kernel_rev"), skip=given["D"], **pair)
    assert_golden(y.sum(1).transpose(1, 2).flatten(1, 2), golden, given)


@pytest.mark.parametrize("taps", [1, 2, 5, 64])
@pytest.mark.parametrize("length", [1, 4, 5, 64, 131])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_it_is_a_sum_over_the_past(backend, length, taps, monkeypatch):
    monkeypatch.setattr(cpu, "WORTH", 0)
    dice = torch.Generator().manual_seed(0)
    u = torch.randn(2, 3, length, generator=dice, dtype=torch.float64)
    kernel = torch.randn(3, taps, generator=dice, dtype=torch.float64)
    expected = torch.zeros_like(u)
    for lag in range(min(taps, length)):
        expected[..., lag:] += kernel[:, lag, None] * u[..., : length - lag]
    with use_backend(backend):
        assert_close(long_conv(u, kernel), expected, 1e-12)


@pytest.mark.parametrize(
    ("batch", "length", "taps", "reason"),
    [(8, 4096, 64, "ok"), (8, 4096, 65, "65 taps"), (8, 100, 64, "800 tokens"), (8, 100, 16, "ok"), (1, 9, 500, "9 tokens")],
)
def test_products_are_chosen_where_they_are_faster(batch, length, taps, reason):
    u, kernel = torch.empty(batch, 2, length), torch.empty(2, taps)
    assert long_conv.explain(u, kernel)["cpu"].startswith(reason)
    assert long_conv.choose(u, kernel) == ("cpu" if reason == "ok" else "reference")


def test_a_two_sided_kernel_is_refused_by_name():
    u, kernel = torch.randn(1, 2, 50), torch.randn(2, 3)
    with use_backend("cpu"), pytest.raises(BadInput, match="two-sided"):
        long_conv(u, kernel, kernel_rev=kernel)
