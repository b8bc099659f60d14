"""The frame of tasks that classify labelled documents: reading, splits, batches, scores and the floor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hippodrome.files import write_json
from hippodrome.part import BadInput
from hippodrome.task import Batch, Split, Task, ordered_rows, shuffled_rows
from hippodrome.tasks._documents import VOCAB_SIZE, Documents, Record, held_out, without_repeats
from hippodrome.tasks._labels import commonest, label_scores

Parts = dict[Split, list[Record]]


class _Labelled(Task):
    """Classification of documents. A subclass reads the records of the splits that its source has."""

    vocab_size = VOCAB_SIZE

    @dataclass(frozen=True, kw_only=True)
    class Config(Task.Config):
        """holdout: the share of training that is validation where the source has none, and of all that is test likewise."""

        length: int = 4096
        """Bytes at which a document is cut."""
        classes: int = 2
        """How many labels there are."""
        holdout: float = 0.1
        pad: Literal["longest", "length"] = "longest"
        """How wide batches are: as their longest row, or always `length`, which a CUDA graph needs."""
        seed: int = 0
        """Draws the order in training. What is held out is the same for all seeds."""

        def __post_init__(self) -> None:
            for name, least in {"length": 1, "classes": 2, "seed": 0}.items():
                if getattr(self, name) < least:
                    raise BadInput(f"{name} is {getattr(self, name)}: it must be at least {least}")
            if not 0 < self.holdout <= 0.5:
                raise BadInput(f"holdout is {self.holdout}: it is a share above 0 and at most 0.5")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        parts = self.read()
        self.split = "as given: " + ", ".join(parts)
        if "test" not in parts:
            parts["train"], parts["test"] = held_out(without_repeats(parts["train"]), config.holdout, "test")
            self.split += f"; test is {config.holdout:.0%} of train without repeats, at random"
        if "valid" not in parts:
            parts["train"], parts["valid"] = held_out(parts["train"], config.holdout, "validation")
            self.split += f"; valid is {config.holdout:.0%} of what is left of train, at random"
        self.labels = sorted({label for records in parts.values() for label, _ in records})
        if len(self.labels) != config.classes:
            known = ", ".join(self.labels[:8]) + (", ..." if len(self.labels) > 8 else "")
            raise BadInput(f"the documents have {len(self.labels)} labels ({known}), not {config.classes}: set classes")
        self.documents: dict[Split, Documents] = {split: Documents.of(records, self.labels) for split, records in parts.items()}

    def read(self) -> Parts:
        """The records of each split that the source has: train at least."""
        raise NotImplementedError

    def batch(self, split: Split, index: int, size: int) -> Batch:
        documents = self.documents[split]
        count = len(documents)
        rows = shuffled_rows(count, index, size, self.config.seed) if split == "train" else ordered_rows(count, index, size)
        ids, lengths = documents.ids(rows.tolist(), self.config.length if self.config.pad == "length" else None)
        return Batch(torch.from_numpy(ids), torch.from_numpy(documents.labels[rows.numpy()]), torch.from_numpy(lengths))

    def size(self, split: Split) -> int:
        return len(self.documents[split])

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Accuracy and cross entropy."""
        return label_scores(logits, batch.targets)

    def floors(self) -> Mapping[str, float]:
        """The commonest label of the test split."""
        return {"majority class": commonest(self.documents["test"].labels) / self.size("test")}

    def save(self, folder: Path) -> None:
        """data.json: the source, its labels, and what the splits are."""
        splits: dict[str, Any] = {
            name: {"documents": len(found), "sha256": found.sha256} for name, found in self.documents.items()
        }
        write_json(folder / "data.json", {"source": self.source, "labels": self.labels, "split": self.split, "splits": splits})

    @property
    def source(self) -> str:
        """What was read."""
        raise NotImplementedError


def found_path(name: str, what: str, flag: str) -> Path:
    """A path that exists, or `BadInput` that says which flag names it."""
    path = Path(name).expanduser()
    if not path.exists():
        raise BadInput(f"there is no {path}: name {what} with {flag}")
    return path
