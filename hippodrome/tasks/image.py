"""Image of Long Range Arena: CIFAR-10 in grey, row by row: 1,024 pixels, ten classes (Krizhevsky, 2009; Tay et al., 2021).

    grey = (19595 R + 38470 G + 7471 B + 32768) / 65536        as image programs do it

Read from the binary version: a folder with data_batch_1.bin to data_batch_5.bin and test_batch.bin, or its .tar.gz. The version
for Python is pickled and refused. The last tenth of the training files is valid (45,000 / 5,000 / 10,000). A signal is centred
and scaled by 122.6 and 61.0, as S4 does. Source of the format: www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from hippodrome.part import BadInput
from hippodrome.task import Batch, Split
from hippodrome.tasks._images import _Images
from hippodrome.tasks._labels import commonest, label_scores

_SIDE, _CLASSES = 32, 10
_RECORD = 1 + 3 * _SIDE**2
"""Bytes of an image: its label, then the planes of red, green and blue."""
_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST = ("test_batch.bin",)


class Image(_Images):
    """Ten classes of grey images."""

    mean_std = (122.6, 61.0)
    classes, length = _CLASSES, _SIDE**2

    @dataclass(frozen=True, kw_only=True)
    class Config(_Images.Config):
        cifar: str = "cifar-10-batches-bin"
        """The folder of the binary version of CIFAR-10, or cifar-10-binary.tar.gz."""

    config: Config

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Accuracy and cross entropy."""
        return label_scores(logits, batch.targets)

    def floors(self) -> Mapping[str, float]:
        """The commonest class of the test split: one in ten."""
        labels = self.arrays("test")["targets"]
        return {"commonest class": commonest(labels) / len(labels)}

    def _open(self, split: Split) -> dict[str, np.ndarray]:
        path = Path(self.config.cifar).expanduser()
        if split == "test":
            return _read(path, _TEST)
        both = _read(path, _TRAIN)
        count = len(both["targets"])
        first = count - count // 10
        return {name: array[:first] if split == "train" else array[first:] for name, array in both.items()}


def _read(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Grey images (n, 1024) and labels (n,) of files of the binary version, uint8."""
    files = _packed(path, names) if path.is_file() else _unpacked(path, names)
    records = []
    for name, data in files.items():
        if not data or len(data) % _RECORD:
            raise BadInput(
                f"{name} of {path} has {len(data)} bytes: its images have {_RECORD} each, the file is cut or another"
            )
        records.append(np.frombuffer(data, np.uint8).reshape(-1, _RECORD))
    found = np.concatenate(records)
    if found[:, 0].max() >= _CLASSES:
        raise BadInput(f"{path} has a label {found[:, 0].max()}: CIFAR-10 has 0 to 9")
    return {"images": grey(found[:, 1:].reshape(-1, 3, _SIDE**2)), "targets": found[:, 0].copy()}


def grey(colours: np.ndarray) -> np.ndarray:
    """Brightness (n, pixels) of planes of red, green and blue (n, 3, pixels), uint8."""
    # A weight at a time: all planes as wide integers would be a gigabyte.
    total = np.full((len(colours), colours.shape[2]), 32768, np.uint32)
    for plane, weight in enumerate((19595, 38470, 7471)):
        total += colours[:, plane].astype(np.uint32) * np.uint32(weight)
    return (total >> 16).astype(np.uint8)


def _unpacked(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    if not folder.is_dir():
        raise BadInput(f"there is no {folder}: give the folder of CIFAR-10's binary version, or cifar-10-binary.tar.gz")
    _refuse_pickles(folder, [entry.name for entry in folder.iterdir()])
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInput(f"{folder} has no {missing[0]}: CIFAR-10's binary version has {', '.join((*_TRAIN, *_TEST))}")
    return {name: (folder / name).read_bytes() for name in names}


def _packed(archive: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    try:
        with tarfile.open(archive) as packed:
            members = {Path(member.name).name: member for member in packed.getmembers() if member.isfile()}
            _refuse_pickles(archive, list(members))
            missing = [name for name in names if name not in members]
            if missing:
                raise BadInput(f"{archive} has no {missing[0]}: it is not cifar-10-binary.tar.gz")
            streams = {name: packed.extractfile(members[name]) for name in names}
            return {name: stream.read() for name, stream in streams.items() if stream is not None}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BadInput(f"{archive} is no archive that can be read: {error}") from None


def _refuse_pickles(where: Path, names: list[str]) -> None:
    if any(re.fullmatch(r"data_batch_\d|batches\.meta", name) for name in names):
        raise BadInput(f"{where} is CIFAR-10 for Python, pickled and so never loaded: take cifar-10-binary.tar.gz")
