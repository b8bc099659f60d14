"""Regression: squared errors of the numbers asked for, and of no others."""

import pytest
import torch

from hippodrome.embeds.signal import Signal
from hippodrome.part import BadInput
from hippodrome.readouts.regression import Regression
from hippodrome.task import Batch
from tests.support import assert_close


def regression(outputs=2):
    torch.manual_seed(0)
    return Regression.Config(outputs=outputs).build(4, Signal.Config().build(4))


def test_numbers_are_a_linear_map_at_every_position():
    readout, hidden = regression(), torch.randn(3, 5, 4)
    assert_close(readout(hidden), hidden @ readout.linear.weight.T + readout.linear.bias)


def test_what_is_not_asked_may_be_anything():
    readout, hidden = regression(), torch.randn(3, 5, 4)
    targets = torch.randn(3, 5, 2)
    targets[:, :2], targets[1, 4, 0] = torch.nan, torch.nan
    asked = ~targets.isnan()
    hidden[:, :2] = torch.inf
    hidden.requires_grad_()
    total, count = readout.loss(hidden, Batch(torch.zeros(3, 5, 1), targets))
    assert count == 17
    assert_close(total, (readout(hidden) - targets)[asked].square().sum())
    total.backward()
    assert torch.equal(hidden.grad[:, :2], torch.zeros(3, 2, 4))
    assert hidden.grad[:, 2:].any(-1).all()


def test_the_loss_of_half_precision_is_fp32():
    readout, hidden = regression().bfloat16(), torch.randn(3, 500, 4).bfloat16()
    targets = readout(hidden).float() + 0.01
    total, _ = readout.loss(hidden, Batch(torch.zeros(3, 500, 1), targets))
    assert total.dtype == torch.float32
    assert float(total.detach()) == pytest.approx(0.3, rel=1e-3)


def test_no_outputs_are_refused():
    with pytest.raises(BadInput, match="outputs is 0"):
        regression(outputs=0)
