"""What is asked of each pixel, and macro F1 that adds over shards."""

import numpy as np
import pytest
import torch

from hippodrome.part import BadInput
from hippodrome.task import IGNORE, Batch
from hippodrome.tasks import _pathfinder
from hippodrome.tasks.pathfinder_segmentation import PathfinderSegmentation, macro_f1


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIPPODROME_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield PathfinderSegmentation.Config(train_rows=2, test_rows=8).build()


@pytest.fixture(scope="module")
def drawings():
    return [_pathfinder.draw(_pathfinder.SEGMENTATION[128], 0, (2 << 40) + number) for number in range(8)]


def test_a_row_is_an_image_and_its_classes(task, drawings):
    batch = task.batch("test", 0, 8)
    assert batch.inputs.shape == (8, 128 * 128, 1)
    assert batch.targets.shape == (8, 128 * 128)
    for row, drawing in enumerate(drawings):
        torch.testing.assert_close(batch.inputs[row, :, 0], torch.from_numpy(drawing.image.ravel() / 127.5 - 1).float())
        assert (batch.targets[row].numpy() == _pathfinder.classes(drawing).ravel()).all()


def test_classes_say_which_path_joins_the_discs(drawings):
    assert {drawing.label for drawing in drawings} == {0, 1}
    for drawing in drawings:
        asked = _pathfinder.classes(drawing)
        joining = drawing.marked[0] if drawing.label else None
        for path in (0, 1):
            alone = drawing.paths[path] & ~drawing.paths[1 - path]
            assert (asked[alone] == (2 if path == joining else 1)).all()
        assert (asked[~drawing.paths.any(0)] == 0).all()


def test_only_the_ink_of_the_two_paths_is_asked_for(drawings):
    for drawing in drawings:
        asked = _pathfinder.classes(drawing) > 0
        # Discs and distractors are ink of class 0, and a path's ink is in the image.
        assert 0.1 < asked.sum() / (drawing.image > 0).sum() < 0.7
        assert (drawing.image[asked] > 0).all()
        y, x = drawing.marks[0]
        assert np.median(drawing.image[y - 1 : y + 2, x - 1 : x + 2]) > 200


@pytest.mark.parametrize("size", [256, 512])
def test_the_larger_sizes(size):
    drawing = _pathfinder.draw(_pathfinder.SEGMENTATION[size], 0, 0)
    assert drawing.image.shape == (size, size)
    assert set(np.unique(_pathfinder.classes(drawing))) <= {0, 1, 2}
    assert drawing.distractors >= 10


def test_scores_are_those_of_the_definitions(task):
    torch.manual_seed(0)
    targets, logits = torch.randint(3, (2, 50)), torch.randn(2, 50, 3)
    targets[0, :5] = IGNORE
    found = task.report({k: tuple(map(float, v)) for k, v in task.score(logits, Batch(targets, targets)).items()})
    kept = targets != IGNORE
    asked, guessed = targets[kept].numpy(), logits.argmax(-1)[kept].numpy()
    f1, recall = [], []
    for kind in range(3):
        hits = ((asked == kind) & (guessed == kind)).sum()
        precision, recalled = hits / (guessed == kind).sum(), hits / (asked == kind).sum()
        f1.append(2 * precision * recalled / (precision + recalled))
        recall.append(recalled)
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recall))
    assert found["accuracy"] == pytest.approx((asked == guessed).mean())
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits[kept], targets[kept])), rel=1e-5)


def test_macro_f1_of_the_whole_is_not_the_mean_over_shards(task):
    """Counts are added, not scores: one shard without class 2 says nothing about class 2."""
    first, second = np.diag([5, 5, 0]), np.array([[5, 0, 0], [0, 0, 0], [5, 0, 5]])
    assert macro_f1(first) == 1.0
    assert macro_f1(first + second) == pytest.approx(np.mean([20 / 25, 1, 10 / 15]))


def test_floors_are_the_scores_of_answers_without_a_model(task):
    batch = task.batch("test", 0, 8)
    blank = torch.zeros(*batch.targets.shape, 3)
    blank[..., 0] = 1
    ink = torch.nn.functional.one_hot((batch.inputs[..., 0] > -1).long(), 3)
    for name, logits in {"all pixels class 0": blank, "all ink class 1": ink}.items():
        scores = task.report({k: tuple(map(float, v)) for k, v in task.score(logits.float(), batch).items()})
        assert task.floors()[name] == pytest.approx(scores["macro_f1"])
    assert task.floors()["all pixels class 0"] == pytest.approx(0.32, abs=0.02)


def test_a_size_that_is_not_one():
    with pytest.raises(BadInput, match="size is 64: did you mean 128"):
        PathfinderSegmentation.Config(size=64)


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_a_cpu(task):
    torch.manual_seed(0)
    targets, logits = torch.randint(3, (2, 5000)), torch.randn(2, 5000, 3)
    here = task.score(logits, Batch(targets, targets))
    there = task.score(logits.cuda(), Batch(targets, targets).to("cuda"))
    for name, (total, count) in here.items():
        assert float(there[name][0]) == pytest.approx(float(total), rel=1e-5)
        assert int(there[name][1]) == int(count)
