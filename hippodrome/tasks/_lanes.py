"""Documents read side by side, for training with a carried state: which one a row reads, and how far it is in it."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence

from hippodrome.task import shuffled_rows


class SideBySide:
    """Lanes that read documents, each from its start to its end: one that is done takes the next that none has begun.

    Documents come in a new order every epoch, without a pause between epochs. What a lane reads in a turn follows from the
    arguments alone; asked for a later turn than ever before, the turns up to it are dealt out first.
    """

    def __init__(self, turns: Sequence[int], lanes: int, seed: int) -> None:
        """turns: how many each document takes, at least 1."""
        self._turns, self._seed, self._dealt = turns, seed, 0
        # Of each lane the documents it was dealt, and the turns in which it begins them.
        self._documents: list[list[int]] = [[] for _ in range(lanes)]
        self._begins: list[list[int]] = [[] for _ in range(lanes)]
        self._free = [(0, lane) for lane in range(lanes)]

    def at(self, lane: int, turn: int) -> tuple[int, int]:
        """The document that a lane reads in a turn, and how many turns it has spent on it before."""
        while self._free[0][0] <= turn:
            self._deal()
        place = bisect_right(self._begins[lane], turn) - 1
        return self._documents[lane][place], turn - self._begins[lane][place]

    def _deal(self) -> None:
        """The next document to the lane that is free first, the first of several."""
        turn, lane = self._free[0]
        document = int(shuffled_rows(len(self._turns), self._dealt, 1, self._seed))
        self._documents[lane].append(document)
        self._begins[lane].append(turn)
        self._dealt += 1
        heapq.heapreplace(self._free, (turn + self._turns[document], lane))
