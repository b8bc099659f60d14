"""Mirror copy: n random symbols, then the same backwards (Hawthorne et al., 2022, the copy task of Perceiver AR).

    x_1 ... x_n  ->  x_n ... x_1  end

A row is 2n + 1 tokens; inputs are all but the last, targets all but the first. Asked are the mirrored symbols and the end, so
that a model must reach back by 1 to 2n - 1 tokens. Rows are drawn anew for ever: a row is a function of the seed, the split
and its number alone.

Attention finds one place of 2n the slower the more there are, so training may begin with short rows, which grow. Their middle
stays where it is, and with it which places mirror each other: a row of m < n symbols has its end repeated on both sides.

    end ... end  x_1 ... x_m  ->  x_m ... x_1  end ... end
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from hippodrome.part import BadInput
from hippodrome.task import IGNORE, Batch, Split, Task
from hippodrome.tasks._labels import answer_scores

_SPLITS: tuple[Split, ...] = get_args(Split)
_FIRST = 16
"""Symbols of the first row where rows grow."""


class MirrorCopy(Task):
    """Inputs and targets (B, 2n) int64. `solved` is the share of rows without a mistake."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Task.Config):
        """Ids 0 to V - 2 are symbols, V - 1 is the end."""

        length: int = 32
        """Inputs of a row, 2n: even."""
        vocab_size: int = 257
        test_rows: int = 200
        """Rows of the test split, and of the valid split."""
        grow: int = 0
        """Training rows over which m grows from 16 to n, by equal factors; 0: it is n from the start."""
        seed: int = 0

        def __post_init__(self) -> None:
            for name, least in {"length": 2, "vocab_size": 3, "test_rows": 1, "grow": 0, "seed": 0}.items():
                if getattr(self, name) < least:
                    raise BadInput(f"{name} is {getattr(self, name)}: it must be at least {least}")
            if self.length % 2:
                raise BadInput(f"length is {self.length}: it must be even, take {self.length + 1}")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size

    def batch(self, split: Split, index: int, size: int) -> Batch:
        first, rows = index * size, self.size(split)
        last = first + size if rows is None else min(first + size, rows)
        if first >= last:
            raise IndexError(f"batch {index} of {size} rows: the split has only {rows} rows")
        half, end = self.config.length // 2, self.config.vocab_size - 1
        dice = [np.random.default_rng([self.config.seed, _SPLITS.index(split), row]) for row in range(first, last)]
        drawn = torch.from_numpy(np.stack([die.integers(end, size=half) for die in dice]))
        rows_of = torch.cat([drawn, drawn.flip(1), torch.full((len(drawn), 1), end)], 1)
        targets = rows_of[:, 1:].clone()
        targets[:, : half - 1] = IGNORE
        if split == "train" and first < self.config.grow:
            drawn_of = torch.tensor([self._symbols(row) for row in range(first, last)])[:, None]
            at = torch.arange(2 * half + 1) - half
            rows_of = rows_of.where((at >= -drawn_of) & (at < drawn_of), end)
            targets = rows_of[:, 1:].where((at[1:] >= 0) & (at[1:] <= drawn_of), IGNORE)
        return Batch(rows_of[:, :-1].contiguous(), targets)

    def _symbols(self, row: int) -> int:
        """How many symbols the training row has."""
        half = self.config.length // 2
        first = min(_FIRST, half)
        return half if row >= self.config.grow else round(first * (half / first) ** (row / self.config.grow))

    def size(self, split: Split) -> int | None:
        return None if split == "train" else self.config.test_rows

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Accuracy and cross entropy over the targets asked for, and the share of rows that are right throughout."""
        return answer_scores(logits, batch.targets)

    def floors(self) -> Mapping[str, float]:
        """A guess of each symbol and the end in its place; beside it, the last drawn symbol said again, as it always is."""
        half, symbols = self.config.length // 2, self.config.vocab_size - 1
        guess = 1 / symbols
        return {"guess": (half * guess + 1) / (half + 1), "repeat one, guess": (1 + (half - 1) * guess + 1) / (half + 1)}
