"""Perceiver AR's recipes: positions of several axes, and which rows of the mirror copy end early in training."""

import pytest
import torch

from hippodrome.part import BadInput
from hippodrome.recipes._lm import Text
from hippodrome.recipes.perceiver_ar import mirror_copy, perceiver_ar
from hippodrome.run import TrainConfig
from hippodrome.task import Batch

PICTURES = Text(tokenizer="bytes", length=24)


def test_axes_take_the_place_of_rotary_positions():
    config = perceiver_ar(n_layer=1, d_model=16, n_head=2, latents=8, axes=(2, 4, 3), text=PICTURES).model
    assert config.embed.axes == (2, 4, 3)
    assert (config.rotary, config.blocks[0].mixer.position) == (0.0, None)
    # In training a row may end before it has met every coordinate.
    model = config.build().eval()
    x = torch.randint(256, (3, 25), generator=torch.Generator().manual_seed(0))
    # The first readout is zero, and lets no gradient through.
    torch.nn.init.normal_(model.readout.linear.weight)
    model.loss(Batch(x[:, :-1], x[:, 1:])).total.backward()
    assert all(table.weight.grad.abs().sum(1).ne(0).all() for table in model.embed.axes)


def test_axes_with_fewer_places_than_a_row_are_refused():
    with pytest.raises(BadInput, match=r"axes are \(2, 4\), of 8 places, and a row has 24 tokens: take --length 8"):
        perceiver_ar(axes=(2, 4), text=PICTURES)


@pytest.mark.parametrize(
    ("length", "latents", "expected"),
    [(32, None, (17, None)), (32, 16, (16, 16)), (4096, None, (2049, None)), (131_072, None, (2049, 65_536))],
)
def test_rows_of_the_mirror_copy_end_early_only_where_latents_are_fewer_than_what_is_asked(length, latents, expected):
    config = mirror_copy(length=length, latents=latents).model
    assert (config.latents, config.crop) == expected
    assert config.embed.sines == length


def test_rows_of_the_mirror_copy_grow_for_a_share_of_training():
    train = TrainConfig(steps=30, batch_size=4)
    assert mirror_copy(grow=0.5, train=train).task.grow == 60
    with pytest.raises(BadInput, match=r"grow is 1\.5: it is a share of training, from 0 to 1"):
        mirror_copy(grow=1.5)
