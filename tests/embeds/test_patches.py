"""Patches: equal to a strided convolution, to the authors' resize of positions, and to their start."""

import pytest
import torch

from hippodrome.embeds.patches import Patches, resized_positions
from hippodrome.model import Embed
from hippodrome.part import BadInput
from tests.golden_files import load
from tests.support import assert_close, build

CONFIG = Patches.Config(height=12, width=20, channels=3, patch=4, token=True)


def test_is_a_convolution_with_a_stride_of_one_patch():
    embed: Embed = build(CONFIG, 8)
    pictures = torch.randn(2, 12, 20, 3)
    kernel = embed.linear.weight.unflatten(1, (4, 4, 3)).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.conv2d(pictures.permute(0, 3, 1, 2), kernel, embed.linear.bias, stride=4).flatten(2).mT
    wanted = torch.cat([embed.token.expand(2, 1, 8), wanted], 1) + embed.positions
    assert_close(embed(pictures), wanted)
    assert torch.equal(embed(pictures.flatten(1, 2)), embed(pictures))


@pytest.mark.parametrize(
    ("case", "old", "new"), [("4to6_cls1", 4, 6), ("6to4_cls1", 6, 4), ("4to6_cls0", 4, 6), ("3to7_cls1", 3, 7)]
)
def test_positions_are_resized_as_the_authors_do(case, old, new):
    golden = load("vit_posembed_resize")
    found = resized_positions(golden[f"in.pos_{case}"][0], (old, old), (new, new))
    torch.testing.assert_close(found, golden[f"out.pos_{case}"][0], rtol=1e-5, atol=1e-6)


def test_the_same_grid_is_left_alone_and_too_few_positions_are_refused():
    positions = torch.randn(7, 4)
    assert torch.equal(resized_positions(positions, (2, 3), (2, 3)), positions)
    with pytest.raises(BadInput, match="7 positions are fewer than a grid of 3 x 3"):
        resized_positions(positions, (3, 3), (2, 2))


def test_starts_as_the_authors_code_does():
    torch.manual_seed(0)
    embed = Patches.Config(height=32, width=32, channels=3, patch=8, token=True).build(512)
    weight = embed.linear.weight
    assert float(weight.std() * 192**0.5) == pytest.approx(1, abs=0.02)
    assert float(weight.abs().max()) <= 2 / 0.8796 / 192**0.5
    assert not embed.linear.bias.any()
    assert not embed.token.any()
    assert float(embed.positions.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch": 5}, "patch 5 does not divide a picture of 28 x 28: take 4"),
        ({"height": 0}, "height is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_what_cannot_be_built_is_one_clear_line(values, message):
    with pytest.raises(BadInput, match=message):
        Patches.Config(**values)


def test_other_pictures_are_refused():
    with pytest.raises(BadInput, match="the pictures are 32 x 32 x 3, the model takes 12 x 20 x 3"):
        build(CONFIG, 8)(torch.zeros(1, 32, 32, 3))
