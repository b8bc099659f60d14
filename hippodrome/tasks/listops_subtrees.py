"""ListOpsSubTrees (Gupta, Mehta, Berant, 2022: DLR): what does every sub-tree of a long tree come to?

    [MAX 4 [MIN 2 3 ] 1 ]        the target is IGNORE everywhere but at the closing brackets: here 2 and 4
                    2   4

ListOps trees of depth 15 at most with 2 to 9 arguments, between 7000 and 8180 tokens long, 7530 on average. Sub-trees of height
1 and 2 are two thirds of all, and easy: accuracy is also told by height (of a digit: 0) and over all heights above 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hippodrome.task import IGNORE, Batch, Split
from hippodrome.tasks._labels import commonest, label_scores
from hippodrome.tasks._listops import CLOSE, OPERATOR, Trees, _TreeTask
from hippodrome.tasks._rows import padded

EASY = 2
"""The height up to which the answer lies near its bracket."""


class ListOpsSubTrees(_TreeTask):
    """Ten-way classification of closing brackets. Inputs and targets (B, max_length) int64, padded on the right."""

    @dataclass(frozen=True, kw_only=True)
    class Config(_TreeTask.Config):
        """The published setting, ListOpsSubTrees-8K."""

        max_depth: int = 15
        max_args: int = 9
        min_length: int = 7000
        max_length: int = 8180

    def batch(self, split: Split, index: int, size: int) -> Batch:
        return self._batch(self.trees(split), self.rows(split, index, size))

    def _batch(self, trees: Trees, rows: list[int]) -> Batch:
        ids, lengths = padded(trees.tokens, trees.ends, rows, self.config.max_length)
        targets = np.full_like(ids, IGNORE)
        targets[ids == CLOSE] = np.concatenate([trees.values[trees.closed[row] : trees.closed[row + 1]] for row in rows])
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(lengths))

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Accuracy and cross entropy over all sub-trees; accuracy above height 2 and at every height."""
        height, asked = heights(batch.inputs), batch.targets != IGNORE
        right = (logits.argmax(-1) == batch.targets) & asked

        def share(of: Tensor) -> tuple[Tensor, Tensor]:
            return (right & of).sum(), (asked & of).sum()

        # A tree of depth d, whose root has depth 1, is d - 1 high.
        by_height = {f"height_{h}": share(height == h) for h in range(1, self.config.max_depth)}
        return {**label_scores(logits, batch.targets), "above_height_2": share(height > EASY), **by_height}

    def report(self, totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Scores of the heights that there are."""
        return super().report({name: pair for name, pair in totals.items() if pair[1]})

    def floors(self) -> Mapping[str, float]:
        """The commonest value in the test split; and heights 1 and 2 without a mistake, all others wrong."""
        trees, easy = self.trees("test"), 0
        for start in range(0, len(trees), 50):
            height = heights(self._batch(trees, list(range(start, min(start + 50, len(trees))))).inputs)
            easy += int(((height > 0) & (height <= EASY)).sum())
        return {
            "majority class": commonest(trees.values) / len(trees.values),
            "heights 1 and 2 alone": easy / len(trees.values),
        }


def heights(inputs: Tensor) -> Tensor:
    """Height of the sub-tree that each closing bracket closes, of ids (B, L); 0 at every other token. On any device.

    Depths are taken from the deepest up: a sub-tree is one higher than the highest of those at the next depth that close
    before it and after the one before it.
    """
    ids = inputs.flatten()
    closes = ids == CLOSE
    opens = (ids >= OPERATOR) & (ids < CLOSE)
    # Every row is a whole tree, so that the count is zero again at its end.
    depth = (opens.long() - closes.long()).cumsum(0) + closes.long()
    height = torch.zeros_like(ids)
    for level in range(int(depth.max()) if len(depth) else 0, 0, -1):
        here, below = closes & (depth == level), closes & (depth == level + 1)
        earlier = here.long().cumsum(0) - here.long()
        highest = height.new_zeros(int(here.sum()) + 1).scatter_reduce(0, earlier[below], height[below], "amax")
        height[here] = 1 + highest[:-1]
    return height.view_as(inputs)
