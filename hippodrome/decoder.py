"""The rows that are being written: draw a token for each, keep those that go on, feed them what was drawn.

On a CPU rows that have ended leave the batch; a CUDA graph replays all rows of the start, and greedy ids stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hippodrome.cuda_graph import GraphedDecode
from hippodrome.model import ModelState
from hippodrome.part import BadInput
from hippodrome.sampling import NOT_FINITE, Sampling, draw
from hippodrome.stepper import ModelStepper


@dataclass(frozen=True)
class How:
    """The settings of one call."""

    sampling: Sampling
    vocab_size: int | None
    prefill_chunk: int
    cuda_graph: bool
    state_dtype: torch.dtype | None


class Decoder:
    """The rows that are still being written. Each step: draw, keep those that go on, feed them their tokens."""

    def draw(self) -> list[int]:
        """The next token of each row."""
        raise NotImplementedError

    def keep(self, slots: list[int]) -> None:
        """Go on with these of the rows alone."""
        raise NotImplementedError

    def feed(self, tokens: list[int]) -> None:
        """Step with these tokens, as many as there are rows."""
        raise NotImplementedError


class EagerDecoder(Decoder):
    """Draws on the host; rows that have ended leave the batch."""

    def __init__(self, stepper: ModelStepper, state: ModelState, logits: Tensor, seen: Tensor | None, how: How) -> None:
        self.stepper, self.state, self.logits, self.seen = stepper, state, logits, seen
        self.sampling, self.vocab_size = how.sampling, how.vocab_size
        self.dice = [torch.Generator().manual_seed(how.sampling.seed + row) for row in range(len(logits))]

    def draw(self) -> list[int]:
        return draw(self.logits[:, : self.vocab_size], self.sampling, self.seen, self.dice)

    def keep(self, slots: list[int]) -> None:
        self.state = self.state.reorder(torch.tensor(slots))
        self._keep_draws(slots)

    def feed(self, tokens: list[int]) -> None:
        chosen = self._chosen(tokens)
        with torch.no_grad():
            self.logits, self.state = self.stepper.step(chosen, self.state)

    def _keep_draws(self, slots: list[int]) -> None:
        self.seen = None if self.seen is None else self.seen[slots]
        self.dice = [self.dice[slot] for slot in slots]

    def _chosen(self, tokens: list[int]) -> Tensor:
        chosen = torch.tensor(tokens, device=self.logits.device)
        if self.seen is not None:
            self.seen = self.seen.scatter(1, chosen[:, None], True)
        return chosen


class GraphDecoder(EagerDecoder):
    """Draws on the host, steps by a graph over all rows of the start."""

    def __init__(self, stepper: ModelStepper, state: ModelState, logits: Tensor, seen: Tensor | None, how: How) -> None:
        super().__init__(stepper, state, logits, seen, how)
        self.rows = torch.arange(len(logits), device=logits.device)
        self.graph = GraphedDecode(stepper, state, torch.zeros_like(self.rows))

    def keep(self, slots: list[int]) -> None:
        self.rows = self.rows[slots]
        self._keep_draws(slots)

    def feed(self, tokens: list[int]) -> None:
        self.graph.tokens[self.rows] = self._chosen(tokens)
        self.logits = self.graph()[self.rows]


class GreedyGraphDecoder(Decoder):
    """The likeliest token is found and fed on the device, which is a step ahead while the host reads ids."""

    def __init__(self, stepper: ModelStepper, state: ModelState, logits: Tensor, steps: int) -> None:
        self.vocab_size, self.steps = logits.shape[1], steps
        self.rows = list(range(len(logits)))
        self.said = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        self.read = torch.empty(len(logits), dtype=torch.int64, pin_memory=logits.is_cuda)
        self.graph = GraphedDecode(stepper, state, self._choose(logits), self._choose)

    def draw(self) -> list[int]:
        self.read.copy_(self.said, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.said.device))
        if self.steps:
            self.steps -= 1
            self.graph()
        done.synchronize()
        everyone = self.read.tolist()
        tokens = [everyone[row] for row in self.rows]
        if min(tokens) < 0:
            raise BadInput(NOT_FINITE)
        return tokens

    def keep(self, slots: list[int]) -> None:
        self.rows = [self.rows[slot] for slot in slots]

    def feed(self, tokens: list[int]) -> None:
        pass

    def _choose(self, logits: Tensor) -> Tensor:
        """The ids to feed; what is said is -1 where the logits are not finite."""
        best, at = logits[:, : self.vocab_size].max(-1)
        self.said.copy_(torch.where(best.isfinite(), at, -1))
        return self.said.clamp(min=0)
