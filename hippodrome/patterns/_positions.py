"""Patterns of positions and distances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hippodrome.part import BadInput
from hippodrome.patterns._pattern import Box, Pattern


@dataclass(frozen=True)
class Full(Pattern):
    """Every query sees every key."""

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q == q) & (k == k)

    def bounds(self, head: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        every = self.visible(head, box.q0, box.k0)
        return every, every

    @property
    def causal(self) -> bool:
        return False


@dataclass(frozen=True)
class Causal(Pattern):
    """A query sees itself and every key before it."""

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def bounds(self, head: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        return box.k0 <= box.q1, box.k1 <= box.q0


@dataclass(frozen=True)
class Window(Pattern):
    """A query sees itself, the `size` - 1 keys before it and the `right` keys after it."""

    size: int = 128
    right: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise BadInput(f"a window of {self.size} keys sees nothing: size must be at least 1")
        if self.right < 0:
            raise BadInput(f"a window that looks {self.right} keys ahead: right must be at least 0")

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q + self.right) & (q - k < self.size)

    def bounds(self, head: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        nearest, farthest = box.q0 - box.k1, box.q1 - box.k0
        some = (nearest < self.size) & (farthest >= -self.right)
        return some, (farthest < self.size) & (nearest >= -self.right)

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def reach(self) -> int | None:
        return self.size


@dataclass(frozen=True)
class Global(Pattern):
    """The first `size` tokens see all and are seen by all; any other sees those and itself."""

    size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise BadInput(f"{self.size} global tokens: size must be at least 1")

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q < self.size) | (k < self.size) | (q == k)

    def bounds(self, head: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        some = (box.q0 < self.size) | (box.k0 < self.size) | ((box.q0 <= box.k1) & (box.k0 <= box.q1))
        q0, k0 = box.q0.clamp(min=self.size), box.k0.clamp(min=self.size)
        return some, (box.q1 < self.size) | (box.k1 < self.size) | ((q0 == box.q1) & (k0 == box.k1) & (q0 == k0))

    @property
    def causal(self) -> bool:
        return False

    @property
    def moves(self) -> bool:
        return False


@dataclass(frozen=True)
class Prefix(Pattern):
    """The first `size` tokens are seen by all, whatever comes after sees itself and what is before it."""

    size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise BadInput(f"a prefix of {self.size} tokens: size must be at least 1")

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < self.size) | (k <= q)

    def bounds(self, head: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        return (box.k0 < self.size) | (box.k0 <= box.q1), (box.k1 < self.size) | (box.k1 <= box.q0)

    @property
    def causal(self) -> bool:
        return self.size == 1

    @property
    def moves(self) -> bool:
        return self.size == 1


@dataclass(frozen=True)
class Strided(Pattern):
    """A query sees itself and every `stride`-th key before and after it (Child et al., 2019: with `& Causal()`)."""

    stride: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise BadInput(f"a stride of {self.stride} keys: stride must be at least 1")

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k) % self.stride == 0

    def bounds(self, head: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        nearest, farthest = box.q0 - box.k1, box.q1 - box.k0
        last = farthest - farthest % self.stride
        return last >= nearest, (last == nearest) & (farthest == nearest) | (self.stride == 1)

    @property
    def causal(self) -> bool:
        return False


@dataclass(frozen=True)
class Documents(Pattern):
    """Tokens see those of their own document: the first of `lengths` tokens, the next, ...; what follows them is one more."""

    lengths: tuple[int, ...] = (512, 512)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lengths or min(self.lengths) < 1:
            raise BadInput(f"documents of {self.lengths} tokens: there must be a document, and each needs at least 1 token")

    def _document(self, position: Tensor) -> Tensor:
        ends = torch.tensor(self.lengths, device=position.device).cumsum(0)
        return torch.bucketize(position.contiguous(), ends, right=True)

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self._document(q) == self._document(k)

    def bounds(self, head: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        q0, q1, k0, k1 = (self._document(edge) for edge in box)
        return (q0 <= k1) & (k0 <= q1), (q0 == q1) & (k0 == k1) & (q0 == k0)

    @property
    def causal(self) -> bool:
        return False

    @property
    def moves(self) -> bool:
        return False
