import hashlib

import numpy as np
import pytest
import torch

from hippodrome.part import BadInput
from hippodrome.task import IGNORE
from hippodrome.tasks.induction import Induction
from tests.golden_files import load

SHA256 = {
    "train": "c88d4828509a524804cfa203f505693743f1e777a4c57dc1356167658fb71db4",
    "test": "e5c3eaa32d4ec939e52828192d9d070693849d99430cc448ce0b4034a57d54ca",
}


@pytest.fixture(scope="module")
def task():
    return Induction.Config().build()


@pytest.mark.parametrize("split", SHA256)
def test_equals_the_authors_sequences(task, split):
    golden = load("synth_induction_V20_L30")
    rows = task.rows(split)
    x = rows[:, :-1].contiguous()
    assert list(x.shape) == golden[f"{split}/shape"].tolist()
    assert torch.equal(x[:16], golden[f"{split}/x"])
    assert hashlib.sha256(x.numpy().astype("<i8").tobytes()).hexdigest() == SHA256[split]
    assert torch.equal(rows[:16, -1], golden[f"{split}/y"][:, -1])


def test_sequences_are_drawn_in_the_authors_order(task):
    rng = np.random.default_rng(0)
    drawn = torch.tensor([task.draw(rng) for _ in range(16)])
    assert torch.equal(drawn, load("synth_induction_V20_L30")["raw_draws"])


def test_the_test_split_asks_for_the_last_token_only(task):
    golden = load("synth_induction_V20_L30")
    assert torch.equal(task.batch("test", 0, 16).targets, golden["test/y"])
    assert (task.batch("train", 0, 16).targets != IGNORE).all()


def test_the_answer_follows_the_first_trigger(task):
    trigger = task.config.vocab_size - 1
    for row in task.rows("valid"):
        where = (row == trigger).nonzero().flatten().tolist()
        assert len(where) == 2
        assert where[1] == len(row) - 2
        assert row[-1] == row[where[0] + 1]


def test_valid_is_another_draw(task):
    test, valid = ({tuple(row) for row in task.rows(split).tolist()} for split in ("test", "valid"))
    assert len(valid) == 500
    assert not test & valid


def test_a_language_too_small_for_the_rows_says_so():
    task = Induction.Config(vocab_size=4, length=3, train_rows=5, test_rows=1).build()
    with pytest.raises(BadInput, match="5 different sequences are asked for and only 4 found"):
        task.rows("train")


@pytest.mark.parametrize(
    ("name", "value"), [("vocab_size", 3), ("length", 0), ("train_rows", -1), ("test_rows", 0), ("seed", -1)]
)
def test_bad_numbers_are_named(name, value):
    with pytest.raises(BadInput, match=f"{name} is {value}: it must be at least"):
        Induction.Config(**{name: value})
