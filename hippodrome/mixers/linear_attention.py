"""Linear attention: weights that are products of features, so that the past is a matrix a head (Katharopoulos et al., 2020).

    y_t = phi(q_t) S_t / (phi(q_t) z_t + eps),    S_t = sum_s phi(k_s) v_s^T,  z_t = sum_s phi(k_s)

over s <= t, or over all s where causal is False. phi(x) = elu(x) + 1, or random features: of the Gaussian kernel (Rahimi and
Recht, 2007), positive ones of softmax's kernel, or rectified (both Performer, Choromanski et al., 2021).

Shapes: x (B, L, D); q, k, v (B, H, L, K); features (B, H, L, F).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.model import Mixer
from hippodrome.norms import Fp32Parameters
from hippodrome.ops.linear_attention import EPS, linear_attention
from hippodrome.part import BadInput, Choice
from hippodrome.state import State


@dataclass(frozen=True, kw_only=True)
class FeatureMap(Choice):
    """What queries and keys become: (..., K) -> (..., F), in at least float32. The product of two is an attention weight."""

    def draw(self, d_head: int, device: torch.device | None = None) -> Tensor | None:
        """The random projection (K, R), fp32 from torch's global generator; None where the map is not random."""
        return None

    def width(self, d_head: int) -> int:
        """How many features F there are."""
        return d_head

    def of(self, x: Tensor, projection: Tensor | None) -> Tensor:
        """The features of x."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Elu(FeatureMap):
    """elu(x) + 1: positive, and without a parameter. Rounded to x's dtype."""

    def of(self, x: Tensor, projection: Tensor | None) -> Tensor:
        # As a sum that never cancels: adding one to elu(x) near -1 would leave nothing of small features.
        wide = _wide(x)
        return (F.relu(wide) + wide.clamp(max=0).exp()).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Random(FeatureMap):
    """Functions of u = W^T x temperature^(1/2) with a random W (K, R), the same for all heads and for queries and keys."""

    n_projection: int | None = None
    """R, the columns of W; None: half the width of a head, and all of it for rectified features."""
    temperature: float | None = None
    """Scale of the products q . k that the features imitate; None: 1/sqrt(K), and 1 for rectified features."""
    orthogonal: bool = False
    """Whether the columns of W are orthogonal, K at a time; their lengths are those of Gaussian vectors all the same."""
    redraw: bool = False
    """Whether every training call without a state has a W of its own. Otherwise, and for whatever has a state, it is fixed."""

    def draw(self, d_head: int, device: torch.device | None = None) -> Tensor:
        columns = self.columns(d_head)
        if columns < 1:
            raise BadInput(f"n_projection is {columns}: it must be at least 1")
        if not self.orthogonal:
            return torch.randn(d_head, columns, device=device)
        blocks = torch.cat([_rotation(d_head, device) for _ in range(-(-columns // d_head))], 1)
        return blocks[:, :columns] * torch.randn(d_head, columns, device=device).norm(dim=0)

    def columns(self, d_head: int) -> int:
        return max(1, d_head // 2) if self.n_projection is None else self.n_projection

    def width(self, d_head: int) -> int:
        return 2 * self.columns(d_head)

    def scaled(self, x: Tensor) -> Tensor:
        """x temperature^(1/2)."""
        temperature = x.shape[-1] ** -0.5 if self.temperature is None else self.temperature
        return _wide(x) * temperature**0.5


@dataclass(frozen=True, kw_only=True)
class Fourier(Random):
    """[cos u, sin u] / sqrt(R): on average exp(-|q - k|^2 temperature / 2), though a sample may be negative.

    A last feature of `smoothing` adds its square to every weight and keeps denominators from zero.
    """

    smoothing: float = 1.0

    def width(self, d_head: int) -> int:
        return super().width(d_head) + (self.smoothing > 0)

    def of(self, x: Tensor, projection: Tensor | None) -> Tensor:
        assert projection is not None
        u = self.scaled(x) @ projection
        waves = torch.cat([u.cos(), u.sin()], -1) * projection.shape[1] ** -0.5
        return F.pad(waves, (0, 1), value=self.smoothing) if self.smoothing > 0 else waves


@dataclass(frozen=True, kw_only=True)
class Favor(Random):
    """exp(+-u - |x|^2 temperature / 2) / sqrt(2 R): positive, and on average softmax's exp(q . k temperature)."""

    orthogonal: bool = True

    def of(self, x: Tensor, projection: Tensor | None) -> Tensor:
        assert projection is not None
        x = self.scaled(x)
        u, less = x @ projection, 0.5 * (x.square().sum(-1, keepdim=True) + math.log(2 * projection.shape[1]))
        return torch.cat([u - less, -u - less], -1).exp()


@dataclass(frozen=True, kw_only=True)
class Rectified(Random):
    """relu(u) + 0.001."""

    temperature: float | None = 1.0

    def columns(self, d_head: int) -> int:
        return d_head if self.n_projection is None else self.n_projection

    def width(self, d_head: int) -> int:
        return self.columns(d_head)

    def of(self, x: Tensor, projection: Tensor | None) -> Tensor:
        assert projection is not None
        return F.relu(self.scaled(x) @ projection) + 1e-3


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rotation(size: int, device: torch.device | None) -> Tensor:
    """An orthogonal matrix drawn uniformly: without the signs its first column would always point to one side."""
    q, r = torch.linalg.qr(torch.randn(size, size, device=device))
    return q * r.diagonal().sign()


class _Projection(Fp32Parameters):
    """The random matrix W (K, R), saved with the model."""

    W: Tensor

    def __init__(self, drawn: Tensor) -> None:
        super().__init__()
        self.register_buffer("W", drawn)


@dataclass(frozen=True)
class LinearAttentionState(State):
    """sums (B, H, F, K + 1), at least float32: S, and in the last column z. Its size does not depend on the tokens seen."""

    sums: Tensor


class LinearAttention(Mixer[LinearAttentionState]):
    """Multi-head linear attention."""

    residual_out: ClassVar[tuple[str, ...]] = ("out_proj",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        n_head: int = 4
        features: FeatureMap = field(default_factory=Elu)
        causal: bool = True
        """False: every token sees all others, and there is no state."""
        eps: float = EPS
        """Added to the denominator."""

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        if config.n_head < 1 or d_model % config.n_head:
            raise BadInput(f"{config.n_head} heads do not divide d_model {d_model}")
        self.config = config
        self.causal = config.causal
        self.n_head, self.d_head = config.n_head, d_model // config.n_head
        self.Wqkv = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        drawn = config.features.draw(self.d_head)
        self.projection = None if drawn is None else _Projection(drawn)

    def forward(
        self, x: Tensor, state: LinearAttentionState | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, LinearAttentionState | None]:
        if state is not None and not self.causal:
            raise BadInput("linear attention that is not causal sees the future and takes no state: build it with causal=True")
        q, k, v = (t.unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2) for t in self.Wqkv(x).chunk(3, -1))
        q, k = self._features(q, k, fixed=state is not None)
        if lengths is not None and not (self.causal and state is None):
            # Without features a key is in no sum. No real token sees padding on its right where nothing is remembered.
            k = k.masked_fill((torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[:, None, :, None], 0)
        y, sums = linear_attention(
            q,
            k,
            v,
            causal=self.causal,
            state=None if state is None else state.sums,
            return_state=state is not None,
            eps=self.config.eps,
        )
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return y, None if sums is None else LinearAttentionState(sums)

    def init_state(self, batch: int, max_len: int | None = None) -> LinearAttentionState:
        if not self.causal:
            raise BadInput("linear attention that is not causal sees the future and has no state: build it with causal=True")
        weight, width = self.Wqkv.weight, self.config.features.width(self.d_head)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return LinearAttentionState(weight.new_zeros(batch, self.n_head, width, self.d_head + 1, dtype=wide))

    def _features(self, q: Tensor, k: Tensor, *, fixed: bool) -> tuple[Tensor, Tensor]:
        features, projection = self.config.features, None if self.projection is None else self.projection.W
        if isinstance(features, Random) and features.redraw and self.training and not fixed:
            projection = features.draw(self.d_head, q.device)
        with torch.autocast(q.device.type, enabled=False):
            return features.of(q, projection), features.of(k, projection)
