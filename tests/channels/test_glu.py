"""Glu against its equation."""

import pytest
import torch

from hippodrome.channels.glu import Glu
from hippodrome.part import BadInput
from tests.support import assert_close, build

VARIANTS = (Glu.Config(d_ff=5, activation="gelu"),)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_equals_its_equation(activation):
    glu = build(Glu.Config(activation=activation), 6).double()
    x = 3 * torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w1, w2 = glu.fc1.weight.chunk(2)
    gate = x @ w1.T
    gate = gate * torch.sigmoid(gate) if activation == "silu" else 0.5 * gate * (1 + torch.erf(gate / 2**0.5))
    assert_close(glu(x)[0], (gate * (x @ w2.T)) @ glu.fc2.weight.T, 1e-12)


@pytest.mark.parametrize(("d_model", "d_ff"), [(3, 8), (6, 16), (48, 128), (768, 2048), (1024, 2736)])
def test_the_default_width_is_eight_thirds_rounded_up_to_eights(d_model, d_ff):
    assert Glu.Config().width(d_model) == d_ff


def test_no_width_is_refused():
    with pytest.raises(BadInput, match="d_ff is -1"):
        Glu.Config(d_ff=-1).build(6)
