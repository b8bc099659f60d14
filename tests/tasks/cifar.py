"""A small CIFAR-10 in the layout of its binary version: random colours, 20 images a file."""

import zlib
from pathlib import Path

import numpy as np

FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")


def colours(file: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels (20,) and planes of red, green and blue (20, 3, 1024) of a file, uint8."""
    rng = np.random.default_rng(zlib.crc32(file.encode()))
    return rng.integers(10, size=20, dtype=np.uint8), rng.integers(256, size=(20, 3, 1024), dtype=np.uint8)


def write_cifar(folder: Path) -> Path:
    """The folder with all six files."""
    folder.mkdir(parents=True)
    for file in FILES:
        labels, planes = colours(file)
        (folder / file).write_bytes(np.concatenate([labels[:, None], planes.reshape(20, -1)], 1).tobytes())
    return folder
