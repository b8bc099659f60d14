"""The cell of the Block-Recurrent Transformer: a set of state vectors that attends to itself and to a block of tokens.

    n = rms(s) + ids;   a = attend(q n; k n, v n),   c = attend(q2 n; keys and values of the tokens)
    skip:    s' = gate(s, W [a, c])
    dual:    r = gate(s, W [a, c]),   s' = gate(r, F(rms(r)))
    single:  s' = gate(s, tanh(F([a, c])))                                          F(x) = W_2 relu(W_1 x)
    gate(s, z) = g s + (1 - g) z,  g = sigmoid(b)     "fixed"
               = f s + i z,  f = sigmoid(W_f h + b_f + 1),  i = sigmoid(W_i h + b_i - 1)     "lstm"

h is what the map that makes z reads. Shapes: s (B, S, D), at least float32; q, k, v (B, H, ., K).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.norms import Fp32Parameters
from hippodrome.ops.attention import attention
from hippodrome.patterns import Full

GateKind = Literal["fixed", "lstm"]
CellKind = Literal["skip", "dual", "single"]
Projections = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys, values and the two kinds of queries of the states, (B, H, S, K) each."""


def unit(x: Tensor) -> Tensor:
    """x over its length along the last axis, which is taken in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class RecurrentCell(Fp32Parameters):
    """One step of the states. What it needs for that, and what tokens need to look at them, are its projections."""

    def __init__(
        self, d_model: int, n_state: int, n_head: int, d_head: int, d_ff: int, *, gate: GateKind, kind: CellKind, ids: bool
    ) -> None:
        super().__init__()
        self.n_head, self.kind = n_head, kind
        inner = n_head * d_head
        self.initial = nn.Parameter(0.1 * torch.randn(n_state, d_model))
        self.ids = nn.Parameter(torch.randn(n_state, d_model)) if ids else None
        self.norm = nn.Parameter(torch.ones(d_model))
        self.scale = nn.Parameter(torch.ones(2, n_head))
        self.proj = nn.Linear(d_model, 4 * inner, bias=False)
        if kind != "single":
            self.out_proj = nn.Linear(2 * inner, d_model, bias=False)
            self.gate = _Gate(gate, d_model, 2 * inner)
        if kind != "skip":
            self.fc1 = nn.Linear(2 * inner if kind == "single" else d_model, d_ff, bias=False)
            self.fc2 = nn.Linear(d_ff, d_model, bias=False)
            self.ffn_gate = _Gate(gate, d_model, d_ff)
        if kind == "dual":
            self.ffn_norm = nn.Parameter(torch.ones(d_model))

    def project(self, s: Tensor) -> Projections:
        """What tokens and the next step read of the states."""
        named = self._normed(s, self.norm)
        named = named if self.ids is None else named + self.ids
        parts = self.proj(named.to(self.proj.weight.dtype)).unflatten(-1, (4, self.n_head, -1))
        k, v, q, q2 = (part.transpose(1, 2) for part in parts.unbind(-3))
        return unit(k), v, unit(q), unit(q2)

    def advance(self, s: Tensor, own: Projections, keys: Tensor, values: Tensor) -> Tensor:
        """The states after a block, from their own projections and keys and values (B, H, T, K) of tokens: all are read."""
        k, v, q, q2 = own
        to_own, to_tokens = self.scale.abs()[:, :, None, None].to(q.dtype)
        a = attention(q * to_own, k, v, Full(), scale=1.0)
        c = attention(q2 * to_tokens, keys, values, Full(), scale=1.0)
        both = torch.cat([a, c], 1).transpose(1, 2).flatten(2)
        if self.kind == "single":
            hidden = F.relu(self.fc1(both))
            return self.ffn_gate(s, torch.tanh(self.fc2(hidden)), hidden)
        s = self.gate(s, self.out_proj(both), both)
        if self.kind == "skip":
            return s
        hidden = F.relu(self.fc1(self._normed(s, self.ffn_norm).to(self.fc1.weight.dtype)))
        return self.ffn_gate(s, self.fc2(hidden), hidden)

    @staticmethod
    def _normed(s: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(s, s.shape[-1:], weight, 1e-6)


class _Gate(Fp32Parameters):
    """How much of the old states is kept, and how much of the new ones is let in."""

    def __init__(self, kind: GateKind, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(0.1 * torch.randn(2 if kind == "lstm" else 1, d_model))
        self.weight = nn.Parameter((0.1 / d_hidden) ** 0.5 * torch.randn(2, d_model, d_hidden)) if kind == "lstm" else None

    def forward(self, s: Tensor, z: Tensor, hidden: Tensor) -> Tensor:
        """s, z (B, S, D) -> (B, S, D), in the dtype of s. hidden (B, S, F): what z was made of."""
        z = z.to(s.dtype)
        if self.weight is None:
            return torch.lerp(z, s, torch.sigmoid(self.bias[0]).to(s.dtype))
        pairs = zip(self.weight, self.bias, strict=True)
        forget, let_in = (F.linear(hidden.to(weight.dtype), weight).to(s.dtype) + bias for weight, bias in pairs)
        return torch.sigmoid(forget + 1) * s + torch.sigmoid(let_in - 1) * z
