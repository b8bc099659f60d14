"""PathfinderSegmentation of DLR (Gupta, Mehta, Berant, 2022): is a pixel on a path, and does that path join the two discs?

0: on no main path; 1: on a main path that does not join the discs; 2: on the path that joins them, which half of the images
have. A main path is its dashes; discs and distractors, which begin with discs too, are class 0. 128, 256 or 512 pixels a side,
so rows of 16,384 to 262,144. The headline is macro F1, mean over classes of 2 tp / (2 tp + fp + fn), of the whole split, where
the authors average over batches. Images are drawn (`_pathfinder.py`): the authors' files keep the paths as pickles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hippodrome.task import IGNORE, Batch, Split
from hippodrome.tasks import _pathfinder
from hippodrome.tasks._images import _Images
from hippodrome.tasks.pathfinder import Answer, check_sizes, drawn

Size = Literal[128, 256, 512]
CLASSES = 3
_SAMPLE = 200
"""Images of the test split that the floors are computed on: a class has many pixels in each."""


class PathfinderSegmentation(_Images):
    """Three classes a pixel."""

    headline = "macro_f1"

    @dataclass(frozen=True, kw_only=True)
    class Config(_Images.Config):
        size: Size = 128
        """Pixels a side; the row is its square."""
        train_rows: int = 80_000
        test_rows: int = 10_000
        """Images of the test split, and of the valid split."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_sizes(self.size, get_args(Size), self.train_rows, self.test_rows)

        @property
        def length(self) -> int:
            """Pixels of an image."""
            return self.size**2

    config: Config

    def size(self, split: Split) -> int:
        return self.config.train_rows if split == "train" else self.config.test_rows

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Cross entropy, and how many pixels of class t were taken for class p ("confusion_tp"), which add over shards."""
        flat = batch.targets.flatten()
        nats = F.cross_entropy(logits.flatten(0, -2).float(), flat, ignore_index=IGNORE, reduction="sum")
        asked = flat != IGNORE
        guessed = logits[..., :CLASSES].argmax(-1).flatten()
        pairs = torch.bincount((CLASSES * flat + guessed)[asked], minlength=CLASSES**2)
        counts = {f"confusion_{t}{p}": (pairs[CLASSES * t + p], asked.sum()) for t in range(CLASSES) for p in range(CLASSES)}
        return {"loss": (nats, asked.sum()), **counts}

    def report(self, totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Macro F1, balanced accuracy, accuracy, and the loss. A class that neither occurs nor is guessed is left out."""
        pairs = np.array([[totals[f"confusion_{t}{p}"][0] for p in range(CLASSES)] for t in range(CLASSES)])
        loss, count = totals["loss"]
        scores = {"macro_f1": macro_f1(pairs), "balanced_accuracy": _recall(pairs)}
        return scores | {"accuracy": float(np.trace(pairs) / max(1.0, pairs.sum())), "loss": loss / max(1.0, count)}

    def floors(self) -> Mapping[str, float]:
        """Macro F1 of calling every pixel class 0, and of calling every pixel that is not black class 1."""
        arrays = self.arrays("test")
        asked, ink = arrays["targets"][:_SAMPLE].ravel(), (arrays["images"][:_SAMPLE] > 0).ravel()
        answers = {"all pixels class 0": np.zeros_like(asked), "all ink class 1": ink.astype(np.uint8)}
        return {name: macro_f1(_confusion(asked, answer)) for name, answer in answers.items()}

    def _open(self, split: Split) -> dict[str, np.ndarray]:
        size = self.config.size
        answer = Answer((size**2,), lambda drawing: _pathfinder.classes(drawing).ravel())
        geometry, name = _pathfinder.SEGMENTATION[size], f"pathfinder_segmentation{size}"
        return drawn(name, geometry, self.config.seed, split, self.size(split), answer)


def macro_f1(pairs: np.ndarray) -> float:
    """Mean over classes of F1, from how many of true class (rows) were taken for each (columns)."""
    both = pairs.sum(0) + pairs.sum(1)
    return float((2 * np.diag(pairs)[both > 0] / both[both > 0]).mean()) if both.any() else 0.0


def _recall(pairs: np.ndarray) -> float:
    found = pairs.sum(1)
    return float((np.diag(pairs)[found > 0] / found[found > 0]).mean()) if found.any() else 0.0


def _confusion(asked: np.ndarray, answer: np.ndarray) -> np.ndarray:
    counts = np.bincount(CLASSES * asked.astype(np.int64) + answer, minlength=CLASSES**2)
    return counts.reshape(CLASSES, CLASSES)
