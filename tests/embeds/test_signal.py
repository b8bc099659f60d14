"""Signal: a linear map of the channels."""

import pytest
import torch

from hippodrome.embeds.signal import Signal
from hippodrome.part import BadInput
from tests.support import assert_close


def test_is_a_linear_map_of_each_sample():
    torch.manual_seed(0)
    embed = Signal.Config(channels=2).build(4)
    x = torch.randn(3, 5, 2)
    assert_close(embed(x), x @ embed.linear.weight.T + embed.linear.bias)
    assert torch.equal(embed(x, torch.tensor([7, 0, 2])), embed(x))


def test_takes_the_dtype_of_the_model():
    embed = Signal.Config().build(4).to(torch.bfloat16)
    assert embed(torch.randn(1, 3, 1)).dtype == torch.bfloat16


def test_other_channels_are_refused():
    with pytest.raises(BadInput, match="the signal has 3 channels, the model takes 2"):
        Signal.Config(channels=2).build(4)(torch.zeros(1, 5, 3))
    with pytest.raises(BadInput, match="channels is 0"):
        Signal.Config(channels=0).build(4)
