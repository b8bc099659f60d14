"""ListOpsSubTrees: values where brackets close, heights, and what they say of a score."""

import pytest
import torch
from torch.nn import functional as F

from hippodrome.task import IGNORE
from hippodrome.tasks._listops import CLOSE, DIGIT, evaluate
from hippodrome.tasks.listops_subtrees import ListOpsSubTrees, heights
from tests.golden_files import load

SMALL = {"max_depth": 6, "min_length": 20, "max_length": 260, "train_rows": 40, "test_rows": 30}


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path))
    return ListOpsSubTrees.Config(**SMALL).build()


def golden():
    """The authors' trees in our ids: they have an id for the unknown, and name a value by the id of its digit."""
    case = load("dlr_tasks_listops_trees")
    ids = case["tokens"].long() - 1
    labels = case["labels"].long()
    return ids.clamp(min=0), labels.where(labels == IGNORE, labels - 2), case["heights"].long(), case["lengths"].long()


def test_values_and_heights_are_the_authors():
    ids, labels, expected, lengths = golden()
    for row, length in enumerate(lengths.tolist()):
        found = evaluate(ids[row, :length].numpy())
        places = [at for at, _, _ in found]
        assert places == (labels[row] != IGNORE).nonzero().flatten().tolist()
        assert [value for _, value, _ in found] == labels[row, places].tolist()
        assert [height for _, _, height in found] == expected[row, places].tolist()


def test_heights_of_a_batch_are_the_authors():
    ids, _, expected, _ = golden()
    assert torch.equal(heights(ids), expected.clamp(min=0))
    assert torch.equal(heights(ids[3:4]), expected[3:4].clamp(min=0))
    assert not heights(torch.zeros(2, 5, dtype=torch.int64)).any()


def test_targets_stand_where_brackets_close(task):
    batch = task.batch("test", 0, 30)
    assert batch.inputs.shape == batch.targets.shape == (30, 260)
    assert torch.equal(batch.targets != IGNORE, batch.inputs == CLOSE)
    for row, length in enumerate(batch.lengths.tolist()):
        for at, value, _ in evaluate(batch.inputs[row, :length].numpy()):
            assert batch.targets[row, at] == value


def test_accuracy_is_told_by_height(task):
    batch = task.batch("test", 0, 30)
    height = heights(batch.inputs)
    # Right up to height 2 and at height 4.
    knows = (height <= 2) | (height == 4)
    wrong = (batch.targets + 1) % 10
    logits = F.one_hot(batch.targets.where(knows, wrong).where(batch.targets != IGNORE, 0), 10).float()
    totals = {name: (float(a), float(b)) for name, (a, b) in task.score(logits, batch).items()}
    scores = task.report(totals)
    assert [scores[f"height_{h}"] for h in range(1, 6)] == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert sum(totals[f"height_{h}"][1] for h in range(1, 6)) == totals["accuracy"][1] == (height > 0).sum()
    assert scores["above_height_2"] == pytest.approx(float((height == 4).sum() / (height > 2).sum()))
    assert scores["accuracy"] == pytest.approx(float((knows & (height > 0)).sum() / (height > 0).sum()))


def test_a_height_that_does_not_occur_has_no_score(task):
    batch = task.batch("test", 0, 30)
    low = batch.targets.where(heights(batch.inputs) <= 2, IGNORE)
    logits = torch.randn(30, 260, 10)
    scores = task.score(logits, type(batch)(batch.inputs, low, batch.lengths))
    assert set(task.report({name: (float(a), float(b)) for name, (a, b) in scores.items()})) == {
        *("accuracy", "loss", "height_1", "height_2")
    }


def test_the_floor_is_the_share_of_low_trees(task):
    batch = task.batch("test", 0, 30)
    height = heights(batch.inputs)
    values = batch.targets[height > 0]
    floors = task.floors()
    assert floors["heights 1 and 2 alone"] == pytest.approx(float(((height > 0) & (height <= 2)).sum() / len(values)))
    assert floors["majority class"] == pytest.approx(float(values.bincount().max() / len(values)))


def test_the_published_setting_has_the_papers_heights(tmp_path, monkeypatch):
    """Frequencies of heights in the paper's figure: 46.3 %, 20.7 %, 11.6 %, 7.2 %, 4.7 %, ..."""
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path))
    batch = ListOpsSubTrees.Config(test_rows=60).build().batch("test", 0, 60)
    assert ((batch.lengths > 7000) & (batch.lengths < 8180)).all()
    assert batch.inputs.shape == (60, 8180)
    height = heights(batch.inputs)
    share = height[height > 0].bincount(minlength=6)[1:6] / (height > 0).sum()
    assert share.tolist() == pytest.approx([0.463, 0.207, 0.116, 0.072, 0.047], abs=0.006)
    assert ((batch.inputs >= DIGIT) | (torch.arange(8180) >= batch.lengths[:, None])).all()


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_a_cpu(task):
    batch = task.batch("test", 0, 30)
    torch.manual_seed(0)
    logits = torch.randn(30, 260, 10)
    on_gpu, on_cpu = task.score(logits.cuda(), batch.to("cuda")), task.score(logits, batch)
    assert torch.equal(heights(batch.inputs.cuda()).cpu(), heights(batch.inputs))
    for name, (total, count) in on_cpu.items():
        assert float(on_gpu[name][0]) == pytest.approx(float(total), rel=1e-5)
        assert int(on_gpu[name][1]) == int(count)
