"""Mlp against its equation."""

import math

import pytest
import torch

from hippodrome.channels.mlp import Mlp
from hippodrome.part import BadInput
from tests.support import assert_close, build

VARIANTS = (Mlp.Config(d_ff=5, activation="relu"), Mlp.Config(activation="gelu"), Mlp.Config(d_ff=7, activation="silu"))

FORMULAS = {
    "gelu_tanh": lambda h: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))),
    "silu": lambda h: h / (1 + torch.exp(-h)),
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


def test_inner_channels_are_dropped_in_training_alone():
    mlp, seen = build(Mlp.Config(d_ff=400, dropout=0.25), 6), []
    mlp.fc2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    mlp.train()(x)
    mlp.eval()(x)
    dropped, whole = seen
    assert 0.2 < dropped.eq(0).float().mean() < 0.3
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0, whole / 0.75))


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
def test_an_impossible_dropout_is_refused(dropout):
    with pytest.raises(BadInput, match=f"dropout is {dropout}: it must be at least 0 and at most 1"):
        Mlp.Config(dropout=dropout).build(6)


def test_no_width_is_refused():
    with pytest.raises(BadInput, match="d_ff is 0: it must be at least 1"):
        Mlp.Config(d_ff=0).build(6)
