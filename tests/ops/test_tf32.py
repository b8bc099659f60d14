"""tf32 products: exact unless asked otherwise, their gradients, and a switch that is put back."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hippodrome.ops import _tf32
from hippodrome.ops._flops import register_flops
from tests.support import assert_close

product = torch.ops.hippodrome.tf32_product


def drawn(device="cpu", tokens=30, width=24, outputs=16):
    dice = torch.Generator().manual_seed(0)
    shapes = (2, tokens, width), (outputs, width)
    return [torch.randn(shape, generator=dice).to(device).requires_grad_() for shape in shapes]


def test_on_a_cpu_and_where_it_is_not_asked_for_it_is_linear():
    x, weight = drawn()
    for rough in (False, True):
        assert torch.equal(_tf32.linear(x, weight, rough=rough), F.linear(x, weight))


def test_the_leaf_has_the_gradients_of_a_product_and_counts_its_work():
    x, weight = drawn()
    a, b = x.flatten(0, -2).detach().requires_grad_(), weight.T.detach().requires_grad_()
    torch.library.opcheck(product.default, (a, b))
    register_flops()
    with FlopCounterMode(display=False) as counter:
        found = torch.autograd.grad(product(a, b).square().sum(), (a, b))
    assert counter.get_total_flops() == 3 * 2 * 60 * 24 * 16
    for ours, theirs in zip(found, torch.autograd.grad((a @ b).square().sum(), (a, b)), strict=True):
        assert_close(ours, theirs, 1e-6)


def test_the_switch_is_put_back_after_a_product_that_fails():
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        product(torch.randn(2, 3), torch.randn(2, 3))
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.gpu
def test_on_a_gpu_factors_are_rounded_forward_and_backward():
    # Of small matrices cuBLAS takes plain cores.
    x, weight = drawn("cuda", 4096, 256, 512)
    exact = [t.double().detach().requires_grad_() for t in (x, weight)]
    wanted = F.linear(*exact)
    dy = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, exact, dy)
    for rough, low, high in ((False, 0, 2e-6), (True, 2e-5, 2e-3)):
        y = _tf32.linear(x, weight, rough=rough)
        for ours, theirs in zip((y, *torch.autograd.grad(y, (x, weight), dy.float())), (wanted, *grads), strict=True):
            assert low <= float((ours - theirs).norm() / theirs.norm()) <= high
