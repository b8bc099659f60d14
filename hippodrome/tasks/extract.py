"""Extract: find the marked lines scattered in a long source and write them out in order, a summary by rule.

    . . 2 c d . . . . 0 a b . . . 1 e f . .   start   a b e f c d   end        (start and end are one id)

A source is random symbols; a line is a mark and the `width` symbols behind it. With `order="number"` each mark is an id of its
own and lines are written by their numbers: look a key up, find it anywhere. With `order="place"` all marks are one id and lines
are written as they come: what comes next depends on how many came before. Sources have any length from `min_length` to
`length`, so that rows of a batch are padded. Rows are drawn anew for ever: a row is a function of the seed, the split and its
number alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hippodrome.part import BadInput
from hippodrome.task import IGNORE, Batch, Split, Task
from hippodrome.tasks._labels import answer_scores

_SPLITS: tuple[Split, ...] = get_args(Split)


class Extract(Task):
    """Inputs and targets (B, L) int64, L what the longest source and its answer take, and lengths (B,).

    `accuracy` is of tokens after the right ones; `solved` is the share of rows without a mistake, which is the share that
    greedy decoding writes exactly.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Task.Config):
        """Ids are the symbols, then the marks, then the one id that parts source and answer and ends the answer."""

        length: int = 256
        """Tokens of the longest source."""
        min_length: int | None = None
        """Tokens of the shortest source; None: half of the longest."""
        lines: int = 4
        width: int = 3
        """Symbols of a line."""
        symbols: int = 32
        order: Literal["number", "place"] = "number"
        test_rows: int = 500
        """Rows of the test split, and of the valid split."""
        seed: int = 0

        @property
        def shortest(self) -> int:
            """Tokens of the shortest source."""
            return self.length // 2 if self.min_length is None else self.min_length

        @property
        def marks(self) -> int:
            """How many ids are marks."""
            return self.lines if self.order == "number" else 1

        @property
        def start(self) -> int:
            """The id between source and answer, and behind it."""
            return self.symbols + self.marks

        def __post_init__(self) -> None:
            for name, least in {"lines": 1, "width": 1, "symbols": 2, "test_rows": 1, "seed": 0}.items():
                if getattr(self, name) < least:
                    raise BadInput(f"{name} is {getattr(self, name)}: it must be at least {least}")
            needed = self.lines * (self.width + 1)
            if not needed <= self.shortest <= self.length:
                allowed = f"from the {needed} that {self.lines} lines take to length {self.length}"
                raise BadInput(f"the shortest source has {self.shortest} tokens: min_length must be {allowed}")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.start + 1

    def batch(self, split: Split, index: int, size: int) -> Batch:
        first, rows = index * size, self.size(split)
        last = first + size if rows is None else min(first + size, rows)
        if first >= last:
            raise IndexError(f"batch {index} of {size} rows: the split has only {rows} rows")
        answer = self.config.lines * self.config.width
        ids = torch.zeros(last - first, self.config.length + answer + 2, dtype=torch.int64)
        targets = torch.full_like(ids, IGNORE)
        lengths = torch.zeros(last - first, dtype=torch.int64)
        for place, number in enumerate(range(first, last)):
            row = torch.from_numpy(self._row(split, number))
            ids[place, : len(row)] = row
            targets[place, len(row) - answer - 1 : len(row)] = row[-answer - 1 :]
            lengths[place] = len(row) - 1
        return Batch(ids[:, :-1].contiguous(), targets[:, 1:].contiguous(), lengths)

    def _row(self, split: Split, number: int) -> np.ndarray:
        """Source, start, answer, end."""
        config = self.config
        die = np.random.default_rng([config.seed, _SPLITS.index(split), number])
        length, taken = int(die.integers(config.shortest, config.length + 1)), config.width + 1
        source = die.integers(config.symbols, size=length)
        # Places of lines that do not overlap are places of single tokens in a source without their bodies.
        free = length - config.lines * config.width
        places = np.sort(die.choice(free, config.lines, replace=False)) + np.arange(config.lines) * config.width
        numbers = die.permutation(config.lines) if config.order == "number" else np.zeros(config.lines, np.int64)
        source[places] = config.symbols + numbers
        bodies = source[places[:, None] + np.arange(1, taken)][np.argsort(numbers, kind="stable")]
        end = [config.start]
        return np.concatenate([source, end, bodies.flatten(), end])

    def size(self, split: Split) -> int | None:
        return None if split == "train" else self.config.test_rows

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Accuracy and cross entropy over the answers' tokens, and the share of rows that are right throughout."""
        return answer_scores(logits, batch.targets)

    def floors(self) -> Mapping[str, float]:
        """Each symbol guessed, and the end in its place, which is always the same."""
        answer = self.config.lines * self.config.width
        return {"guess": (answer / self.config.symbols + 1) / (answer + 1)}
