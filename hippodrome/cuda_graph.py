"""A training or decoding step replayed as one CUDA graph: where launching kernels takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hippodrome.model import ModelState
from hippodrome.part import BadInput
from hippodrome.stepper import ModelStepper
from hippodrome.task import Batch

_WARMUP = 3


class GraphedStep:
    """`step(batch) -> (loss, grad norm)` captured once and replayed on every batch after.

    `step` must do all of forward, backward, clipping and update, with an optimiser made `capturable`, and must never wait
    for the device. The steps that warm it up leave no trace: parameters, buffers and the optimiser's memory are put back.
    Results lie in fixed memory on the device; they are copied out, so that they may be read later.
    """

    def __init__(
        self,
        step: Callable[[Batch], tuple[Tensor, Tensor]],
        batch: Batch,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        self._batch = batch.to(device)
        held = [*model.parameters(), *model.buffers()]
        before = [tensor.detach().clone() for tensor in held]
        memory = {
            parameter: {name: value.clone() for name, value in slots.items()} for parameter, slots in optimizer.state.items()
        }

        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                step(self._batch)
        torch.cuda.current_stream(device).wait_stream(side)
        # Without gradients from before, the captured backward makes its own, at addresses that the graph keeps.
        optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = step(self._batch)

        # In place: the graph knows every tensor by its address. A slot that warm-up made begins at zero, as AdamW's do.
        with torch.no_grad():
            for tensor, value in zip(held, before, strict=True):
                tensor.copy_(value)
            for parameter, slots in optimizer.state.items():
                for name, value in slots.items():
                    old = memory.get(parameter, {}).get(name)
                    value.copy_(torch.zeros_like(value) if old is None else old)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm of one step on a batch shaped like the first; the host does not wait."""
        for name in ("inputs", "targets", "lengths"):
            held, new = getattr(self._batch, name), getattr(batch, name)
            if (held is None) != (new is None) or (held is not None and held.shape != new.shape):
                raise BadInput(f"cuda_graph needs batches of one shape, and the {name} of this one differ from the first's")
            if held is not None:
                held.copy_(new, non_blocking=True)
        self._graph.replay()
        loss, norm = self._results
        return loss.clone(), norm.clone()


class GraphedDecode:
    """The decoding steps of a batch: ids, states and logits lie in fixed memory, and a step is one launch.

    The first call steps as it is and thereby warms up what a capture must find ready, the second captures, and from then on
    steps are replayed. `tokens` (B,) int64 are the ids that the next call feeds: write into it, or give `choose`, logits
    (B, V) to ids (B,) on the device, and each call leaves the next ids there. No mixer's state may grow.
    """

    def __init__(
        self,
        stepper: ModelStepper,
        state: ModelState,
        tokens: Tensor,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.state, self.tokens = state, tokens.clone()
        self._stepper, self._choose = stepper, choose
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Logits (B, V) after `tokens`; the next call overwrites them."""
        with torch.cuda.device_of(self.tokens):
            return self._next()

    def _next(self) -> Tensor:
        if not self._warm:
            self._warm = True
            return self._step()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._step()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _step(self) -> Tensor:
        logits, after = self._stepper.step(self.tokens, self.state)
        for held, new in zip(self.state.tensors(), after.tensors(), strict=True):
            if held.shape != new.shape:
                raise BadInput(
                    f"a state grew from {tuple(held.shape)} to {tuple(new.shape)}: a CUDA graph needs a fixed max_len"
                )
            if held.data_ptr() != new.data_ptr():
                held.copy_(new)
        if self._choose is not None:
            self.tokens.copy_(self._choose(logits))
        return logits
