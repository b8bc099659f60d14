"""What tasks with one right label an answer share: their scores, and the floor of always giving the commonest label."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from hippodrome.task import IGNORE, accuracy


def label_scores(logits: Tensor, targets: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Accuracy, and cross entropy in nats, over the targets asked for. logits (..., classes), targets (...)."""
    nats = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    right, asked = accuracy(logits, targets)
    return {"accuracy": (right, asked), "loss": (nats, asked)}


def commonest(labels: np.ndarray) -> int:
    """How many of the labels (n,), integers of 0 and more, are the commonest one."""
    return int(np.bincount(labels).max(initial=0))


def answer_scores(logits: Tensor, targets: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
    """`label_scores`, and of rows (B, L) with a target the share that is right at all of them, "solved"."""
    asked = targets != IGNORE
    counted = asked.any(-1)
    right = ((logits.argmax(-1) == targets) | ~asked).all(-1) & counted
    return {**label_scores(logits, targets), "solved": (right.sum(), counted.sum())}
