"""What every embedding in hippodrome/embeds and every readout in hippodrome/readouts keeps to.

Neither can be built without being told a size, so each is listed here with one; a new part that is not fails a test.
"""

import pytest
import torch

from hippodrome.embeds.patches import Patches
from hippodrome.embeds.signal import Signal
from hippodrome.embeds.tokens import Tokens
from hippodrome.model import Embed, Readout
from hippodrome.part import BadInput, find, names, part_name
from hippodrome.readouts.lm import Lm
from hippodrome.readouts.pair import Pair
from hippodrome.readouts.pool import Pool
from hippodrome.readouts.positions import Positions
from hippodrome.readouts.regression import Regression
from hippodrome.task import IGNORE, Batch
from tests.support import assert_builds_on_meta, assert_close, assert_gradients, assert_survives_json, build

D, BATCH, LENGTH, VOCAB, CHANNELS, CLASSES = 8, 4, 5, 11, 2, 4

# Four patches and the class token, or five patches: LENGTH vectors.
SQUARE = Patches.Config(height=4, width=4, channels=CHANNELS, patch=2, token=True)
ROW = Patches.Config(height=1, width=5, channels=CHANNELS, patch=1)
EMBEDS = (
    *(
        Tokens.Config(vocab_size=VOCAB),
        Tokens.Config(vocab_size=VOCAB, positions=9),
        Tokens.Config(vocab_size=VOCAB, axes=(3, 3)),
        Signal.Config(channels=CHANNELS),
    ),
    *(SQUARE, ROW),
)
READOUTS = (
    *(Lm.Config(), Lm.Config(tied=False)),
    *(Pool.Config(classes=CLASSES, how=how) for how in ("mean", "last", "first")),
    Pool.Config(classes=CLASSES, how="first", d_hidden=6, init="zeros"),
    *(Pair.Config(classes=CLASSES, how=how) for how in ("mean", "last")),
    # The targets here are all of one class, so that balancing changes nothing.
    *(Positions.Config(classes=CLASSES, balanced=balanced) for balanced in (False, True)),
    *(Regression.Config(), Regression.Config(outputs=3)),
)

embeds = pytest.mark.parametrize("config", EMBEDS, ids=lambda config: part_name(config.part))
readouts = pytest.mark.parametrize("config", READOUTS, ids=lambda config: part_name(config.part))


def inputs(embed):
    dice = torch.Generator().manual_seed(0)
    if isinstance(embed, Signal):
        return torch.randn(BATCH, LENGTH, CHANNELS, generator=dice)
    if isinstance(embed, Patches):
        return torch.randn(BATCH, embed.config.height * embed.config.width, CHANNELS, generator=dice)
    return torch.randint(VOCAB, (BATCH, LENGTH), generator=dice)


def readout_of(config):
    return build(config, D, build(EMBEDS[0], D))


def batch_for(readout, lengths=None):
    logits = readout(torch.zeros(BATCH, LENGTH, D))
    if isinstance(readout, Regression):
        targets = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        targets[0, 1:3] = torch.nan
    else:
        targets = torch.ones(logits.shape[:-1], dtype=torch.int64)
    return Batch(torch.zeros(BATCH, LENGTH), targets, lengths)


def loss_of(logits, batch):
    """The loss by torch, of the targets asked for."""
    asked = batch.asked
    if batch.targets.is_floating_point():
        return torch.nn.functional.mse_loss(logits[asked], batch.targets[asked], reduction="sum")
    return torch.nn.functional.cross_entropy(logits[asked], batch.targets[asked], reduction="sum")


@pytest.mark.parametrize(("slot", "configs"), [(Embed, EMBEDS), (Readout, READOUTS)])
def test_every_part_of_the_folder_is_here(slot, configs):
    assert {find(slot, name) for name in names(slot.folder)} == {config.part for config in configs}


@embeds
def test_embed_shape_and_gradients(config):
    embed = build(config, D)
    x = embed(inputs(embed))
    assert x.shape == (BATCH, LENGTH, D)
    x.square().sum().backward()
    assert_gradients(embed)


@embeds
def test_embedding_is_the_same_in_chunks(config):
    embed = build(config, D).eval()
    whole = embed(inputs(embed))
    given = inputs(embed)
    seen = torch.zeros(BATCH, dtype=torch.int64)
    if not embed.streams:
        with pytest.raises(BadInput, match="no state"):
            embed(given, seen)
        return
    parts = [embed(given[:, :2], seen), embed(given[:, 2:3], seen + 2), embed(given[:, 3:], seen + 3)]
    assert_close(torch.cat(parts, 1), whole)


@embeds
def test_embed_in_half_precision(config):
    embed = build(config, D).eval()
    expected = embed(inputs(embed))
    x = embed.to(torch.bfloat16)(inputs(embed))
    assert x.dtype == torch.bfloat16
    assert_close(x.float(), expected, 3e-2)


@embeds
def test_embed_compiles_into_one_graph(config):
    embed = build(config, D).eval()
    torch.compiler.reset()
    seen = torch.zeros(BATCH, dtype=torch.int64) if embed.streams else None
    assert_close(torch.compile(embed, fullgraph=True, backend="eager")(inputs(embed), seen), embed(inputs(embed), seen))


@embeds
def test_embed_config_and_meta(config):
    assert_survives_json(Embed, config)
    assert_builds_on_meta(config, D)


@readouts
def test_loss_is_that_of_what_forward_says(config):
    """The cross entropy, or the squared errors of a regression."""
    readout, hidden = readout_of(config), torch.randn(BATCH, LENGTH, D)
    batch = batch_for(readout, torch.tensor([5, 2, 4, 1]))
    total, count = readout.loss(hidden, batch)
    assert_close(total, loss_of(readout(hidden, batch.lengths), batch))
    assert count == batch.asked.sum() > 0


@readouts
def test_nothing_asked_is_no_loss_and_no_gradient(config):
    readout, hidden = readout_of(config), torch.randn(BATCH, LENGTH, D, requires_grad=True)
    batch = batch_for(readout)
    unasked = torch.nan if batch.targets.is_floating_point() else IGNORE
    total, count = readout.loss(hidden, Batch(batch.inputs, torch.full_like(batch.targets, unasked)))
    total.backward()
    assert count == 0
    assert total == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@readouts
def test_readout_gradients(config):
    readout, hidden = readout_of(config), torch.randn(BATCH, LENGTH, D, requires_grad=True)
    readout.loss(hidden, batch_for(readout))[0].backward()
    assert_gradients(readout)
    assert torch.isfinite(hidden.grad).all()
    assert hidden.grad.any()


@readouts
def test_readout_in_half_precision(config):
    readout, hidden = readout_of(config), torch.randn(BATCH, LENGTH, D)
    batch = batch_for(readout)
    expected = readout.loss(hidden, batch)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nats, _ = readout.loss(hidden, batch)
    assert nats.dtype == torch.float32
    assert_close(nats, expected, 3e-2)


@readouts
def test_readout_config_and_meta(config):
    assert_survives_json(Readout, config)
    assert_builds_on_meta(config, D, build(EMBEDS[0], D))
