"""Attention patterns: which keys a query may see, as small predicates on positions.

`visible` is the definition; everything else (tile maps, masks, how many keys a decoder must keep) follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hippodrome.part import BadInput, Choice


@dataclass(frozen=True)
class Pattern(Choice):
    """Which keys a query may see."""

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Bool, broadcast over integer head numbers, query positions and key positions."""
        raise NotImplementedError

    def count(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
        """How many times each visible key counts in the softmax, an int tensor broadcast as in `visible`; None: once."""
        return None

    @property
    def causal(self) -> bool:
        """Whether no query sees a key after it."""
        return True

    @property
    def reach(self) -> int | None:
        """How many keys, its own included, the farthest-looking query needs; None when there is no bound."""
        return None

    @property
    def moves(self) -> bool:
        """Whether what a query sees depends on distances alone, so that it moves along with the query."""
        return True

    def mask(self, n_q: int, n_k: int, q_start: int = 0, head: int = 0) -> Tensor:
        """The (n_q, n_k) bool mask of queries q_start, q_start + 1, ... against keys 0, 1, ..."""
        q, k = torch.arange(q_start, q_start + n_q), torch.arange(n_k)
        return self.visible(torch.tensor(head), q[:, None], k[None, :]).expand(n_q, n_k)

    def tiles(self, n_q: int, n_k: int, size: int, q_start: int = 0) -> Tensor:
        """Which `size` x `size` tiles hold any visible pair: bool (ceil(n_q/size), ceil(n_k/size))."""
        mask = self.mask(n_q, n_k, q_start)
        mask = torch.nn.functional.pad(mask, (0, -n_k % size, 0, -n_q % size))
        return mask.unflatten(1, (-1, size)).unflatten(0, (-1, size)).any(3).any(1)


@dataclass(frozen=True)
class Full(Pattern):
    """Every query sees every key."""

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q == q) & (k == k)

    @property
    def causal(self) -> bool:
        return False


@dataclass(frozen=True)
class Causal(Pattern):
    """A query sees itself and every key before it."""

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q


@dataclass(frozen=True)
class Window(Pattern):
    """A query sees itself and the `size` - 1 keys before it."""

    size: int = 128

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadInput(f"a window of {self.size} keys sees nothing: size must be at least 1")

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q - k < self.size)

    @property
    def reach(self) -> int | None:
        return self.size


@dataclass(frozen=True)
class Chunk(Pattern):
    """The sequence is cut into chunks of `size` tokens; a query sees itself and the keys before it in its own chunk."""

    size: int = 512

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadInput(f"a chunk of {self.size} keys holds nothing: size must be at least 1")

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q // self.size == k // self.size)

    @property
    def reach(self) -> int | None:
        return self.size

    @property
    def moves(self) -> bool:
        return False
