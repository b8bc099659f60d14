import hashlib

import numpy as np
import pytest
import torch

from hippodrome.task import IGNORE
from hippodrome.tasks.recall import Recall
from tests.golden_files import load

SHA256 = {
    ("synth_assoc_V10_L20", "train"): "e061a32cce24d4737e64412911475c6248c909d0ceef8b99290489e2640d36ba",
    ("synth_assoc_V10_L20", "test"): "d5750c0c9464257f2e48353356f32b465b1ce8aa2165cb0a42d0f8ed5da86aa3",
    ("synth_assoc_V20_L40", "train"): "411b6a100c43cfa2efae474fd9c1dc3bda112adfdda7b98d3bb91a518ec57a1f",
    ("synth_assoc_V20_L40", "test"): "7611bd308216eb7234560006b836d4b8284ef129a3d4be2db9606f514b800794",
}
CONFIGS = {"synth_assoc_V10_L20": Recall.Config(), "synth_assoc_V20_L40": Recall.Config(vocab_size=20, length=40)}


@pytest.fixture(scope="module")
def tasks():
    return {case: config.build() for case, config in CONFIGS.items()}


@pytest.mark.parametrize(("case", "split"), SHA256)
def test_equals_the_authors_sequences(tasks, case, split):
    golden = load(case)
    rows = tasks[case].rows(split)
    x = rows[:, :-1].contiguous()
    assert list(x.shape) == golden[f"{split}/shape"].tolist()
    assert torch.equal(x[:16], golden[f"{split}/x"])
    assert hashlib.sha256(x.numpy().astype("<i8").tobytes()).hexdigest() == SHA256[case, split]
    assert torch.equal(rows[:16, -1], golden[f"{split}/y"][:, -1])


@pytest.mark.parametrize("case", CONFIGS)
def test_sequences_are_drawn_in_the_authors_order(tasks, case):
    rng = np.random.default_rng(0)
    drawn = torch.tensor([tasks[case].draw(rng) for _ in range(16)])
    assert torch.equal(drawn, load(case)["raw_draws"])


def test_the_test_split_asks_for_the_last_token_only(tasks):
    task = tasks["synth_assoc_V10_L20"]
    assert torch.equal(task.batch("test", 0, 16).targets, load("synth_assoc_V10_L20")["test/y"])
    assert (task.batch("train", 0, 16).targets != IGNORE).all()


@pytest.mark.parametrize("config", [Recall.Config(test_rows=100), Recall.Config(vocab_size=13, length=9, test_rows=100)])
def test_the_answer_is_the_value_of_the_key_asked_for(config):
    pairs = config.length // 2
    for row in config.build().rows("valid").tolist():
        values = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert row[2 * pairs] == config.vocab_size - 1
        assert row[-1] == values[row[-2]]
        assert max(values) < min(values.values())
