"""Positions: one answer each, asked for or not, and the loss in which classes weigh alike."""

import pytest
import torch
import torch.nn.functional as F

from hippodrome.embeds.signal import Signal
from hippodrome.part import BadInput
from hippodrome.readouts.positions import Positions
from hippodrome.task import IGNORE, Batch
from tests.support import assert_close

TARGETS = torch.tensor([[1, IGNORE, 0, 0, IGNORE], [0, 0, IGNORE, 0, 1]])


def positions(balanced=False, classes=3):
    torch.manual_seed(0)
    return Positions.Config(classes=classes, balanced=balanced).build(4, Signal.Config().build(4))


def test_every_position_has_its_own_logits():
    readout, hidden = positions(), torch.randn(2, 5, 4)
    logits = readout(hidden)
    assert logits.shape == (2, 5, 3)
    assert_close(logits[1, 3], readout.linear.weight @ hidden[1, 3] + readout.linear.bias)


def test_loss_is_the_cross_entropy_of_the_positions_asked_for():
    readout, hidden = positions(), torch.randn(2, 5, 4)
    hidden[0, 4] = 1e4  # padding may hold anything
    nats, count = readout.loss(hidden, Batch(torch.zeros(2, 5), TARGETS, torch.tensor([4, 5])))
    rows = F.log_softmax(readout(hidden), -1)
    zeros = rows[0, 2, 0] + rows[0, 3, 0] + rows[1, 0, 0] + rows[1, 1, 0] + rows[1, 3, 0]
    assert count == 7
    assert_close(nats, -(zeros + rows[0, 0, 1] + rows[1, 4, 1]))


def test_balanced_classes_weigh_alike_and_an_absent_one_nothing():
    readout, hidden = positions(balanced=True), torch.randn(2, 5, 4)
    nats, count = readout.loss(hidden, Batch(torch.zeros(2, 5), TARGETS))
    logits = readout(hidden)
    weighted = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), weight=torch.tensor([1 / 5, 1 / 2, 0.0]))
    assert count == 7
    assert_close(nats / count, weighted)
    assert not torch.isclose(nats, positions().loss(hidden, Batch(torch.zeros(2, 5), TARGETS))[0])


@pytest.mark.parametrize("balanced", [False, True])
def test_nothing_asked_is_no_loss(balanced):
    nats, count = positions(balanced).loss(torch.randn(2, 5, 4), Batch(torch.zeros(2, 5), torch.full((2, 5), IGNORE)))
    assert nats == 0
    assert count == 0


def test_no_classes_are_refused():
    with pytest.raises(BadInput, match="classes is 0"):
        positions(classes=0)
