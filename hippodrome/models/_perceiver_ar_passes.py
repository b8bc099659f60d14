"""Perceiver AR's passes: which of them scores a position, and what is remembered between chunks and between tokens.

The protocol is that of `perceiver_ar.py`: N latents, stride S, and S = 0 for latents that roll.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hippodrome.mixers.attention import AttentionState
from hippodrome.model import Aux, ModelState, ModelStepper, _left_align
from hippodrome.models._perceiver_ar_latents import Context, Latents, taken
from hippodrome.state import State


@dataclass(frozen=True)
class PerceiverState(ModelState):
    """cross: keys and values of every token seen, for each cross-attention. recent (B, N, E): the last N tokens embedded, the
    newest last.

    `blocks` are the states of the latents of the newest pass.
    """

    cross: tuple[AttentionState, ...]
    recent: Tensor


class Passes(Latents):
    """Whole rows, chunks, prompts and steps, which agree."""

    stride: int

    def init_state(self, batch: int, max_len: int | None = None) -> PerceiverState:
        weight = self.latent_proj.weight
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        shape = batch, self.cross.n_head, max_len or 0, self.cross.d_head
        cross = tuple(
            AttentionState(weight.new_zeros(shape), weight.new_zeros(shape), position, None, max_len is not None)
            for _ in self._crosses
        )
        recent = weight.new_zeros(batch, self.latents, self.config.width)
        return PerceiverState(position, self._fresh(batch), cross, recent)

    def prefill(self, inputs: Tensor, state: ModelState, *, lengths: Tensor | None = None) -> tuple[Tensor, ModelState]:
        if lengths is not None and lengths.dim() == 2:
            inputs, lengths = _left_align(inputs, lengths)[0], lengths[:, 1] - lengths[:, 0]
        before = cast(PerceiverState, state)
        window, grown = self._grown(inputs, before, lengths)
        newest = (grown.position - 1).clamp(min=0)
        if self._rolls:
            start = before.position
            hidden, blocks, _ = self._rolled(window, before, grown, lengths)
        else:
            start = self._start(newest)
            hidden, blocks, _ = self._pass(window, before.position - self.latents, start, grown.position, grown.cross)
        said = taken(hidden, (newest - start).clamp(min=0), 1)
        return self.readout(said).squeeze(1), dataclasses.replace(grown, blocks=blocks)

    def step(self, inputs: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        before = cast(PerceiverState, state)
        window, grown = self._grown(inputs.unsqueeze(1), before, None)
        begins = self._begins(before.position)
        groups = [rows for rows in (begins.nonzero()[:, 0], (~begins).nonzero()[:, 0]) if len(rows)]
        if len(groups) == 1:
            hidden, blocks = self._stepped(window, before.position, grown, bool(begins[0]))
        else:
            parts = [
                self._stepped(window[rows], before.position[rows], grown.reorder(rows), begin)
                for rows, begin in zip(groups, (True, False), strict=True)
            ]
            order = torch.cat(groups).argsort()
            hidden = torch.cat([part[0] for part in parts])[order]
            joined = zip(*(part[1] for part in parts), strict=True)
            blocks = tuple(type(one).join([one, other]).reorder(order) for one, other in joined)
        return self.readout(hidden).squeeze(1), dataclasses.replace(grown, blocks=blocks)

    def stepper(self, state_dtype: torch.dtype | None = None) -> ModelStepper:
        return _Stepper(self)

    def _stepped(
        self, window: Tensor, position: Tensor, grown: PerceiverState, begin: bool
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Final hidden vectors (B, 1, D) of the newest tokens, at `position`, which begin a pass or go on with theirs."""
        if begin:
            hidden, blocks, _ = self._pass(window, position - self.latents, self._start(position), position + 1, grown.cross)
            return hidden[:, -1:], blocks
        hidden, blocks, _ = self._latents(window[:, -1:], _context(position[:, None], grown.cross), grown.blocks, None)
        return hidden, blocks

    def _read(self, inputs: Tensor, state: ModelState | None, counts: Tensor | None) -> tuple[Tensor, ModelState | None, Aux]:
        if state is None:
            return self._strided(inputs, counts)
        before = cast(PerceiverState, state)
        window, grown = self._grown(inputs, before, counts)
        if self._rolls:
            hidden, rolled, extras = self._rolled(window, before, grown, counts)
            return hidden, dataclasses.replace(grown, blocks=rolled), extras
        at = before.position[:, None] + torch.arange(inputs.shape[1], device=inputs.device)
        start = self._start(at)
        first, last = start[:, 0], self._start((grown.position - 1).clamp(min=0))
        out: Tensor | None = None
        blocks = before.blocks
        aux: Aux = {}
        for number in range(1 + int((last - first).max().clamp(min=0)) // self.stride):
            begin = torch.minimum(first + number * self.stride, last)
            stop = torch.minimum(begin + self.latents, grown.position)
            hidden, blocks, aux = self._pass(window, before.position - self.latents, begin, stop, grown.cross)
            chosen = taken(hidden, None, 0, (at - begin[:, None]).clamp(0, hidden.shape[1] - 1))
            out = chosen if out is None else torch.where((start == begin[:, None])[..., None], chosen, out)
        assert out is not None
        return out, dataclasses.replace(grown, blocks=blocks), aux

    def _strided(self, inputs: Tensor, counts: Tensor | None) -> tuple[Tensor, None, Aux]:
        """Pass after pass over rows from their start; right padding comes after all that is real, and is not seen by it."""
        x, length = self.embed(inputs), inputs.shape[1]
        keys = self._keys(x, torch.arange(length, device=x.device)[None])
        latents, stride = (max(1, length),) * 2 if self._rolls else (self.latents, self.stride)
        hidden: list[Tensor] = []
        aux: Aux = {}
        for start in range(0, max(1, length - latents + stride), stride):
            stop = min(start + latents, length)
            real = None if counts is None else (counts - start).clamp(0, stop - start)
            z, _, aux = self._aligned(x[:, start:stop], keys, stop, None, real)
            hidden.append(z if start == 0 else z[:, latents - stride :])
        return torch.cat(hidden, 1), None, aux

    def _grown(self, inputs: Tensor, state: PerceiverState, counts: Tensor | None) -> tuple[Tensor, PerceiverState]:
        """The last N embedded tokens and the new ones (B, N + L, E), and the state with all but its blocks after them."""
        x, length = self.embed(inputs, state.position), inputs.shape[1]
        at = torch.arange(length, device=x.device)
        cross = []
        for old, (k, v) in zip(state.cross, self._keys(x, state.position[:, None] + at), strict=True):
            old = dataclasses.replace(old, k=old.k.to(k.dtype), v=old.v.to(v.dtype))
            cross.append(old.with_room(length, counts)[0].written(k, v, counts))
        window = torch.cat([state.recent.to(x.dtype), x], 1)
        recent = taken(window, length if counts is None else counts, self.latents)
        return window, PerceiverState(cross[0].position, state.blocks, tuple(cross), recent)

    def _pass(
        self, window: Tensor, offset: Tensor, start: Tensor, stop: Tensor, cross: tuple[AttentionState, ...]
    ) -> tuple[Tensor, tuple[State, ...], Aux]:
        """One pass with latents at start .. stop - 1 (B,): hidden (B, most of a row, D), the blocks' states, extras.

        window (B, W, E) are embedded tokens from position `offset` (B,) on.
        """
        counts = (stop - start).clamp(min=0)
        n = max(1, int(counts.max()))
        embedded = taken(window, start - offset, n)
        fresh = self._fresh(len(window))
        position = start[:, None] + torch.arange(n, device=start.device)
        context = _context(position, cross)
        if bool((start == start[0]).all()) and bool((stop == stop[0]).all()) and n == int(counts[0]):
            return self._aligned(embedded, context.keys, int(stop[0]), fresh, None)
        return self._latents(embedded, context, fresh, counts)

    def _rolled(
        self, window: Tensor, before: PerceiverState, grown: PerceiverState, counts: Tensor | None
    ) -> tuple[Tensor, tuple[State, ...], Aux]:
        """The new tokens, behind the last N of the window, as latents that go on with those before them."""
        embedded = window[:, self.latents :]
        position = before.position[:, None] + torch.arange(embedded.shape[1], device=window.device)
        return self._latents(embedded, _context(position, grown.cross), before.blocks, counts)

    @property
    def _rolls(self) -> bool:
        return self.stride == 0

    def _start(self, position: Tensor) -> Tensor:
        """The first latent of the pass that scores a position."""
        if self._rolls:
            return torch.zeros_like(position)
        passes = (position - self.latents).div(self.stride, rounding_mode="floor") + 1
        return passes.clamp(min=0) * self.stride

    def _begins(self, position: Tensor) -> Tensor:
        """Bool: whether a position is the first that its pass scores, the first of all excepted, which begins from nothing."""
        return (position > 0) & (self._start(position) != self._start(position - 1))


class _Stepper(ModelStepper):
    """The model's own steps: what a step needs beside the weights is in the state."""

    def __init__(self, model: Passes) -> None:
        super().__init__(model, [])

    def begin(self, state: ModelState) -> ModelState:
        return state

    def step(self, inputs: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        return self.model.step(inputs, state)

    def end(self, state: ModelState) -> ModelState:
        return state

    def traffic(self, state: ModelState) -> int:
        # Keys and values are read, and one token's are written.
        return state.nbytes


def _context(position: Tensor, cross: tuple[AttentionState, ...]) -> Context:
    """The context that the states of the cross-attentions hold."""
    return Context(position, tuple((each.k, each.v) for each in cross), cross[0].key_position)
