"""CIFAR-10's binary version (Krizhevsky, 2009), from its folder or its archive; the version for Python is pickled and refused.

data_batch_1.bin to data_batch_5.bin and test_batch.bin: of each image a label and the planes of red, green and blue, 32 x 32
bytes each. www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import Literal

import numpy as np

from hippodrome.part import BadInput

SIDE, CLASSES = 32, 10
_RECORD = 1 + 3 * SIDE**2
_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST = ("test_batch.bin",)


def read(path: Path, part: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
    """Planes of red, green and blue (n, 3, 1024) and labels (n,) of the training or the test files, uint8, in their order."""
    names = _TRAIN if part == "train" else _TEST
    files = _packed(path, names) if path.is_file() else _unpacked(path, names)
    records = []
    for name, data in files.items():
        if not data or len(data) % _RECORD:
            raise BadInput(f"{name} of {path} has {len(data)} bytes: images have {_RECORD} each, it is cut or another file")
        records.append(np.frombuffer(data, np.uint8).reshape(-1, _RECORD))
    found = np.concatenate(records)
    if found[:, 0].max() >= CLASSES:
        raise BadInput(f"{path} has a label {found[:, 0].max()}: CIFAR-10 has 0 to 9")
    return found[:, 1:].reshape(-1, 3, SIDE**2), found[:, 0].copy()


def grey(planes: np.ndarray) -> np.ndarray:
    """Brightness (n, pixels) of planes of red, green and blue (n, 3, pixels), uint8, as image programs compute it:

    (19595 R + 38470 G + 7471 B + 32768) / 65536, rounded down
    """
    # A weight at a time: all planes as wide integers would be a gigabyte.
    total = np.full((len(planes), planes.shape[2]), 32768, np.uint32)
    for plane, weight in enumerate((19595, 38470, 7471)):
        total += planes[:, plane].astype(np.uint32) * np.uint32(weight)
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
