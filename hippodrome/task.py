"""Task: what is learned and how it is scored; Batch: one draw of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hippodrome.part import BadInput, Part

Split = Literal["train", "valid", "test"]

IGNORE = -100
"""A target that no loss and no score counts."""


@dataclass(frozen=True)
class Batch:
    """One batch.

    inputs: token ids (B, L) int64, or signals (B, L, C) float32. targets: ids (B, L), or one label a row (B,), int64 and
    `IGNORE` where nothing is asked; or the numbers (B, L, C) float32 of a regression, NaN where nothing is asked. lengths:
    real tokens a row (B,), the rest is right padding; or their spans (B, 2) as start and stop, for left or mixed padding;
    None when all are real. starts: (B,) bool, False where the row continues the same row of the batch before it, so that a
    carried state must be kept; None when every row starts anew.

    A row can be G sequences, such as a pair of documents: ids (B, G, L), with lengths (B, G) that count each one's tokens.
    The model reads all B G sequences alike and its readout joins those of a row, so that no cut through a batch parts them.
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor | None = None
    starts: Tensor | None = None

    @property
    def asked(self) -> Tensor:
        """Which targets count: bool, in the shape of `targets`."""
        return ~self.targets.isnan() if self.targets.is_floating_point() else self.targets != IGNORE

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        move = [
            None if t is None else t.to(device, non_blocking=True)
            for t in (self.inputs, self.targets, self.lengths, self.starts)
        ]
        return Batch(*move)  # type: ignore[arg-type]

    def rows(self, start: int, stop: int) -> Batch:
        """The rows `start` to `stop` of the batch."""
        cut = [None if t is None else t[start:stop] for t in (self.inputs, self.targets, self.lengths, self.starts)]
        return Batch(*cut)  # type: ignore[arg-type]


def several(inputs: Tensor) -> bool:
    """Whether a row of the inputs is several sequences, ids (B, G, L)."""
    return inputs.dim() == 3 and not inputs.is_floating_point()


class Task(Part, folder="tasks"):
    """What is learned. `batch` is a pure function of its arguments and the config's seed: resuming needs no loader state."""

    headline: str = "accuracy"
    """The score that tables show first."""
    higher_is_better: bool = True
    loss_unit: str = "nats a token"
    """Of the training loss."""
    row_name: str = ""
    """What rows are called where rows a second are worth telling: "images"; empty: they are not."""

    def batch(self, split: Split, index: int, size: int) -> Batch:
        """Batch number `index` of `size` rows. Training data repeats in a new order every epoch; other splits end."""
        raise NotImplementedError

    def size(self, split: Split) -> int | None:
        """Rows in a split; None when it never ends. Scoring visits each row once, the last batch may be smaller."""
        raise NotImplementedError

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """name -> (sum, count), so that scores add over batches and machines. `logits`: what the model's readout says."""
        raise NotImplementedError

    def floors(self) -> Mapping[str, float]:
        """What the headline score is on the test split for answers that need no model: {"predict the mean": 0.0}.

        Printed beside every score, so that nobody takes a floor for an achievement. None by default.
        """
        return {}

    def whole_texts(self, split: Split) -> Iterator[Tensor]:
        """Of a text: each document of a split, ids (n,) int64 of which all but the first are targets."""
        raise BadInput(f"the task {type(self).__name__} is no text: it has no documents")

    def bytes_of(self, ids: Tensor) -> Tensor:
        """Of a text: the bytes that each id stands for, int64."""
        raise BadInput(f"the task {type(self).__name__} is no text: its ids stand for no bytes")

    def save(self, folder: Path) -> None:
        """Write what a run needs to be used without the data (a tokenizer). Nothing by default."""

    def report(self, totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Final scores from the summed (sum, count) of all batches: by default each sum over its count."""
        return {name: total / max(count, 1.0) for name, (total, count) in totals.items()}


def accuracy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(hits, count) of argmax over the last axis, where targets are not `IGNORE`."""
    asked = targets != IGNORE
    return ((logits.argmax(-1) == targets) & asked).sum(), asked.sum()


def shuffled_rows(n: int, index: int, size: int, seed: int) -> Tensor:
    """Row numbers of training batch `index`: epoch after epoch, each a permutation of n drawn from (seed, epoch)."""
    if n < 1:
        raise BadInput("a training split needs at least one row")
    rows, start = [], index * size
    while size > 0:
        epoch, offset = divmod(start, n)
        rows.append(_permutation(n, seed, epoch)[offset : offset + size])
        size -= len(rows[-1])
        start += len(rows[-1])
    return torch.cat(rows)


def ordered_rows(n: int, index: int, size: int) -> Tensor:
    """Row numbers of batch `index` of a split that is visited once, in order. The last batch may be smaller."""
    if index * size >= n:
        raise IndexError(f"batch {index} of {size} rows: the split has only {n} rows")
    return torch.arange(index * size, min((index + 1) * size, n))


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    """Kept between calls, since every batch of an epoch asks for the same one."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)
