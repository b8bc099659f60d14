"""Image: files as they are distributed become sequences of pixels; nothing of the test set is seen unless it is asked for."""

import gzip

import numpy as np
import pytest
import torch

from hippodrome.part import BadInput
from hippodrome.tasks.image import Image
from tests.support import assert_close
from tests.tasks.cifar import colours, write_cifar


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def pictures(count, size=3, seed=0):
    dice = np.random.default_rng(seed)
    return dice.integers(0, 256, (count, size, size)), np.arange(count) % 4


def write_mnist(folder, pack=True, counts=(40, 12)):
    """Small pictures of four classes, and what was written."""
    written = {}
    for stem, count, seed in (("train", counts[0], 0), ("t10k", counts[1], 1)):
        pixels, labels = pictures(count, seed=seed)
        written[stem] = pixels, labels
        for name, array in ((f"{stem}-images-idx3-ubyte", pixels), (f"{stem}-labels-idx1-ubyte", labels)):
            path = folder / (f"{name}.gz" if pack else name.replace("-idx", ".idx"))
            path.write_bytes(gzip.compress(idx(array)) if pack else idx(array))
    return written


def tiny(folder):
    write_mnist(folder)
    return {"data": str(folder), "classes": 4}


VARIANTS = (Image.Config(permuted=True), Image.Config(validate_on_test=True), Image.Config(crop=1, flip=True))


@pytest.mark.parametrize("pack", [True, False])
def test_pixels_come_in_raster_order(tmp_path, pack):
    pixels, labels = write_mnist(tmp_path, pack)["t10k"]
    batch = Image.Config(data=str(tmp_path), classes=4).build().batch("test", 0, 12)
    assert batch.inputs.shape == (12, 9, 1)
    assert batch.targets.tolist() == labels.tolist()
    assert_close(batch.inputs[..., 0], torch.from_numpy(pixels.reshape(12, 9)) / 127.5 - 1)
    assert batch.inputs.min() >= -1
    assert batch.inputs.max() <= 1


def test_permuted_pixels_are_one_order_for_all(tmp_path):
    write_mnist(tmp_path)
    plain, permuted = (Image.Config(data=str(tmp_path), classes=4, permuted=which).build() for which in (False, True))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for split in ("train", "valid", "test"):
        before, after = plain.batch(split, 0, 4), permuted.batch(split, 0, 4)
        assert torch.equal(after.inputs, before.inputs[:, order])
        assert torch.equal(after.targets, before.targets)
    other = Image.Config(data=str(tmp_path), classes=4, permuted=True, permutation_seed=1).build()
    assert not torch.equal(other.batch("test", 0, 4).inputs, permuted.batch("test", 0, 4).inputs)


def rows(task, split):
    return {tuple(row) for row in task.batch(split, 0, task.size(split)).inputs.flatten(1).tolist()}


def test_validation_is_held_out_of_training_never_of_the_test(tmp_path):
    written = write_mnist(tmp_path)
    task = Image.Config(data=str(tmp_path), classes=4, holdout=0.2).build()
    assert [task.size(split) for split in ("train", "valid", "test")] == [32, 8, 12]
    train, valid, test = (rows(task, split) for split in ("train", "valid", "test"))
    known = {tuple(row) for row in (torch.from_numpy(written["train"][0].reshape(40, 9)) / 127.5 - 1).float().tolist()}
    assert train | valid == known
    assert not train & valid
    assert not (train | valid) & test


def test_validating_on_the_test_set_has_to_be_asked_for(tmp_path):
    write_mnist(tmp_path)
    task = Image.Config(data=str(tmp_path), classes=4, validate_on_test=True).build()
    assert task.size("train") == 40
    assert rows(task, "valid") == rows(task, "test")


def test_the_floor_is_the_share_of_the_commonest_class(tmp_path):
    write_mnist(tmp_path, counts=(41, 13))
    task = Image.Config(data=str(tmp_path), classes=4, validate_on_test=True).build()
    assert task.floors() == {"commonest class": pytest.approx(4 / 13)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("inside", [True, False])
def test_cifar_in_colour_and_grey(tmp_path, channels, inside):
    folder = write_cifar(tmp_path / "cifar-10-batches-bin")
    task = Image.Config(data=str(tmp_path if inside else folder), channels=channels, holdout=0.2).build()
    labels, planes = colours("test_batch.bin")
    batch = task.batch("test", 0, 20)
    assert (task.size("train"), task.size("valid")) == (80, 20)
    assert batch.inputs.shape == (20, 1024, channels)
    assert batch.targets.tolist() == labels.tolist()
    expected = torch.from_numpy(planes).double().transpose(1, 2)
    if channels == 1:
        expected = expected @ torch.tensor([[0.299], [0.587], [0.114]]).double()
    seen = (batch.inputs.double() + 1) * 127.5
    assert (seen - expected).abs().max() < (0.51 if channels == 1 else 1e-4)


def test_training_pictures_are_moved_and_mirrored(tmp_path):
    write_mnist(tmp_path)
    plain, moved = (Image.Config(data=str(tmp_path), classes=4, crop=crop, flip=crop > 0).build() for crop in (0, 1))
    before, after = plain.batch("train", 2, 8), moved.batch("train", 2, 8)
    assert torch.equal(before.targets, after.targets)
    seen = set()
    for old, new in zip(before.inputs.reshape(8, 3, 3), after.inputs.reshape(8, 3, 3), strict=True):
        wide = torch.full((5, 5), -1.0)
        wide[1:4, 1:4] = old
        cuts = {(i, j): wide[i : i + 3, j : j + 3] for i in range(3) for j in range(3)}
        found = [(*at, flip) for at, cut in cuts.items() for flip in (0, 1) if torch.equal(cut.flip(1) if flip else cut, new)]
        assert len(found) >= 1
        seen.add(found[0])
    assert len(seen) > 3
    assert torch.equal(moved.batch("train", 5, 4).inputs, moved.batch("train", 2, 8).inputs[4:]), (
        "cut otherwise, moved otherwise"
    )
    for split in ("valid", "test"):
        assert torch.equal(moved.batch(split, 0, 3).inputs, plain.batch(split, 0, 3).inputs)
    with pytest.raises(BadInput, match="permuted pixels have no neighbours"):
        Image.Config(permuted=True, crop=1)


def damaged(folder, what):
    write_mnist(folder, pack=what == "truncated")
    path = folder / ("train-images-idx3-ubyte.gz" if what == "truncated" else "train-images.idx3-ubyte")
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-9], "short": data[:-1], "type": b"\0\0\x0d" + data[3:]}[what])


@pytest.mark.parametrize(
    ("what", "message"), [("truncated", "truncated or damaged"), ("short", "40 x 3 x 3"), ("type", "begins with 00 00 0d 03")]
)
def test_a_damaged_file_is_named(tmp_path, what, message):
    damaged(tmp_path, what)
    with pytest.raises(BadInput, match=message):
        Image.Config(data=str(tmp_path), classes=4).build()


def test_what_does_not_fit_is_one_clear_line(tmp_path):
    with pytest.raises(BadInput, match="there is no folder"):
        Image.Config(data=str(tmp_path / "none")).build()
    with pytest.raises(BadInput, match="has no train-images"):
        Image.Config(data=str(tmp_path)).build()
    write_mnist(tmp_path)
    with pytest.raises(BadInput, match=r"classes is 10, but .* has 4"):
        Image.Config(data=str(tmp_path)).build()
    with pytest.raises(BadInput, match="are grey"):
        Image.Config(data=str(tmp_path), classes=4, channels=3).build()
    (tmp_path / "data_batch_1").write_bytes(b"pickle")
    with pytest.raises(BadInput, match="pickled and so never loaded"):
        Image.Config(data=str(tmp_path), classes=4).build()
    for wrong in ({"channels": 2}, {"holdout": 0.0}, {"seed": -1}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Image.Config(**wrong)
