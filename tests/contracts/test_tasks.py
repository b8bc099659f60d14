"""What every task promises, over the files of hippodrome/tasks. A new file is tested by lying there."""

import dataclasses
import json
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hippodrome.part import find, from_dict, names, to_dict
from hippodrome.task import IGNORE, Batch, Task
from tests.tasks.cifar import write_cifar

TASKS = names("tasks")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Values that make any task small, for those of them that its config has."""
    folder = tmp_path_factory.mktemp("text")
    path = folder / "text.txt"
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=3000)
    path.write_text("|".join("".join(letters[start : start + 50]) for start in range(0, 3000, 50)))
    values = {"text": str(path), "separator": "|", "tokenizer": "bytes", "length": 12, "train_rows": 70, "test_rows": 23}
    values |= {"min_length": 9, "max_length": 40}
    words = ["".join(letters[start : start + 20]) for start in range(0, 2400, 20)]
    for name, columns in {"documents": 1, "pairs": 2}.items():
        lines = ["\t".join([str(n % 2), *words[n : n + columns]]) for n in range(len(words) - 1)]
        (folder / f"{name}.tsv").write_text("\n".join(lines))
        values[name] = str(folder / f"{name}.tsv")
    values |= {"cifar": str(write_cifar(folder / "cifar"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIPPODROME_CACHE", str(folder / "cache"))
        yield values


@pytest.fixture(params=TASKS)
def config(request, small):
    kind = find(Task, request.param).Config
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in small.items() if name in known})


@pytest.fixture
def task(config) -> Task:
    return config.build()


def same(one: Batch, other: Batch) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)
    )


def half(batch: Batch, rows: slice) -> Batch:
    lengths = None if batch.lengths is None else batch.lengths[rows]
    return Batch(batch.inputs[rows], batch.targets[rows], lengths)


def width(task: Task) -> int:
    """Logits a model of this task would have: every target fits."""
    return 1 + max(int(task.batch(split, 0, 16).targets.max()) for split in ("train", "valid", "test")) + 3


def perfect(batch: Batch, classes: int) -> Tensor:
    return 50.0 * F.one_hot(batch.targets.where(batch.targets != IGNORE, 0), classes).float()


def totals(task: Task, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
    return {name: (float(total), float(count)) for name, (total, count) in task.score(logits, batch).items()}


def test_a_part_lies_in_the_folder():
    assert {"induction", "lm", "recall"} <= set(TASKS)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_same_index_is_the_same_batch(config, split):
    task, again = config.build(), config.build()
    later = task.batch(split, 1, 3)
    assert same(task.batch(split, 0, 3), again.batch(split, 0, 3))
    assert same(later, again.batch(split, 1, 3)), "a batch depends on the batches before it"
    assert not same(later, task.batch(split, 0, 3))


def test_a_batch_has_the_shapes_it_promises(task):
    for split in ("train", "valid", "test"):
        batch = task.batch(split, 0, 4)
        assert batch.targets.dtype == torch.int64
        assert len(batch.inputs) == len(batch.targets) == 4
        assert batch.inputs.dtype == torch.int64 or batch.inputs.is_floating_point()
        assert ((batch.targets >= 0) | (batch.targets == IGNORE)).all()
        assert (batch.targets != IGNORE).reshape(4, -1).any(1).all(), "a row that asks nothing"


def test_training_goes_through_all_rows_in_an_order_of_the_epoch(task):
    rows = task.size("train")
    if rows is None:
        pytest.skip("this training split never ends")
    orders = []
    for epoch in range(2):
        seen = [task.batch("train", epoch * rows + n, 1).inputs.flatten().tolist() for n in range(rows)]
        assert len({tuple(row) for row in seen}) == rows
        orders.append(seen)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_scored_split_ends_where_its_size_says(task, split):
    rows = task.size(split)
    whole = task.batch(split, 0, rows + 5)
    assert len(whole.inputs) == rows
    one_by_one = torch.cat([task.batch(split, n, 1).targets for n in range(rows)])
    assert torch.equal(one_by_one, whole.targets)
    with pytest.raises(IndexError):
        task.batch(split, rows, 1)


def test_scores_sum_over_shards(task):
    batch = task.batch("test", 0, 7)
    torch.manual_seed(0)
    logits = torch.randn(*batch.targets.shape, width(task))
    whole = totals(task, logits, batch)
    parts = [totals(task, logits[rows], half(batch, rows)) for rows in (slice(0, 3), slice(3, 7))]
    for name, (total, count) in whole.items():
        assert total == pytest.approx(sum(part[name][0] for part in parts), rel=1e-5)
        assert count == sum(part[name][1] for part in parts)


def test_the_right_answer_scores_best_and_a_wrong_one_worst(task):
    batch = task.batch("test", 0, 7)
    classes = width(task)
    right = perfect(batch, classes)
    torch.manual_seed(0)
    logits = {"right": right, "wrong": -right, "none": torch.randn(right.shape)}
    scores = {name: task.report(totals(task, value, batch)) for name, value in logits.items()}
    sign = 1 if task.higher_is_better else -1
    found = {name: sign * score[task.headline] for name, score in scores.items()}
    assert found["right"] > found["none"] >= found["wrong"]
    assert scores["right"]["loss"] == pytest.approx(0, abs=1e-4)
    assert scores["right"].get("accuracy", 1.0) == 1.0


def test_scores_take_half_precision_and_count_nothing_that_is_not_asked(task):
    batch = task.batch("test", 0, 4)
    logits = torch.randn(*batch.targets.shape, width(task)).bfloat16()
    nothing = dataclasses.replace(batch, targets=torch.full_like(batch.targets, IGNORE))
    assert all(count == 0 and total == 0 for total, count in totals(task, logits, nothing).values())
    wide, narrow = totals(task, logits.float(), batch), totals(task, logits, batch)
    for name, pair in wide.items():
        assert narrow[name] == pytest.approx(pair, rel=1e-5)


def test_another_seed_is_another_order(config):
    other = dataclasses.replace(config, seed=config.seed + 1)
    assert not same(config.build().batch("train", 0, 8), other.build().batch("train", 0, 8))


def test_the_config_survives_json(config):
    assert from_dict(Task.Config, json.loads(json.dumps(to_dict(config)))) == config


def test_what_a_run_needs_can_be_saved(task, tmp_path):
    task.save(tmp_path)
    again = tmp_path / "again"
    task.save(again)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == {
        path.name: path.read_bytes() for path in again.glob("*")
    }
