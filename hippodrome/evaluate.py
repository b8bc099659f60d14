"""Score a model on a split of a task."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hippodrome import devices
from hippodrome.model import Model
from hippodrome.part import BadInput
from hippodrome.task import Batch, Split, Task

Totals = dict[str, tuple[float, float]]

_LOGITS = {"cpu": 2**26, "cuda": 2**29}
"""Logits held at once, in numbers."""


def evaluate(
    model: Model,
    task: Task,
    split: Split,
    *,
    batch_size: int = 32,
    max_batches: int | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The task's final scores of a model, over the whole split or its first `max_batches` batches.

    `device` moves the model, None leaves it where it is. Under torchrun each process scores its share of the batches and
    all return the scores of the whole. `on_batch(done, all)` is called after each of this process's batches. The model
    comes back in the mode it was in. Raises `BadInput` for a split that never ends when `max_batches` is None.
    """
    if device is not None:
        model.to(devices.choose_device(device))
    where = next(model.parameters()).device
    mine = range(_count_batches(task, split, batch_size, max_batches))[devices.rank() :: devices.world()]
    totals: Totals = {}
    # A first row alone says how many fit: all logits of long rows and a large vocabulary would not.
    rows = 1
    training = model.training
    model.eval()
    try:
        # Not inference_mode: a table that an op makes and keeps here may be needed by a backward later.
        with torch.no_grad(), devices.autocast(where, precision):
            for done, index in enumerate(mine, start=1):
                batch = task.batch(split, index, batch_size)
                start = 0
                while start < len(batch.inputs):
                    scores, row = _score(model, task, batch.rows(start, start + rows).to(where))
                    _add(totals, scores)
                    start, rows = start + rows, max(1, _LOGITS.get(where.type, _LOGITS["cpu"]) // row)
                if on_batch is not None:
                    on_batch(done, len(mine))
    finally:
        model.train(training)
    merged: Totals = {}
    for part in devices.gathered(totals):
        _add(merged, part)
    return task.report(merged)


def _count_batches(task: Task, split: Split, batch_size: int, max_batches: int | None) -> int:
    if batch_size < 1 or (max_batches is not None and max_batches < 1):
        raise BadInput(f"batch_size {batch_size} and max_batches {max_batches} must be at least 1")
    size = task.size(split)
    if size is None:
        if max_batches is None:
            raise BadInput(f"the {split} split of {type(task).__name__} never ends: say how many batches to score")
        return max_batches
    batches = math.ceil(size / batch_size)
    return batches if max_batches is None else min(batches, max_batches)


def _score(model: Model, task: Task, batch: Batch) -> tuple[Totals, int]:
    """(sum, count) by name of some rows, and how many numbers the logits of one row are."""
    logits: Tensor = model(batch.inputs, lengths=batch.lengths).logits
    scores = task.score(logits, batch)
    return {name: (float(total), float(count)) for name, (total, count) in scores.items()}, logits[:1].numel()


def _add(totals: Totals, more: Totals) -> None:
    for name, (total, count) in more.items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = before[0] + total, before[1] + count
