"""Rows of unequal length, kept one after the other in one array of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def padded(
    data: np.ndarray, ends: np.ndarray, rows: Sequence[int], width: int | None = None, *, shift: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (B, width) int64 of some rows, cut or padded with 0, and their lengths (B,) int64.

    Row n is data[ends[n] : ends[n + 1]], uint8; `shift` is added to what is no padding. width None: that of the longest.
    """
    lengths = np.array([ends[row + 1] - ends[row] for row in rows], np.int64)
    width = int(lengths.max(initial=1)) if width is None else width
    lengths = np.minimum(lengths, width)
    ids = np.zeros((len(rows), width), np.int64)
    for place, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
        start = ends[row]
        np.add(data[start : start + length], shift, out=ids[place, :length], dtype=np.int64)
    return ids, lengths
