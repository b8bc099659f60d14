"""Implementations of others, timed where they are installed and named as absent where not."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hippodrome.bench._measure import Bench

PEERS = {
    "fla": "flash-linear-attention",
    "flashfftconv": "flashfftconv",
    "flash_attn": "flash-attn",
    "causal_conv1d": "causal-conv1d",
    "transformers": "transformers",
}
"""Module -> distribution."""


def installed(module: str) -> bool:
    """Whether the module of a peer is here; nothing is imported."""
    return importlib.util.find_spec(module) is not None


def versions() -> dict[str, str]:
    """Version of every peer, "absent" where it is not installed."""
    return {name: _version(name, distribution) for name, distribution in PEERS.items()}


def _version(module: str, distribution: str) -> str:
    if not installed(module):
        return "absent"
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "installed, version unknown"


def sdpa(*backends: SDPBackend, causal: bool = True) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's attention on the first of these backends that takes the call; none given: torch's choice."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not backends:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def attention_ways(bench: Bench) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Way -> causal attention over (B, heads, L, width)."""
    if not bench.on_gpu:
        return {"SDPA": sdpa()}
    ways = {"SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION), "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    if installed("flash_attn"):
        ways["flash-attn"] = flash_attention
    return ways


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """flash-attn's, over (B, heads, L, width)."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal).transpose(1, 2)


def last_token_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the last query of the first row's first head takes, in float64: (width,)."""
    last, keys, values = q[0, 0, -1].double(), k[0, 0].double(), v[0, 0].double()
    return torch.softmax(keys @ last * last.shape[0] ** -0.5, 0) @ values


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fla's causal linear attention, not normalised, over (B, L, heads, width)."""
    from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found]

    return chunk_linear_attn(q, k, v, normalize=False)[0]


def normalised_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fla's causal linear attention, normalised, over (B, heads, L, width)."""
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(*(t.transpose(1, 2) for t in (q, k, v)), normalize=True)[0].transpose(1, 2)


def last_token_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the last query of the first row's first head takes in linear attention, in float64: (width,)."""
    last, keys, values = q[0, -1, 0].double(), k[0, :, 0].double(), v[0, :, 0].double()
    return (keys @ last * last.shape[0] ** -0.5) @ values


def flash_fft_conv(u: Tensor, kernel: Tensor, pre_gate: Tensor | None = None, post_gate: Tensor | None = None) -> Tensor:
    """FlashFFTConv's causal convolution of u (B, H, L), half precision, with kernel (H, L), fp32; its FFT is twice as long."""
    conv = _flash_fft_conv(2 * u.shape[-1], u.dtype, u.device)
    return conv(u, kernel) if pre_gate is None else conv(u, kernel, pre_gate, post_gate)


@functools.lru_cache(maxsize=1)
def _flash_fft_conv(size: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Kept from call to call: it holds the tables of its size."""
    from flashfftconv import FlashFFTConv  # type: ignore[import-not-found]

    return FlashFFTConv(size, dtype=dtype).to(device)
