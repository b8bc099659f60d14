"""Image of Long Range Arena: CIFAR-10 in grey, row by row: 1,024 pixels, ten classes (Krizhevsky, 2009; Tay et al., 2021).

The last tenth of the training files is valid: 45,000 / 5,000 / 10,000. A signal is centred and scaled by 122.6 and 61.0, as S4
does; or pixels are 256 tokens, as the benchmark has them. How files are read: `_cifar.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from hippodrome.task import Batch, Split
from hippodrome.tasks import _cifar
from hippodrome.tasks._images import _Images
from hippodrome.tasks._labels import commonest, label_scores


class LraImage(_Images):
    """Ten classes of grey images."""

    mean_std = (122.6, 61.0)
    classes, length = _cifar.CLASSES, _cifar.SIDE**2

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
        planes, labels = _cifar.read(Path(self.config.cifar).expanduser(), "test" if split == "test" else "train")
        first = len(labels) - len(labels) // 10
        rows = {"train": slice(first), "valid": slice(first, None), "test": slice(None)}[split]
        return {"images": _cifar.grey(planes[rows]), "targets": labels[rows]}
