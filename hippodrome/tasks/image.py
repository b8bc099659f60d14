"""Image: what is on a picture, read pixel by pixel: sequential and permuted MNIST, Fashion-MNIST and CIFAR-10.

Pixels in raster order, or in one random order that is the same for all pictures (permuted), brought to [-1, 1]. In training a
picture can be moved by some pixels and mirrored, which is drawn from the seed and the row's place in training. The data is a
folder with the files as they are distributed (or CIFAR-10's archive):

    train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-... (.gz too)        grey, 28 x 28: (Fashion-)MNIST
    data_batch_1.bin ... data_batch_5.bin, test_batch.bin                       CIFAR-10 (`_cifar.py`), in colour or grey

The validation pictures are held out of the training ones.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.part import BadInput
from hippodrome.task import Batch, Split
from hippodrome.tasks import _cifar
from hippodrome.tasks._classified import _Classified, check_classes

Pictures = tuple[np.ndarray, np.ndarray]
"""Pixels (N, height, width, channels) uint8, labels (N,) uint8."""


class Image(_Classified):
    """Inputs (B, pixels, channels) float32, labels (B,)."""

    row_name = "images"

    @dataclass(frozen=True, kw_only=True)
    class Config(_Classified.Config):
        """`data`: the folder."""

        data: str = "fashion-mnist"
        permuted: bool = False
        channels: int = 1
        """1: grey, 3: the colours of CIFAR-10."""
        classes: int = 10
        holdout: float = 0.1
        """Share of the training pictures in the valid split."""
        validate_on_test: bool = False
        """The test pictures are the valid split too, and nothing is held out, as some papers do: the best score is biased."""
        permutation_seed: int = 0
        crop: int = 0
        """Pixels that a training picture may be moved by, up or down and left or right; black comes in."""
        flip: bool = False
        """Mirror every other training picture, left to right."""
        seed: int = 0
        """Draws the pictures held out, the order in training, and how pictures are moved and mirrored."""

        def __post_init__(self) -> None:
            if self.channels not in (1, 3):
                raise BadInput(f"channels is {self.channels}: it must be 1 or 3")
            if not 0 < self.holdout < 1:
                raise BadInput(f"holdout is {self.holdout}: it must be above 0 and below 1")
            if self.permuted and (self.crop or self.flip):
                raise BadInput("permuted pixels have no neighbours: leave crop and flip out")
            for name in ("seed", "permutation_seed", "crop"):
                if getattr(self, name) < 0:
                    raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 0")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.seed, self.config = config.seed, config
        folder = Path(config.data).expanduser()
        train, test = _read(folder, config.channels)
        check_classes(config.classes, 1 + max(int(labels.max()) for _, labels in (train, test)), str(folder))
        self._shape = train[0].shape[1:3]
        self._pictures: dict[Split, tuple[Tensor, Tensor]] = {"train": _sequences(train), "test": _sequences(test)}
        if config.validate_on_test:
            self._pictures["valid"] = self._pictures["test"]
        else:
            pixels, labels = self._pictures["train"]
            order = torch.from_numpy(np.random.default_rng(config.seed).permutation(len(labels)))
            held = min(max(1, round(config.holdout * len(labels))), len(labels) - 1)
            self._pictures["valid"] = pixels[order[:held]], labels[order[:held]]
            self._pictures["train"] = pixels[order[held:]], labels[order[held:]]
        self._order: Tensor | None = None
        if config.permuted:
            dice = torch.Generator().manual_seed(config.permutation_seed)
            self._order = torch.randperm(self._pictures["train"][0].shape[1], generator=dice)

    def batch(self, split: Split, index: int, size: int) -> Batch:
        batch, (crop, flip) = super().batch(split, index, size), (self.config.crop, self.config.flip)
        if split != "train" or not (crop or flip):
            return batch
        moved = _moved(batch.inputs.unflatten(1, self._shape), _dice(self.seed, index * size, size), crop, flip)
        return replace(batch, inputs=moved.flatten(1, 2))

    def labels(self, split: Split) -> Tensor:
        return self._pictures[split][1]

    def inputs(self, split: Split, rows: Tensor) -> tuple[Tensor, None]:
        pixels = self._pictures[split][0][rows]
        return (pixels if self._order is None else pixels[:, self._order]).float() / 127.5 - 1, None


def _dice(seed: int, first: int, count: int) -> Tensor:
    """Three random numbers in [0, 2^31) for each of the training rows number first, first + 1, ...: (count, 3) int64."""
    words = np.random.Philox(key=seed, counter=first).random_raw(4 * count).reshape(count, 4)[:, :3]
    return torch.from_numpy((words >> np.uint64(33)).astype(np.int64))


def _moved(pictures: Tensor, dice: Tensor, crop: int, flip: bool) -> Tensor:
    """pictures (B, H, W, C), each moved by at most `crop` pixels both ways and perhaps mirrored."""
    height, width = pictures.shape[1:3]
    wide = F.pad(pictures, (0, 0, crop, crop, crop, crop), value=-1.0)
    down, right = (dice[:, axis, None] % (2 * crop + 1) for axis in (0, 1))
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    if flip:
        columns = torch.where(dice[:, 2, None] % 2 == 1, columns.flip(1), columns)
    return wide[torch.arange(len(wide))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _sequences(pictures: Pictures) -> tuple[Tensor, Tensor]:
    pixels, labels = pictures
    # A copy: a view of a file's bytes cannot be written to, which torch warns of.
    flat = pixels.reshape(len(pixels), -1, pixels.shape[-1]).copy()
    return torch.from_numpy(flat), torch.from_numpy(labels.astype(np.int64))


def _read(folder: Path, channels: int) -> tuple[Pictures, Pictures]:
    """Training and test pictures."""
    if not folder.exists():
        raise BadInput(f"there is no folder {folder}: give the one with the pictures as data")
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    if folder.is_file() or any(folder.glob("data_batch_*")) or (folder / "test_batch.bin").is_file():
        return _cifar_pictures(folder, "train", channels), _cifar_pictures(folder, "test", channels)
    if channels != 1:
        raise BadInput(f"channels is {channels}, but the pictures of {folder} are grey: give channels 1")
    return _mnist(folder, "train"), _mnist(folder, "t10k")


def _cifar_pictures(path: Path, part: Literal["train", "test"], channels: int) -> Pictures:
    planes, labels = _cifar.read(path, part)
    pixels = _cifar.grey(planes)[..., None] if channels == 1 else planes.transpose(0, 2, 1)
    return pixels.reshape(len(pixels), _cifar.SIDE, _cifar.SIDE, channels), labels


def _mnist(folder: Path, stem: str) -> Pictures:
    pixels, labels = _idx(_find(folder, f"{stem}-images"), 3), _idx(_find(folder, f"{stem}-labels"), 1)
    if len(pixels) != len(labels) or not len(labels):
        raise BadInput(f"{folder} has {len(pixels)} pictures and {len(labels)} labels of {stem}: they do not belong together")
    return pixels[..., None], labels


def _find(folder: Path, stem: str) -> Path:
    """train-images-idx3-ubyte and its like, also with a dot before idx, and packed."""
    found = sorted(path for path in folder.glob(f"{stem}*") if path.name.removesuffix(".gz").endswith("ubyte"))
    if not found:
        raise BadInput(f"{folder} has no {stem}-idx*-ubyte or .gz, nor CIFAR-10's test_batch.bin")
    return found[0]


def _idx(path: Path, axes: int) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type 8, the number of axes, their sizes (big-endian int32), the bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{path} is truncated or damaged: {error}") from None
    if data[:4] != bytes([0, 0, 8, axes]) or len(data) < 4 + 4 * axes:
        raise BadInput(f"{path} is no IDX file of bytes with {axes} axes: it begins with {data[:4].hex(' ')}")
    sizes = np.frombuffer(data, ">i4", axes, 4).tolist()
    if len(data) != 4 + 4 * axes + math.prod(sizes):
        raise BadInput(f"{path} has {len(data)} bytes, not those of {' x '.join(map(str, sizes))}: it is damaged")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(sizes)
