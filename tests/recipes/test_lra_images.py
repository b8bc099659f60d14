"""Recipes of images: the published sizes, for every mixer by name."""

from typing import get_args

import pytest
import torch

from hippodrome.part import BadInput
from hippodrome.recipes import find_recipe
from hippodrome.recipes._lra import Size
from hippodrome.recipes.lra_images import Segmenting
from hippodrome.task import Batch

MIXERS = ("s4", "s4d", "dss", "dlr", "gss", "s5", "mega", "mega_chunk", "transformer", "linear_transformer")


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["image", "pathfinder"])
def test_a_classifier_of_images_of_every_mixer(name, mixer):
    """State spaces read a signal; attention, which must be told positions, reads tokens."""
    config = find_recipe(f"lra_images.{name}")(mixer=mixer, size=Size(n_layer=1, d_model=16, d_ff=8, n_head=2))
    assert config.task.pixels == ("tokens" if "transformer" in mixer else "signal")
    pixels = torch.randint(256, (2, 1024))
    model = config.model.build()
    loss = model.loss(Batch(pixels.float().unsqueeze(-1) if config.task.pixels == "signal" else pixels, torch.tensor([0, 1])))
    loss.total.backward()
    assert model.causal == (mixer == "gss")
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_published_sizes_of_images():
    image, pathfinder = find_recipe("lra_images.image"), find_recipe("lra_images.pathfinder")
    s4 = image(mixer="s4")
    assert (len(s4.model.blocks), s4.model.d_model, s4.model.blocks[0].dropout) == (6, 512, 0.1)
    assert (s4.model.blocks[0].mixer.system.d_state, s4.model.blocks[0].mixer.system.n_ssm) == (64, 1)
    assert (s4.train.steps, s4.train.batch_size, s4.train.lr) == (180_000, 50, 1e-2)
    for resolution, (batch, lr, dt_min) in {32: (64, 4e-3, 1e-3), 128: (16, 1e-3, 1e-4)}.items():
        config = pathfinder(mixer="s4d", resolution=resolution)
        system = config.model.blocks[0].mixer.system
        assert (config.model.d_model, len(config.model.blocks), system.d_state, system.n_ssm) == (256, 6, 64, None)
        assert (config.train.batch_size, config.train.lr, config.train.steps, system.dt_min) == (batch, lr, 500_000, dt_min)
    assert pathfinder(mixer="mega_chunk", resolution=128).model.blocks[0].mixer.chunk == 4096
    base = pathfinder(mixer="transformer")
    assert (len(base.model.blocks), base.model.d_model, base.model.blocks[0].mixer.n_head) == (4, 32, 4)
    assert (base.model.embed.vocab_size, base.model.embed.positions) == (256, 1024)
    with pytest.raises(BadInput, match="pixels is 'signal': a transformer is told positions with its tokens"):
        pathfinder(mixer="transformer", pixels="signal")


@pytest.mark.parametrize(
    ("resolution", "published"), [(128, (5, 128, 1024, 16)), (256, (6, 128, 1024, 18)), (512, (12, 64, 2048, 14))]
)
def test_published_sizes_of_the_segmentation(resolution, published):
    config = find_recipe("lra_images.pathfinder_segmentation")(resolution=resolution)
    mixer = config.model.blocks[0].mixer
    assert (len(config.model.blocks), config.model.d_model, mixer.system.d_state, config.train.batch_size) == published
    assert (mixer.bidirectional, mixer.glu, config.model.readout.balanced, config.task.size) == (True, True, True, resolution)


@pytest.mark.parametrize("mixer", get_args(Segmenting))
def test_a_segmentation_answers_at_every_pixel(mixer):
    size = Size(n_layer=1, d_model=8, d_state=8)
    config = find_recipe("lra_images.pathfinder_segmentation")(mixer=mixer, size=size)
    attends = mixer == "linear_transformer"
    assert config.task.pixels == ("tokens" if attends else "signal")
    model = config.model.build()
    pixels = torch.randint(256, (2, 256)) if attends else torch.randn(2, 256, 1)
    assert model(pixels).logits.shape == (2, 256, 3)
    assert model.causal == (mixer == "gss")


def test_a_segmentation_knows_every_row_and_takes_mlps():
    recipe = find_recipe("lra_images.pathfinder_segmentation")
    linear, mega = recipe(mixer="linear_transformer", size=Size(n_head=8)).model, recipe(mixer="mega").model
    assert (linear.embed.positions, linear.blocks[0].mixer.n_head, linear.blocks[0].channel.d_ff) == (128**2, 8, 256)
    assert (mega.blocks[0].mixer.chunk, mega.blocks[0].mixer.d_state, mega.blocks[0].channel) == (None, 16, None)
    assert recipe(mixer="s4d", size=Size(d_ff=32)).model.blocks[0].channel.d_ff == 32
