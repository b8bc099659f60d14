"""The frame of regression tasks: R^2 over a whole split, and what it is without a model.

    R^2 = 1 - sum (y - said)^2 / n / max(Var y, 1e-5)

The variance is that of all numbers asked for in the split, whatever the batches were: (sum, sum of squares, count) add up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hippodrome.task import Batch, Task

LEAST_VARIANCE = 1e-5
_FLOOR_BATCH = 4
"""Rows at a time: those of a million tokens are large."""
_FLOOR_NUMBERS = 1 << 21
"""Targets that a floor is estimated from."""


class _Regression(Task):
    """A task whose targets are numbers (B, L, C). A subclass writes `batch` and `size`."""

    headline = "r2"
    loss_unit = "mean squared error"

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Sums in float64 of squared errors, of targets and of their squares, over the numbers asked for."""
        asked = batch.asked
        count, wanted = asked.sum(), batch.targets.where(asked, 0).double()
        error = (logits.double() - wanted).where(asked, 0)
        return {
            "loss": (error.square().sum(), count),
            "targets": (wanted.sum(), count),
            "squares": (wanted.square().sum(), count),
        }

    def report(self, totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """r2, and loss, the mean squared error."""
        means = super().report(totals)
        variance = max(means["squares"] - means["targets"] ** 2, LEAST_VARIANCE)
        return {"r2": 1 - means["loss"] / variance, "loss": means["loss"]}

    def floors(self) -> Mapping[str, float]:
        """The mean of all targets, and the mean of each position and channel, which knows the task but not the row.

        The second is one minus the variance within positions over that of all, both unbiased: it scatters about zero where
        positions are alike.
        """
        total = self._test_sums()
        if total is None:
            return {"predict the mean": 0.0}
        count, sums, squares = total
        within = (squares - sums.square() / count) / (count - 1)
        everything, mean = count.sum(), sums.sum() / count.sum()
        variance = (squares.sum() - everything * mean**2) / (everything - 1)
        share = within.mean() / variance.clamp(min=LEAST_VARIANCE)
        return {"predict the mean": 0.0, "predict each position's mean": float(1 - share)}

    def _test_sums(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """(count, sum, sum of squares) over rows of each number that is asked for in two rows at least; None: there is none."""
        size, done, sums = self.size("test"), 0, torch.zeros(3, 1, dtype=torch.float64)
        while (size is None or done < size) and int(sums[0].sum()) < _FLOOR_NUMBERS:
            batch = self.batch("test", done // _FLOOR_BATCH, _FLOOR_BATCH)
            wanted = batch.targets.where(batch.asked, 0).double().flatten(1)
            sums = sums + torch.stack([batch.asked.flatten(1).double().sum(0), wanted.sum(0), wanted.square().sum(0)])
            done += len(wanted)
        count, first, second = sums[:, sums[0] >= 2]
        return (count, first, second) if len(count) else None
