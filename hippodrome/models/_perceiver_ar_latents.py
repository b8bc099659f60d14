"""Perceiver AR's latents: tokens that read the context through cross-attention and go through the blocks.

Shapes: x (B, T, E), z (B, N M, D); q, k, v (B, H, length, E / H).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from hippodrome.mixers.attention import rotate
from hippodrome.model import Aux, ChannelMixer, WholeModel
from hippodrome.ops.attention import attention
from hippodrome.patterns import Causal
from hippodrome.state import State

if TYPE_CHECKING:
    from hippodrome.models.perceiver_ar import PerceiverAR


@dataclass(frozen=True)
class Context:
    """What latents at `position` (B or 1, N) read: keys and values (B, H, T, K) for each cross-attention.

    key_position (B or 1, T); None: key j is of token j, and the latents are the last tokens.
    """

    position: Tensor
    keys: tuple[tuple[Tensor, Tensor], ...]
    key_position: Tensor | None = None


class Latents(WholeModel):
    """One pass, whatever its latents are: no parameters of its own, PerceiverAR makes them."""

    config: PerceiverAR.Config  # pyright: ignore[reportIncompatibleVariableOverride]
    latents: int
    per_position: int
    latent_proj: nn.Linear
    latent_place: nn.Parameter
    cross: CrossAttention
    more_cross: nn.ModuleDict

    def _latents(
        self, embedded: Tensor, context: Context, states: tuple[State, ...] | None, counts: Tensor | None
    ) -> tuple[Tensor, tuple[State, ...], Aux]:
        """Tokens (B, N, E), of which `counts` (B,) are real, as latents through all of the model.

        Final hidden vectors (B, N, D), the blocks' states after them, extras.
        """
        z = self.latent_proj(embedded)
        if self.per_position > 1:
            z = (z[:, :, None] + self.latent_place).flatten(1, 2)
            counts = None if counts is None else counts * self.per_position
        z = self.cross(z, context, 0)
        numbers = {after: number for number, after in enumerate(self.config.cross_after, start=1)}
        after: list[State] = []
        aux: dict[str, Tensor] = {}
        for i, block in enumerate(self._stack):
            z, state, extras = self._block(block, z, None if states is None else states[i], counts)
            if state is not None:
                after.append(state)
            for name, value in extras.items():
                aux[name] = aux[name] + value if name in aux else value
            if i in numbers:
                z = self._crosses[numbers[i]](z, context, numbers[i])
        z = self.final_norm(z)
        return z.unflatten(1, (-1, self.per_position)).mean(2) if self.per_position > 1 else z, tuple(after), aux

    def _aligned(
        self,
        embedded: Tensor,
        keys: tuple[tuple[Tensor, Tensor], ...],
        stop: int,
        fresh: tuple[State, ...] | None,
        counts: Tensor | None,
    ) -> tuple[Tensor, tuple[State, ...], Aux]:
        """A pass whose latents are, in all rows, the last of the first `stop` tokens: no mask is written down."""
        position = torch.arange(stop - embedded.shape[1], stop, device=embedded.device)[None]
        context = Context(position, tuple((k[:, :, :stop], v[:, :, :stop]) for k, v in keys))
        return self._latents(embedded, context, fresh, counts)

    def _keys(self, x: Tensor, position: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple(cross.keys(x, position) for cross in self._crosses)

    @property
    def _crosses(self) -> list[CrossAttention]:
        return [self.cross, *cast("list[CrossAttention]", list(self.more_cross.values()))]

    def _fresh(self, batch: int) -> tuple[State, ...]:
        return tuple(block.mixer.init_state(batch, self.latents * self.per_position) for block in self._stack)


class CrossAttention(nn.Module):
    """Latents (B, N M, D) read keys and values: residual, with the channel mixer behind."""

    def __init__(self, config: PerceiverAR.Config) -> None:
        super().__init__()
        width = config.width
        self.n_head, self.d_head = config.n_head, width // config.n_head
        self.rotary_dim, self.wavelength = 2 * int(config.rotary * self.d_head / 2), config.wavelength
        self.per_position, self.query_offset = config.latents_per_position, config.query_offset
        self.query_norm, self.key_norm = nn.LayerNorm(config.d_model), nn.LayerNorm(width)
        self.Wq, self.Wkv = nn.Linear(config.d_model, width), nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, config.d_model)
        self.channel_norm = nn.LayerNorm(config.d_model)
        self.channel: ChannelMixer = config.channel.build(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def keys(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, K) of embedded tokens (B, T, E)."""
        k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.Wkv(self.key_norm(x)).chunk(2, -1))
        return self._turned(k, position), v

    def forward(self, z: Tensor, context: Context, number: int) -> Tensor:
        """What the latents become; the keys and values of the context are those of cross-attention `number`."""
        # The latents of a position are queries of as many heads that read the same keys: (B, H M, N, K).
        q = self.Wq(self.query_norm(z)).view(len(z), -1, self.per_position, self.n_head, self.d_head)
        q = self._turned(q.permute(0, 3, 2, 1, 4).flatten(1, 2), context.position + self.query_offset)
        # Queries that are the last of the keys are what the op expects: a backend need not build a mask for them.
        at = None if context.key_position is None else context.position
        y = attention(q, *context.keys[number], Causal(), q_position=at, k_position=context.key_position)
        y = y.unflatten(1, (self.n_head, self.per_position)).permute(0, 3, 2, 1, 4)
        z = z + self.dropout(self.out_proj(y.reshape(*z.shape[:2], -1)))
        return z + self.dropout(self.channel(self.channel_norm(z))[0])

    def _turned(self, x: Tensor, position: Tensor) -> Tensor:
        return rotate(x, position, self.rotary_dim, self.wavelength, closed=True) if self.rotary_dim else x


def taken(x: Tensor, start: Tensor | int | None, n: int, index: Tensor | None = None) -> Tensor:
    """n places of each row of x (B, L, ...) from `start` on, (B,) or a number; None: the last n. Or those of `index`."""
    if index is None:
        if start is None or isinstance(start, int):
            first = x.shape[1] - n if start is None else start
            return x[:, first : first + n]
        index = (start[:, None] + torch.arange(n, device=x.device)).clamp(0, x.shape[1] - 1)
    index = index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
    return x.gather(1, index)
