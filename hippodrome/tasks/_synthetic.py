"""The frame of the synthetic languages: rows drawn as the H3 authors drew them, and a task over the three splits.

A language says how one sequence is drawn; everything else is here. One NumPy generator serves the splits in the order
train, test, valid. A split draws all its rows, sorts them and drops duplicates, draws replacements one at a time until it
is full again, and shuffles. Duplicates are removed inside a split, not between splits. Inputs are seq[:-1], targets
seq[1:]; training asks for every position, the other splits for the last one only.

Source: the data module `synthetics.py` of HazyResearch/safari, whose sequences these equal byte for byte; it has no valid
split, ours is drawn after theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hippodrome.part import BadInput
from hippodrome.task import IGNORE, Batch, Split, Task, ordered_rows, shuffled_rows
from hippodrome.tasks._labels import label_scores

Draw = Callable[[np.random.Generator], tuple[int, ...]]

_ATTEMPTS_PER_ROW = 200


def draw_split(draw: Draw, count: int, rng: np.random.Generator) -> Tensor:
    """`count` different sequences (count, L + 1) int64 in dataset order."""
    rows = sorted({draw(rng) for _ in range(count)})
    present = set(rows)
    attempts = _ATTEMPTS_PER_ROW * count
    while len(rows) < count:
        row = draw(rng)
        attempts -= 1
        if row not in present:
            present.add(row)
            rows.append(row)
        elif attempts < 0:
            raise BadInput(
                f"{count} different sequences are asked for and only {len(rows)} found: "
                "ask for fewer rows, longer sequences or more tokens"
            )
    rng.shuffle(rows)
    return torch.from_numpy(np.array(rows, dtype=np.int64))


class _Synthetic(Task):
    """A task over sequences of one language. A subclass writes `draw`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Task.Config):
        """Ids are 0 "." (never drawn), 1 to V - 2 the ordinary tokens, V - 1 "=>"."""

        vocab_size: int = 20
        length: int = 30
        """Drawn tokens before the question."""
        train_rows: int = 5000
        test_rows: int = 500
        """Rows of the test split, and of the valid split."""
        seed: int = 0
        """Draws the sequences and their order in training."""

        def __post_init__(self) -> None:
            smallest = {"vocab_size": 4, "length": 3, "train_rows": 1, "test_rows": 1, "seed": 0}
            for name, least in smallest.items():
                if getattr(self, name) < least:
                    raise BadInput(f"{name} is {getattr(self, name)}: it must be at least {least}")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self._rows: dict[str, Tensor] | None = None

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """One sequence, the answer last."""
        raise NotImplementedError

    def rows(self, split: Split) -> Tensor:
        """All sequences of a split (rows, L + 1) int64, in dataset order. Drawn once, at the first call."""
        if self._rows is None:
            rng = np.random.default_rng(self.config.seed)
            counts = {"train": self.config.train_rows, "test": self.config.test_rows, "valid": self.config.test_rows}
            self._rows = {name: draw_split(self.draw, count, rng) for name, count in counts.items()}
        return self._rows[split]

    def batch(self, split: Split, index: int, size: int) -> Batch:
        """Ids (B, L) and targets (B, L) int64."""
        rows = self.rows(split)
        if split == "train":
            rows = rows[shuffled_rows(len(rows), index, size, self.config.seed)]
            return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        rows = rows[ordered_rows(len(rows), index, size)]
        targets = torch.full_like(rows[:, 1:], IGNORE)
        targets[:, -1] = rows[:, -1]
        return Batch(rows[:, :-1].contiguous(), targets)

    def size(self, split: Split) -> int:
        return self.config.train_rows if split == "train" else self.config.test_rows

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Accuracy and cross entropy over the targets asked for."""
        return label_scores(logits, batch.targets)
