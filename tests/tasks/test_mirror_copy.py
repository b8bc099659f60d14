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
