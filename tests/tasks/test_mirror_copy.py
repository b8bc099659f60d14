"""Mirror copy: what its rows are."""

import pytest

from hippodrome.part import BadInput
from hippodrome.task import IGNORE
from hippodrome.tasks.mirror_copy import MirrorCopy


def test_a_row_is_its_half_backwards_and_the_end():
    batch = MirrorCopy.Config(length=12, vocab_size=9).build().batch("train", 3, 5)
    row = batch.inputs.new_empty(5, 13)
    row[:, :-1], row[:, -1] = batch.inputs, batch.targets[:, -1]
    assert (row[:, :6] == row[:, 6:12].flip(1)).all()
    assert (row[:, 12] == 8).all()
    assert row[:, :12].max() < 8
    assert (batch.targets[:, :5] == IGNORE).all()
    assert (batch.targets[:, 5:] == row[:, 6:]).all()


def test_floors_are_what_such_answers_score():
    floors = MirrorCopy.Config(length=4, vocab_size=5).build().floors()
    assert floors == pytest.approx({"guess": (2 / 4 + 1) / 3, "repeat one, guess": (1 + 1 / 4 + 1) / 3})


def test_an_odd_length_is_refused():
    with pytest.raises(BadInput, match="even, take 8"):
        MirrorCopy.Config(length=7)


def test_rows_that_grow_are_short_ones_with_their_middle_in_place():
    task = MirrorCopy.Config(length=64, vocab_size=9, grow=100).build()
    inputs, targets = task.batch("train", 0, 1).inputs[0], task.batch("train", 0, 1).targets[0]
    assert (inputs[:16] == 8).all()
    assert (inputs[48:] == 8).all()
    assert inputs[16:48].max() < 8
    assert (inputs[16:32] == inputs[32:48].flip(0)).all()
    # Asked are the 16 mirrored symbols and one end.
    assert (targets != IGNORE).nonzero()[:, 0].tolist() == list(range(31, 48))
    assert targets[31:48].tolist() == inputs[32:49].tolist()
    asked = (task.batch("train", 0, 120).targets != IGNORE).sum(1)
    assert (asked.diff() >= 0).all()
    assert asked[50] == 1 + round(16 * 2**0.5)
    assert (asked[100:] == 33).all()


def test_rows_grow_in_training_alone_and_are_then_what_they_are_without():
    grown, plain = (MirrorCopy.Config(length=64, grow=rows).build() for rows in (8, 0))
    for split, index in ("train", 2), ("valid", 0), ("test", 0):
        ours, theirs = grown.batch(split, index, 4), plain.batch(split, index, 4)
        assert (ours.inputs == theirs.inputs).all()
        assert (ours.targets == theirs.targets).all()
    # A batch may begin with rows that grow and end with others.
    assert (grown.batch("train", 1, 6).inputs[2:] == plain.batch("train", 1, 6).inputs[2:]).all()
