"""State: what a part remembers of the tokens it has seen.

A state is a frozen dataclass of tensors (or of further states), the batch first in every tensor, so that whatever holds
states can select, reorder, detach and join them without knowing what they mean. A state given to a forward is consumed:
its buffers may be written, and only the state returned may be used again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """What is remembered of the tokens seen. Batch first in every tensor."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same state with `fn` applied to every tensor."""
        return dataclasses.replace(self, **{f.name: _map(getattr(self, f.name), fn) for f in dataclasses.fields(self)})

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state, in the order of its fields."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(note)
        return found

    def reorder(self, rows: Tensor) -> Self:
        """The rows `rows` (int64, any number of them) of the batch, in that order: beam search, dropping finished rows."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def detach(self) -> Self:
        """The same values, cut from the graph: truncated back-propagation."""
        return self.map(Tensor.detach)

    def clone(self) -> Self:
        """A copy that survives the original being consumed."""
        return self.map(Tensor.clone)

    def reset(self, rows: Tensor, fresh: Self) -> Self:
        """The rows where `rows` (B,) is true taken from `fresh`, the others from this state."""
        return type(self).join([self, fresh]).reorder(_pick(rows))

    @property
    def nbytes(self) -> int:
        """Bytes held by the state's tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """One state whose batch is the batches of `states` in order: ragged prompts are prefilled apart, then joined."""
        first = states[0]
        return dataclasses.replace(
            first, **{f.name: _join([getattr(s, f.name) for s in states]) for f in dataclasses.fields(first)}
        )


def _map(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, State):
        return value.map(fn)
    if isinstance(value, tuple):
        return tuple(_map(item, fn) for item in value)
    return value


def _join(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, State):
        return type(first).join(values)
    if isinstance(first, tuple):
        return tuple(_join(list(items)) for items in zip(*values, strict=True))
    return first


def _pick(rows: Tensor) -> Tensor:
    batch = rows.shape[0]
    index = torch.arange(batch, device=rows.device)
    return torch.where(rows, index + batch, index)
