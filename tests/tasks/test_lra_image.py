"""CIFAR-10's binary version becomes rows of grey; the pickled one is refused."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from hippodrome.part import BadInput
from hippodrome.tasks._cifar import grey
from hippodrome.tasks.lra_image import LraImage
from tests.tasks.cifar import colours, write_cifar


@pytest.fixture
def folder(tmp_path):
    return write_cifar(tmp_path / "cifar-10-batches-bin")


def test_grey_is_what_an_image_program_makes_of_colours():
    planes = np.random.default_rng(0).integers(256, size=(5, 3, 1024), dtype=np.uint8)
    for colour, found in zip(planes, grey(planes), strict=True):
        picture = Image.fromarray(colour.reshape(3, 32, 32).transpose(1, 2, 0))
        assert (np.asarray(picture.convert("L")).ravel() == found).all()


def test_rows_are_images_in_the_order_of_the_files(folder):
    task = LraImage.Config(cifar=str(folder), pixels="tokens").build()
    labels, planes = colours("data_batch_1.bin")
    assert (task.arrays("train")["images"][:4] == grey(planes)[:4]).all()
    assert task.arrays("train")["targets"][:4].tolist() == labels[:4].tolist()
    batch = task.batch("test", 0, 3)
    assert torch.equal(batch.inputs, torch.from_numpy(grey(colours("test_batch.bin")[1])[:3].astype(np.int64)))


def test_the_last_tenth_of_training_is_valid(folder):
    task = LraImage.Config(cifar=str(folder)).build()
    assert [task.size(split) for split in ("train", "valid", "test")] == [90, 10, 20]
    assert task.arrays("valid")["targets"].tolist() == colours("data_batch_5.bin")[0][-10:].tolist()


def test_a_signal_is_scaled_as_s4_does(folder):
    signal, tokens = (
        LraImage.Config(cifar=str(folder), pixels=kind).build().batch("valid", 0, 4) for kind in ("signal", "tokens")
    )
    assert signal.inputs.shape == (4, 1024, 1)
    torch.testing.assert_close(signal.inputs[..., 0], (tokens.inputs / 255 - 122.6 / 255) / (61.0 / 255))


def test_an_archive_is_read_as_its_folder(folder, tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, "cifar-10-batches-bin")
    one, other = (LraImage.Config(cifar=str(path)).build() for path in (folder, archive))
    for split in ("train", "valid", "test"):
        assert torch.equal(one.batch(split, 0, 5).inputs, other.batch(split, 0, 5).inputs)


def test_the_pickled_version_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pickled = pickle.dumps({"data": [1, 2, 3]})
    (folder / "data_batch_1").write_bytes(pickled)
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.size = len(pickled)
        packed.addfile(member, io.BytesIO(pickled))
    for path in (folder, archive):
        with pytest.raises(BadInput, match=r"for Python, pickled and so never loaded: take cifar-10-binary\.tar\.gz"):
            LraImage.Config(cifar=str(path)).build().batch("train", 0, 1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "data_batch_3.bin").unlink(), r"has no data_batch_3\.bin"),
        (lambda folder: (folder / "data_batch_3.bin").write_bytes(b"x" * 3000), r"data_batch_3\.bin of .* has 3000 bytes"),
        (lambda folder: (folder / "data_batch_1.bin").write_bytes(b"\x0b" * 3073), "has a label 11"),
    ],
)
def test_damaged_files_are_named(folder, damage, said):
    damage(folder)
    with pytest.raises(BadInput, match=said):
        LraImage.Config(cifar=str(folder)).build().batch("train", 0, 1)


def test_what_is_not_there_and_what_is_no_archive(tmp_path):
    with pytest.raises(BadInput, match=r"there is no .*nowhere"):
        LraImage.Config(cifar=str(tmp_path / "nowhere")).build().batch("test", 0, 1)
    (tmp_path / "words.tar.gz").write_text("words")
    with pytest.raises(BadInput, match="is no archive that can be read"):
        LraImage.Config(cifar=str(tmp_path / "words.tar.gz")).build().batch("test", 0, 1)


def test_the_floor_is_the_commonest_class(folder):
    labels = colours("test_batch.bin")[0]
    assert LraImage.Config(cifar=str(folder)).build().floors() == {"commonest class": np.bincount(labels).max() / 20}
