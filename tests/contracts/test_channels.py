"""What every channel mixer in hippodrome/channels keeps to."""

import pytest
import torch

from hippodrome.model import ChannelMixer
from tests.support import (
    assert_builds_on_meta,
    assert_close,
    assert_gradients,
    assert_rules_name_parameters,
    assert_survives_json,
    build,
    every,
)

D = 16


def vectors(*axes, seed=1):
    return torch.randn(*axes, D, generator=torch.Generator().manual_seed(seed))


@every(ChannelMixer)
@pytest.mark.parametrize("length", [1, 7])
def test_shape(config, length):
    y, aux = build(config, D)(vectors(3, length))
    assert y.shape == (3, length, D)
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(value).all() and value.dim() == 0 for value in aux.values())


@every(ChannelMixer)
def test_position_by_position(config):
    """Each token alone gives what it gives in the sequence, whatever stands around it; so (B, D) is a step."""
    channel, x = build(config, D).eval(), vectors(2, 7)
    whole = channel(x)[0]
    for t in range(7):
        assert_close(channel(x[:, t : t + 1])[0][:, 0], whole[:, t])
        assert_close(channel(x[:, t])[0], whole[:, t])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert_close(channel(x[:, order])[0], whole[:, order])


@every(ChannelMixer)
def test_a_token_changes_its_own_position_and_no_other(config):
    channel, x = build(config, D).eval(), vectors(2, 7)
    other = x.clone()
    other[:, 3] = vectors(2, seed=2)
    moved = (channel(other)[0] - channel(x)[0]).abs().amax((0, 2))
    assert moved[3] > 1e-3
    assert moved[[0, 1, 2, 4, 5, 6]].max() <= 1e-6


@every(ChannelMixer)
def test_every_parameter_has_a_finite_gradient(config):
    channel, x = build(config, D), vectors(3, 7).requires_grad_()
    y, aux = channel(x)
    ((y * vectors(3, 7, seed=2)).sum() + sum(aux.values())).backward()
    assert_gradients(channel)
    assert torch.isfinite(x.grad).all()


@every(ChannelMixer)
def test_half_precision_stays_near_fp32(config):
    channel, x = build(config, D).eval(), vectors(3, 7)
    expected = channel(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(channel(x)[0].float(), expected, 5e-2)
    y = channel.to(torch.bfloat16)(x.bfloat16())[0]
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), expected, 5e-2)


@every(ChannelMixer)
def test_compiles_into_one_graph(config):
    channel, x = build(config, D).eval(), vectors(3, 7)
    torch.compiler.reset()
    assert_close(torch.compile(channel, fullgraph=True, backend="aot_eager")(x)[0], channel(x)[0])


@every(ChannelMixer)
def test_config_survives_json(config):
    assert_survives_json(ChannelMixer, config)


@every(ChannelMixer)
def test_builds_on_meta(config):
    assert_builds_on_meta(config, D)


@every(ChannelMixer)
def test_optimiser_rules_and_residual_maps_exist(config):
    channel = config.build(D)
    assert_rules_name_parameters(channel)
    for name in channel.residual_out:
        assert isinstance(channel.get_submodule(name), torch.nn.Linear)
