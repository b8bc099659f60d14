"""Pathfinder of Long Range Arena: does a path of dashes join the two discs? An image as a row of pixels, two classes.

32, 64, 128 (Path-X) or 256 pixels a side, so rows of 1,024 to 65,536; 80 % of the images train, 10 % valid, 10 % test. They are
drawn by our own generator with the published geometry (`_pathfinder.py`), or read from the published folders, which are split
as S4 splits them. Pixels are x / 127.5 - 1, or 256 tokens. Sources: Linsley et al., NeurIPS 2018; Tay et al., ICLR 2021.

    python -m hippodrome.tasks.pathfinder FILE.png        draws a picture of samples
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from hippodrome.part import BadInput
from hippodrome.task import Batch, Split
from hippodrome.tasks import _pathfinder
from hippodrome.tasks._images import Arrays, _Images, kept
from hippodrome.tasks._labels import commonest, label_scores

Size = Literal[32, 64, 128, 256]
Dashes = Literal[6, 9, 14]
SETS: dict[int, str] = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}
"""The sets of a published folder: easy, intermediate, and hard, the one that scores are told of."""

_FIRST: dict[Split, int] = {"train": 0, "valid": 1 << 40, "test": 2 << 40}
"""Number of a split's first image, so that a larger training split leaves the others as they are."""


class Answer(NamedTuple):
    """What is asked of a drawing, as bytes of some shape."""

    shape: tuple[int, ...]
    of: Callable[[_pathfinder.Drawing], np.ndarray]


class Pathfinder(_Images):
    """Two classes: the discs mark the ends of one path (1), or an end of each of two (0)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(_Images.Config):
        size: Size = 32
        """Pixels a side; the row is its square."""
        contour_length: Dashes = 14
        """Dashes of a path: 14 is Long Range Arena's "hard" set, which is the benchmark; 6 and 9 are its easier ones."""
        train_rows: int = 160_000
        test_rows: int = 20_000
        """Images of the test split, and of the valid split, where they are drawn."""
        folder: str | None = None
        """A published pathfinderN folder, or one of its sets, with imgs/ and metadata/; None: images are drawn."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_sizes(self.size, get_args(Size), self.train_rows, self.test_rows)
            if self.contour_length not in SETS:
                raise BadInput(f"contour_length is {self.contour_length}: {nearest_number(self.contour_length, tuple(SETS))}")

        @property
        def length(self) -> int:
            """Pixels of an image."""
            return self.size**2

    config: Config

    def size(self, split: Split) -> int:
        if self.config.folder is not None:
            return super().size(split)
        return self.config.train_rows if split == "train" else self.config.test_rows

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Accuracy and cross entropy."""
        return label_scores(logits, batch.targets)

    def floors(self) -> Mapping[str, float]:
        """The commoner answer of the test split."""
        labels = self.arrays("test")["targets"]
        return {"commoner class": commonest(labels) / len(labels)}

    def _open(self, split: Split) -> dict[str, np.ndarray]:
        config = self.config
        if config.folder is not None:
            return _read(Path(config.folder).expanduser(), split, config.size, SETS[config.contour_length])
        geometry, rows = _pathfinder.easier(config.size, config.contour_length), self.size(split)
        return drawn(
            f"pathfinder{config.size}", geometry, config.seed, split, rows, Answer((), lambda drawing: np.array(drawing.label))
        )


def nearest_number(given: int, allowed: tuple[int, ...]) -> str:
    """The end of a message on a number that is not among those allowed."""
    close = min(allowed, key=lambda good: abs(good - given))
    return f"did you mean {close}? known: {', '.join(map(str, allowed))}"


def check_sizes(size: int, allowed: tuple[int, ...], train_rows: int, test_rows: int) -> None:
    """`BadInput` for a size that is not among those allowed and for empty splits."""
    if size not in allowed:
        raise BadInput(f"size is {size}: {nearest_number(size, allowed)}")
    for name, rows in {"train_rows": train_rows, "test_rows": test_rows}.items():
        if rows < 1:
            raise BadInput(f"{name} is {rows}: it must be at least 1")


def drawn(
    name: str, geometry: _pathfinder.Geometry, seed: int, split: Split, rows: int, answer: Answer
) -> dict[str, np.ndarray]:
    """images (rows, H * W) of a split and targets, the answer to each, from the cache or else drawn."""

    def make(start: int, stop: int) -> Arrays:
        drawings = [_pathfinder.draw(geometry, seed, _FIRST[split] + row) for row in range(start, stop)]
        images = np.stack([drawing.image.ravel() for drawing in drawings])
        return {"images": images, "targets": np.stack([answer.of(drawing) for drawing in drawings])}

    facts = {"geometry": repr(geometry), "version": _pathfinder.VERSION, "seed": seed, "split": split, "rows": rows}
    return kept(f"{name}-{split}", facts, {"images": (rows, geometry.size**2), "targets": (rows, *answer.shape)}, make)


# The published folders


def _read(folder: Path, split: Split, size: int, chosen_set: str) -> dict[str, np.ndarray]:
    """A split of a published folder: its images in the order of S4's random split, which has the seed 42."""
    root = folder / chosen_set if (folder / chosen_set).is_dir() else folder
    found = _listed(root)
    held_out = len(found) // 10
    if held_out < 1:
        raise BadInput(f"{root} lists {len(found)} images: at least 10 are needed to hold any out")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(42)).tolist()
    ends = {"train": (0, -2 * held_out), "valid": (-2 * held_out, -held_out), "test": (-held_out, None)}
    chosen = [found[row] for row in order[slice(*ends[split])]]

    def rows(start: int, stop: int) -> Arrays:
        images = np.stack([_png(path, size) for path, _ in chosen[start:stop]])
        return {"images": images, "targets": np.array([label for _, label in chosen[start:stop]], np.uint8)}

    facts = {"folder": str(root.resolve()), "split": split, "size": size, "metadata": _glance(root), "rows": len(chosen)}
    return kept(f"{folder.name}-{split}", facts, {"images": (len(chosen), size**2), "targets": (len(chosen),)}, rows)


def _metadata(root: Path) -> list[Path]:
    files = [path for path in (root / "metadata").glob("*.npy") if path.stem.isdecimal()]
    if not files:
        raise BadInput(f"no folder of Pathfinder images: {root} has no metadata/0.npy; without a folder they are drawn")
    return sorted(files, key=lambda path: int(path.stem))


def _glance(root: Path) -> list[list[Any]]:
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in _metadata(root)]


def _listed(root: Path) -> list[tuple[Path, int]]:
    """Every image of a set with its label, in the order of the metadata. Files without a byte are left out."""
    found = []
    for file in _metadata(root):
        for number, words in enumerate(_lines(file), start=1):
            if len(words) < 4 or words[3] not in ("0", "1"):
                raise BadInput(
                    f"row {number} of {file} is {' '.join(words)[:60]!r}: wanted are folder, file, number, label 0 or 1"
                )
            path = root / words[0] / words[1]
            if not path.is_file():
                raise BadInput(f"row {number} of {file} names {path}, which is not there")
            if path.stat().st_size:
                found.append((path, int(words[3])))
    return found


def _lines(file: Path) -> list[list[str]]:
    """The rows of a metadata file: text, as Long Range Arena has it, or an array of strings."""
    data = file.read_bytes()
    if data.startswith(b"\x93NUMPY"):
        try:
            rows = np.load(file, allow_pickle=False)
        except ValueError:
            raise BadInput(
                f"{file} holds pickled objects, which are never loaded: write its rows as text, a line each"
            ) from None
        return [[str(word) for word in row] for row in rows]
    try:
        return [line.split() for line in data.decode().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise BadInput(f"{file} is neither text nor an array of strings; pickled objects are never loaded") from None


def _png(path: Path, size: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.size != (size, size):
                raise BadInput(
                    f"{path} has {image.size[0]} x {image.size[1]} pixels, size is {size}: give the size of the folder"
                )
            return np.asarray(image.convert("L")).ravel()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path} is no image that can be read: {error}") from None


def main(arguments: list[str]) -> None:
    """Write a picture of images that are joined and not, of every size; for segmentation with their classes."""
    from hippodrome.plots import draw_images

    rows = {}
    for size, geometry in _pathfinder.LRA.items():
        rows[f"{size} x {size}"] = [(_CAPTIONS[found.label], found.image) for found in _samples(geometry, (1, 1, 0, 0))]
    for size, geometry in _pathfinder.SEGMENTATION.items():
        rows[f"segment {size}"] = []
        for found in _samples(geometry, (1, 0)):
            rows[f"segment {size}"] += [(_CAPTIONS[found.label], found.image), ("asked", 127 * _pathfinder.classes(found))]
    draw_images(Path(arguments[0]), rows, "Pathfinder: do the discs lie on one path?")


_CAPTIONS = ("not joined", "joined")


def _samples(geometry: _pathfinder.Geometry, labels: tuple[int, ...]) -> list[_pathfinder.Drawing]:
    """The first drawings of seed 0 that have these labels."""
    found, number = [], 0
    for label in labels:
        while (drawing := _pathfinder.draw(geometry, 0, number)).label != label:
            number += 1
        found.append(drawing)
        number += 1
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
