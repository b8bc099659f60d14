"""The frame of classification: one label a row, and what is held out of the training data where no list says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from hippodrome.files import write_json
from hippodrome.part import BadInput
from hippodrome.task import Batch, Split, Task, ordered_rows, shuffled_rows
from hippodrome.tasks._labels import commonest, label_scores

U = TypeVar("U")


class _Classified(Task):
    """A task of one label a row. A subclass writes `labels` and `inputs`, and sets `seed`, which orders the training rows.

    `names`: what the labels stand for, where that is known; a run keeps them in classes.json.
    """

    seed: int
    names: Sequence[str] = ()

    def labels(self, split: Split) -> Tensor:
        """The label of every row of a split (rows,) int64."""
        raise NotImplementedError

    def inputs(self, split: Split, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inputs of some rows, and their lengths (B,) where they differ."""
        raise NotImplementedError

    def batch(self, split: Split, index: int, size: int) -> Batch:
        count = self.size(split)
        rows = shuffled_rows(count, index, size, self.seed) if split == "train" else ordered_rows(count, index, size)
        inputs, lengths = self.inputs(split, rows)
        return Batch(inputs, self.labels(split)[rows], lengths)

    def size(self, split: Split) -> int:
        return len(self.labels(split))

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Accuracy, and cross entropy in nats."""
        return label_scores(logits, batch.targets)

    def save(self, folder: Path) -> None:
        """classes.json: the names of the labels, in their order."""
        if self.names:
            write_json(folder / "classes.json", list(self.names))

    def floors(self) -> Mapping[str, float]:
        """The share of the test split's commonest class."""
        labels = self.labels("test").numpy()
        return {"commonest class": commonest(labels) / len(labels)}


def labelled_folders(folder: Path, classes: int) -> list[Path]:
    """The sub-folders of a folder, a class each, by name; those that begin with _ or . are none."""
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}: give one with a sub-folder a class as data")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "_.")
    if not found:
        raise BadInput(f"{folder} has no sub-folder: it needs one a class")
    check_classes(classes, len(found), str(folder))
    return found


def check_classes(given: int, found: int, where: str) -> None:
    """`BadInput` unless the model has as many classes as the data."""
    if given != found:
        raise BadInput(f"classes is {given}, but {where} has {found}: give classes {found}")


def hold_out(units: Sequence[U], share: float, seed: int, what: str) -> dict[Split, list[U]]:
    """The units of one class, drawn from `seed`: at least one each for valid and test, about `share` of all each."""
    if not 0 < share < 0.5:
        raise BadInput(f"holdout is {share}: the share of valid and of test must be above 0 and below 0.5")
    if len(units) < 3:
        raise BadInput(f"{what} has {len(units)} to learn from, validate and test on: at least 3 are needed")
    count = min(max(1, round(share * len(units))), (len(units) - 1) // 2)
    order = [units[i] for i in np.random.default_rng(seed).permutation(len(units))]
    return {"test": order[:count], "valid": order[count : 2 * count], "train": order[2 * count :]}
