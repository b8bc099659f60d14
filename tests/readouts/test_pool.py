"""Pool: which positions make the answer."""

import pytest
import torch
import torch.nn.functional as F

from hippodrome.embeds.signal import Signal
from hippodrome.part import BadInput
from hippodrome.readouts.pool import Pool
from hippodrome.task import IGNORE, Batch
from tests.support import assert_close

TAKES = {"mean": lambda row: row.mean(0), "first": lambda row: row[0], "last": lambda row: row[-1]}


def pool(how, classes=3):
    torch.manual_seed(0)
    return Pool.Config(classes=classes, how=how).build(4, Signal.Config().build(4))


@pytest.mark.parametrize("how", TAKES)
@pytest.mark.parametrize("lengths", [None, [5, 1, 3], [[0, 5], [4, 5], [1, 3]]], ids=["whole", "lengths", "spans"])
def test_takes_the_real_positions(how, lengths):
    readout, hidden = pool(how), torch.randn(3, 5, 4)
    real = [hidden[row] for row in range(3)]
    if lengths is not None:
        spans = [(0, span) if isinstance(span, int) else span for span in lengths]
        real = [hidden[row, start:stop] for row, (start, stop) in enumerate(spans)]
        for row, (start, stop) in enumerate(spans):
            hidden[row, :start] = hidden[row, stop:] = torch.nan  # padding may hold anything
    logits = readout(hidden, None if lengths is None else torch.tensor(lengths))
    assert logits.shape == (3, 3)
    assert_close(logits, readout.linear(torch.stack([TAKES[how](row) for row in real])))


def test_a_row_without_tokens_has_a_finite_answer():
    for how in TAKES:
        assert torch.isfinite(pool(how)(torch.randn(2, 5, 4), torch.tensor([0, 5]))).all()


def test_a_long_row_in_half_precision_is_neither_cut_nor_rounded():
    """1001 positions are not a number of bf16, and 1001 ones do not add up in it."""
    hidden = torch.ones(1, 1001, 4, dtype=torch.bfloat16)
    mean = pool("mean").to(torch.bfloat16)
    assert torch.equal(mean(hidden), mean.linear(hidden[:, 0]))
    hidden[:, -1] = 5.0
    last = pool("last").to(torch.bfloat16)
    assert torch.equal(last(hidden), last.linear(hidden[:, -1]))


def test_loss_is_the_cross_entropy_of_the_labels():
    readout, hidden = pool("mean"), torch.randn(3, 5, 4)
    batch = Batch(torch.zeros(3, 5), torch.tensor([2, IGNORE, 0]), torch.tensor([5, 2, 3]))
    nats, count = readout.loss(hidden, batch)
    rows = F.log_softmax(readout(hidden, batch.lengths), -1)
    assert count == 2
    assert_close(nats, -(rows[0, 2] + rows[2, 0]))


def test_no_classes_are_refused():
    with pytest.raises(BadInput, match="classes is 0"):
        pool("mean", classes=0)
