"""Decoding: one token a row at a time, under weights that do not change."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from torch import Tensor

from hippodrome.norms import add_and_norm
from hippodrome.state import State

if TYPE_CHECKING:
    from hippodrome.model import Block, Mixer, Model, ModelState

S = TypeVar("S", bound=State)


class Stepper(Generic[S]):
    """Decoding without gradients and under fixed weights: what follows from the weights alone is computed once.

    Equal to the mixer's `step`. Between steps the state has the form that suits the step: `begin` brings it there and `end`
    back. A step may write its state in place; with fixed room it does so wherever it can, and never waits for the device.
    `position` (B,) int64 is how many tokens each row has seen before the step: it belongs to the caller, who counts it.
    """

    def __init__(self, mixer: Mixer[S]) -> None:
        self.mixer = mixer

    def begin(self, state: S, position: Tensor) -> State:
        """The state in the form between steps; the one given is consumed."""
        return state

    def step(self, x: Tensor, state: Any, position: Tensor) -> tuple[Tensor, State]:
        """One token (B, D) -> (B, D), and the state after it."""
        return self.mixer.step(x, state)

    def end(self, state: Any, position: Tensor) -> S:
        """The mixer's own state again, for chunks."""
        return state

    def traffic(self, state: Any, position: Tensor) -> int:
        """Bytes of the state that a step has to read and write."""
        return 2 * state.nbytes


class ModelStepper:
    """The steppers of a model's mixers, and all else that a step of the model is."""

    def __init__(self, model: Model, mixers: list[Stepper[Any]]) -> None:
        self.model, self.mixers = model, mixers

    def begin(self, state: ModelState) -> ModelState:
        """The state in the form between steps; the one given is consumed."""
        pairs = zip(self.mixers, state.blocks, strict=True)
        return replace(state, blocks=tuple(mixer.begin(block, state.position) for mixer, block in pairs))

    def step(self, inputs: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token a row: ids (B,) or signals (B, C) -> logits (B, V) and the next state."""
        model, after, delta = self.model, [], None
        x = model.embed(inputs.unsqueeze(1), state.position).squeeze(1)
        for block, mixer, before in zip(model.blocks, self.mixers, state.blocks, strict=True):
            x, delta, block_state = cast("Block", block).step(x, delta, before, state.position, mixer)
            after.append(block_state)
        _, normed = add_and_norm(x, delta, model.final_norm)
        logits = model.readout(normed.unsqueeze(1)).squeeze(1)
        return logits, replace(state, position=state.position + 1, blocks=tuple(after))

    def end(self, state: ModelState) -> ModelState:
        """The model's own state again, for chunks."""
        pairs = zip(self.mixers, state.blocks, strict=True)
        return replace(state, blocks=tuple(mixer.end(block, state.position) for mixer, block in pairs))

    def traffic(self, state: ModelState) -> int:
        """Bytes of the state that a step has to read and write."""
        pairs = zip(self.mixers, state.blocks, strict=True)
        return sum(mixer.traffic(block, state.position) for mixer, block in pairs)
