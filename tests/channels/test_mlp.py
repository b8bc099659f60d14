"""Mlp against its equation."""

import math

import pytest
import torch

from hippodrome.channels.mlp import Mlp
from hippodrome.part import BadInput
from tests.support import assert_close, build

VARIANTS = (Mlp.Config(d_ff=5, activation="relu"), Mlp.Config(activation="gelu"))

FORMULAS = {
    "gelu_tanh": lambda h: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))),
    "relu": lambda h: h * (h > 0),
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_equals_its_equation(activation):
    mlp = build(Mlp.Config(activation=activation), 6).double()
    x = 3 * torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inner = FORMULAS[activation](x @ mlp.fc1.weight.T + mlp.fc1.bias)
    assert_close(mlp(x)[0], inner @ mlp.fc2.weight.T + mlp.fc2.bias, 1e-12)


def test_four_times_as_wide_unless_told():
    assert Mlp.Config().build(6).fc1.weight.shape == (24, 6)
    assert Mlp.Config(d_ff=7).build(6).fc1.weight.shape == (7, 6)


def test_no_width_is_refused():
    with pytest.raises(BadInput, match="d_ff is 0: it must be at least 1"):
        Mlp.Config(d_ff=0).build(6)
