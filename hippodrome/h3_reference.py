"""H3's language model as its authors' formulas say it, in float64 on the tensors of a checkpoint: what checks a conversion."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.h3_checkpoint import EMBEDDING, HEAD, Layout, Weights

_DIAGONAL = ("log_dt", "inv_A_real", "A_imag", "B", "C")


def reference_logits(weights: Weights, layout: Layout, ids: Tensor) -> Tensor:
    """Logits (L, V) float64 of ids (L,): the authors' equations written plainly on the file's own tensors.

    Convolutions are sums over an explicit kernel, so this shares nothing with the model that it checks.
    """

    def get(name: str) -> Tensor:
        return weights[f"backbone.{name}"].double()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), 1e-5)

    def h3(x: Tensor, at: str) -> Tensor:
        q, k, v = (linear(x, f"{at}.{name}_proj").T for name in "qkv")
        shift = _shift_kernel(get(f"{at}.ssm_k_kernel.kernel.C")[0], get(f"{at}.ssm_k_kernel.kernel.B"), len(ids))
        k = _convolve(k, shift) + get(f"{at}.ssm_k_D")[:, None] * k
        log_dt, log_decay, a_imag, b, c = (get(f"{at}.kernel.kernel.{name}") for name in _DIAGONAL)
        kernel = _diagonal_kernel(log_dt, log_decay, a_imag, b, c, len(ids))[:, None, None]
        q, k, v = (signal.unflatten(0, (-1, layout.d_head)) for signal in (q, k, v))
        kv = k[:, :, None] * v[:, None]
        s = _convolve(kv, kernel) + get(f"{at}.D")[:, None, None, None] * kv
        return linear((q[:, :, None] * s).sum(1).flatten(0, 1).T, f"{at}.output_linear")

    def attention(x: Tensor, at: str) -> Tensor:
        assert layout.n_head is not None
        q, k, v = linear(x, f"{at}.Wqkv").unflatten(1, (3, layout.n_head, -1)).permute(1, 2, 0, 3)
        if layout.rotary_dim:
            frequency = get(f"{at}.rotary_emb.inv_freq")
            q, k = _rotate(q, frequency), _rotate(k, frequency)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return linear(mixed.transpose(0, 1).flatten(1), f"{at}.out_proj")

    x = weights[EMBEDDING][ids].double()
    for i in range(layout.n_layer):
        at = f"layers.{i}"
        mix = attention if i in layout.attention_layers else h3
        x = x + mix(norm(x, f"{at}.norm1"), f"{at}.mixer")
        hidden = F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1"), approximate="tanh")
        x = x + linear(hidden, f"{at}.mlp.fc2")
    head = EMBEDDING if layout.tied else HEAD
    return norm(x, "ln_f") @ weights[head].double().T


def _convolve(u: Tensor, kernel: Tensor) -> Tensor:
    """sum_(s<=t) kernel[t-s] u[s] along the last axis."""
    length = u.shape[-1]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    return torch.einsum("...ts,...s->...t", kernel[..., lag.clamp(min=0)] * (lag >= 0), u)


def _shift_kernel(c: Tensor, b: Tensor, length: int) -> Tensor:
    """K[i] = sum_n c[n+i] b[n]: what a shift register with input weights b and taps c answers to an impulse."""
    n = b.shape[1]
    kernel = torch.zeros(len(b), max(n, length), dtype=b.dtype)
    for i in range(n):
        kernel[:, i] = (c[:, i:] * b[:, : n - i]).sum(1)
    return kernel[:, :length]


def _diagonal_kernel(log_dt: Tensor, log_decay: Tensor, a_imag: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """K[l] = 2 Re sum_n C_n Bbar_n Abar_n^l with A = -exp(log_decay) + i a_imag, discretised by the bilinear rule."""
    half = log_dt.exp()[:, None] * torch.complex(-log_decay.exp(), a_imag) / 2
    step = (1 + half) / (1 - half)
    weight = torch.view_as_complex(c[0].contiguous()) * torch.view_as_complex(b.contiguous())
    weight = weight * log_dt.exp()[:, None] / (1 - half)
    powers = step[..., None] ** torch.arange(length)
    return 2 * (weight[..., None] * powers).sum(1).real


def _rotate(x: Tensor, frequency: Tensor) -> Tensor:
    """Rotary positions: channel j of (heads, L, K) turns with channel j + n by t frequency_j, for the n frequencies."""
    n = len(frequency)
    turn = torch.arange(x.shape[1])[:, None] * frequency
    left, right, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat([left * turn.cos() - right * turn.sin(), left * turn.sin() + right * turn.cos(), rest], -1)
