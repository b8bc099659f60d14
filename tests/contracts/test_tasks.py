"""What every task promises, over the files of hippodrome/tasks. A new file is tested by lying there."""

import dataclasses
import json
import math
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hippodrome.part import find, from_dict, names, to_dict
from hippodrome.task import IGNORE, Batch, Task
from tests.support import tiny, variants
from tests.tasks.cifar import write_cifar


def _tasks():
    """Every task as it is, and the VARIANTS of its own test file, which are configs."""
    for name in names("tasks"):
        yield pytest.param((name, None), id=name)
        for number, config in enumerate(variants("tasks", name), start=1):
            yield pytest.param((name, config), id=f"{name}-{number}")


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


@pytest.fixture(params=_tasks())
def config(request, small, tmp_path_factory):
    name, variant = request.param
    kind = find(Task, name).Config
    known = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in small.items() if name in known}
    # A task that reads files has its own test file write some.
    values |= tiny("tasks", name)(tmp_path_factory.mktemp(name))
    return kind(**values) if variant is None else dataclasses.replace(variant, **values)


@pytest.fixture
def task(config) -> Task:
    return config.build()


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit by bit; NaN, where a regression asks nothing, equals itself."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def same(one: Batch, other: Batch) -> bool:
    return all(equal(a, b) for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True))


def half(batch: Batch, rows: slice) -> Batch:
    lengths = None if batch.lengths is None else batch.lengths[rows]
    return Batch(batch.inputs[rows], batch.targets[rows], lengths)


def width(task: Task) -> int:
    """Logits a model of this task would have: every target fits."""
    return 1 + max(int(task.batch(split, 0, 16).targets.max()) for split in ("train", "valid", "test")) + 3


def regresses(batch: Batch) -> bool:
    return batch.targets.is_floating_point()


def perfect(task: Task, batch: Batch) -> Tensor:
    """What a model that knows the answer says."""
    answers = batch.targets.where(batch.asked, 0)
    return answers if regresses(batch) else 50.0 * F.one_hot(answers, width(task)).float()


def guessed(task: Task, batch: Batch) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(batch.targets.shape) if regresses(batch) else torch.randn(*batch.targets.shape, width(task))


def totals(task: Task, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
    return {name: (float(total), float(count)) for name, (total, count) in task.score(logits, batch).items()}


def test_a_part_lies_in_the_folder():
    assert {"atomic", "induction", "lm", "recall"} <= set(names("tasks"))


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
        assert len(batch.inputs) == len(batch.targets) == 4
        assert batch.inputs.dtype in (torch.int64, torch.float32)
        assert batch.inputs.dtype == torch.int64 or batch.inputs.isfinite().all()
        assert batch.asked.reshape(4, -1).any(1).all(), "a row that asks nothing"
        if regresses(batch):
            assert batch.targets.dtype == torch.float32
            assert batch.targets.dim() == 3
            assert batch.targets.shape[:2] == batch.inputs.shape[:2]
            assert batch.targets[batch.asked].isfinite().all()
        else:
            assert batch.targets.dtype == torch.int64
            assert batch.targets.shape in (batch.inputs.shape[:1], batch.inputs.shape[:2])
            assert ((batch.targets >= 0) | (batch.targets == IGNORE)).all()


def test_training_that_never_ends_does_not_depend_on_the_batch_size(task):
    if task.size("train") is not None:
        pytest.skip("this training split has epochs")
    whole, parts = task.batch("train", 1, 6), [task.batch("train", index, 2) for index in (3, 4, 5)]
    assert equal(whole.inputs, torch.cat([part.inputs for part in parts]))
    assert equal(whole.targets, torch.cat([part.targets for part in parts]))
    seen = [task.batch(split, 0, 20).inputs.flatten(1).tolist() for split in ("train", "valid", "test")]
    assert len({tuple(row) for rows in seen for row in rows}) == 60, "a row is drawn twice, or by two splits"


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
    assert equal(one_by_one, whole.targets)
    with pytest.raises(IndexError):
        task.batch(split, rows, 1)


def test_scores_sum_over_shards(task):
    batch = task.batch("test", 0, 7)
    logits = guessed(task, batch)
    whole = totals(task, logits, batch)
    parts = [totals(task, logits[rows], half(batch, rows)) for rows in (slice(0, 3), slice(3, 7))]
    for name, (total, count) in whole.items():
        assert total == pytest.approx(sum(part[name][0] for part in parts), rel=1e-5)
        assert count == sum(part[name][1] for part in parts)


def test_the_right_answer_scores_best_and_a_wrong_one_worst(task):
    batch = task.batch("test", 0, 7)
    right = perfect(task, batch)
    wrong = right - 100 if regresses(batch) else -right
    logits = {"right": right, "wrong": wrong, "none": guessed(task, batch)}
    scores = {name: task.report(totals(task, value, batch)) for name, value in logits.items()}
    sign = 1 if task.higher_is_better else -1
    found = {name: sign * score[task.headline] for name, score in scores.items()}
    assert found["right"] > found["none"] >= found["wrong"]
    assert scores["right"]["loss"] == pytest.approx(0, abs=1e-4)
    assert scores["right"].get("accuracy", 1.0) == 1.0
    assert scores["right"].get("r2", 1.0) == 1.0


def test_floors_are_scores_that_a_right_answer_beats(task):
    batch = task.batch("test", 0, 7)
    best = task.report(totals(task, perfect(task, batch), batch))[task.headline]
    for name, value in task.floors().items():
        assert isinstance(value, float)
        assert math.isfinite(value)
        assert value < best if task.higher_is_better else value > best, name


def test_scores_take_half_precision_and_count_nothing_that_is_not_asked(task):
    batch = task.batch("test", 0, 4)
    logits = guessed(task, batch).bfloat16()
    unasked = math.nan if regresses(batch) else IGNORE
    nothing = dataclasses.replace(batch, targets=torch.full_like(batch.targets, unasked))
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
