"""One optimiser step: micro-batches, gradient accumulation, processes, carried states."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hippodrome import devices
from hippodrome.cuda_graph import GraphedStep
from hippodrome.model import Model, ModelState
from hippodrome.run import TrainConfig
from hippodrome.task import Batch, Task, several


def micro_batch(settings: TrainConfig) -> int:
    """Rows of one forward in one process."""
    return settings.micro_batch or settings.batch_size // devices.world()


def seed_place(seed: int, step: int, part: int) -> None:
    """Seed every global generator from a place in the run. Step 0 is the building of the model."""
    digest = hashlib.blake2b(f"{seed}/{step}/{part}".encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "little")
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


class Step:
    """One optimiser step: draw its micro-batches, forward and backward through each, clip, update.

    Micro-batch j of a step is the same whatever the number of processes; process r takes j = r, r + world and so on.
    The loss of the step is the mean over the targets of the whole batch, so how it is cut up changes nothing.
    """

    def __init__(
        self, settings: TrainConfig, task: Task, model: Model, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.settings, self.task, self.model, self.optimizer, self.device = settings, task, model, optimizer, device
        self.micro = micro_batch(settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self._states: dict[int, ModelState] = {}
        self._tokens = 0
        self._graph: GraphedStep | None = None
        loss: Any = _LossOf(model)
        if settings.compile:
            loss = torch.compile(loss)
        if devices.world() > 1:
            loss = nn.parallel.DistributedDataParallel(loss, broadcast_buffers=False)
        self._loss = loss

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Take step number `step` (from 0): its mean loss and gradient norm, on the device."""
        batches = dict(self._draw(step))
        self._tokens += sum(_count_tokens(batch) for batch in batches.values())
        if self.settings.cuda_graph:
            (batch,) = batches.values()
            if self._graph is None:
                self._graph = GraphedStep(self._whole, batch, self.model, self.optimizer, self.device)
            seed_place(self.settings.seed, step + 1, 0)
            return self._graph(batch)

        asked = {j: batch.asked.sum() for j, batch in batches.items()}
        everywhere = devices.summed(torch.stack(list(asked.values())).sum().to(self.device)).clamp(min=1)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for j, batch in batches.items():
            seed_place(self.settings.seed, step + 1, j)
            share = asked[j].to(self.device) / everywhere
            with self._loss.no_sync() if devices.world() > 1 and j != max(batches) else nullcontext():
                total += self._backward(batch, share, j)
        devices.summed(total)
        return total, self._update()

    def _draw(self, step: int) -> Iterator[tuple[int, Batch]]:
        """This process's micro-batches and their numbers."""
        count = self.settings.batch_size // self.micro
        # Rows that continue must be the same rows of every batch: such a batch is drawn whole and cut.
        whole = self.task.batch("train", step, self.settings.batch_size) if self.settings.carry_state else None
        for j in range(devices.rank(), count, devices.world()):
            if whole is not None:
                yield j, whole.rows(j * self.micro, (j + 1) * self.micro)
            else:
                yield j, self.task.batch("train", step * count + j, self.micro)

    def _backward(self, batch: Batch, share: Tensor | float, j: int) -> Tensor:
        """Add a micro-batch's gradient; return its share of the step's loss."""
        state = self._state_before(j, batch) if self.settings.carry_state else None
        with devices.autocast(self.device, self.settings.precision):
            loss, state = self._loss(batch.to(self.device), state)
        if state is not None:
            self._states[j] = state.detach()
        loss = loss * share
        # DDP takes the mean over the processes, the shares already add up to one.
        self.scaler.scale(loss * devices.world()).backward()
        return loss.detach()

    def _update(self) -> Tensor:
        """Clip and update; return the norm of the gradient before."""
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.settings.clip is None else self.settings.clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def _whole(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The step on one batch that is already on the device, without anything that waits for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        return self._backward(batch, 1.0, 0), self._update()

    def _state_before(self, j: int, batch: Batch) -> ModelState:
        """What the rows remember of the batch before; nothing where a row starts anew."""
        assert batch.starts is not None
        before, fresh = self._states.get(j), self.model.init_state(len(batch.inputs))
        # Also where no row starts: data-parallel training waits for the gradient of a start that is learned.
        return fresh if before is None else before.reset(batch.starts.to(self.device), fresh)

    def take_tokens(self) -> int:
        """Tokens this process has read since the last call."""
        tokens, self._tokens = self._tokens, 0
        return tokens

    def carried(self) -> dict[str, Tensor]:
        """The states that go on to the next step, of all processes, as tensors named by micro-batch and place."""
        mine = {
            f"{j}/{i}": tensor.to("cpu", copy=True)
            for j, state in self._states.items()
            for i, tensor in enumerate(state.tensors())
        }
        return {name: tensor for part in devices.gathered(mine) for name, tensor in part.items()}

    def restore(self, scaler: dict[str, Any], carried: Mapping[str, Tensor]) -> None:
        """Take up what `carried` and the scaler's `state_dict` gave."""
        self.scaler.load_state_dict(scaler)
        count = self.settings.batch_size // self.micro
        for j in range(devices.rank(), count, devices.world()):
            held = [carried[name] for i in range(len(carried)) if (name := f"{j}/{i}") in carried]
            if held:
                self._states[j] = _refilled(self.model.init_state(self.micro), held)


class _LossOf(nn.Module):
    """A model's loss as a forward, which is what DDP and torch.compile wrap."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState | None]:
        loss = self.model.loss(batch, state)
        return loss.total, loss.state


def _refilled(state: ModelState, tensors: Sequence[Tensor]) -> ModelState:
    """A state with these tensors, given in the order of its `tensors`, in place of its own."""
    left = iter(tensors)

    def take(old: Tensor) -> Tensor:
        return next(left).to(old.device)

    return state.map(take)


def _count_tokens(batch: Batch) -> int:
    if batch.lengths is None:
        return batch.inputs.numel() if several(batch.inputs) else batch.inputs.shape[0] * batch.inputs.shape[1]
    spans = batch.lengths.dim() == 2 and not several(batch.inputs)
    return int((batch.lengths[:, 1] - batch.lengths[:, 0] if spans else batch.lengths).sum())
