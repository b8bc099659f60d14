"""How the block FFT's programs (_block_fft.py) are divided, by points of the transform, and what they ask of a device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

WIDE = (9, 0)
"""The compute capability whose wide products keep the longer programs in registers."""


class Tile(NamedTuple):
    """n1 rows and n2 columns of points; a program has `sequences` beside each other and takes `frequencies` rows at a time.

    shared: bytes of shared memory that the compiler takes for it, at compute capability 9.0.
    """

    n1: int
    n2: int
    sequences: int
    frequencies: int
    warps: int
    shared: int


# By the compiler's reports at compute capability 9.0 as many numbers as leave no registers spilled (but 72 bytes a thread at
# 16,384 points, and 272 of the float32 gradient at 4,096). 4 n1 + 8 n2 multiply-adds a token favour n1 = 2 n2; 64 rows are the
# least of a wide product.
CONVOLUTION = {
    torch.float16: (
        Tile(16, 16, 16, 16, 4, 17408),
        Tile(32, 16, 8, 32, 4, 17408),
        Tile(64, 16, 4, 64, 4, 17408),
        Tile(64, 32, 2, 64, 4, 20480),
        Tile(64, 64, 1, 64, 4, 32768),
        Tile(128, 64, 1, 128, 8, 65536),
        Tile(128, 128, 1, 128, 8, 131072),
    ),
    torch.float32: (
        Tile(16, 16, 8, 16, 4, 20480),
        Tile(32, 16, 4, 32, 4, 20480),
        Tile(32, 32, 2, 32, 4, 32768),
        Tile(64, 32, 1, 64, 8, 32768),
        Tile(64, 64, 1, 16, 8, 106496),
    ),
}
GRADIENT = {
    torch.float16: (
        Tile(16, 16, 8, 16, 4, 10240),
        Tile(32, 16, 4, 32, 4, 13312),
        Tile(64, 16, 2, 64, 4, 25600),
        Tile(64, 32, 1, 64, 4, 24576),
        Tile(64, 64, 1, 32, 4, 32768),
        Tile(128, 64, 1, 32, 8, 49152),
        Tile(128, 128, 1, 16, 8, 106496),
    ),
    torch.float32: (
        Tile(16, 16, 4, 16, 4, 16384),
        Tile(32, 16, 2, 32, 4, 28672),
        Tile(32, 32, 2, 32, 8, 49152),
        Tile(64, 32, 1, 16, 8, 40960),
        Tile(64, 64, 1, 16, 8, 98304),
    ),
}
"""Of the taps' gradient, which holds two spectra and their product. n1 and n2 are those of the convolution."""

NARROW = 2048
"""Most points of a program that fits into the registers of other devices."""


def operand(dtype: torch.dtype) -> torch.dtype:
    """What the tensor cores multiply for inputs of this dtype."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def tiles(length: int, dtype: torch.dtype, batch: int) -> tuple[Tile, Tile]:
    """Of the convolution and of the taps' gradient, with no more sequences side by side than there are."""
    at = max(0, (length - 1).bit_length() - 8)
    pair = (CONVOLUTION[operand(dtype)][at], GRADIENT[operand(dtype)][at])
    most = 1 << max(0, batch - 1).bit_length()
    first, second = (tile._replace(sequences=min(tile.sequences, most)) for tile in pair)
    return first, second


@functools.cache
def longest(dtype: torch.dtype, device: torch.device) -> int:
    """Most tokens of a sequence on this device: by its shared memory, and by registers. A CPU (the interpreter) has room."""
    pairs = zip(CONVOLUTION[operand(dtype)], GRADIENT[operand(dtype)], strict=True)
    if device.type != "cuda":
        return max(conv.n1 * conv.n2 for conv, _ in pairs)
    facts = torch.cuda.get_device_properties(device)
    wide = (facts.major, facts.minor) == WIDE
    room = getattr(facts, "shared_memory_per_block_optin", facts.shared_memory_per_block)
    points = [conv.n1 * conv.n2 for conv, gradient in pairs if max(conv.shared, gradient.shared) <= room]
    return max(n for n in points if wide or n <= NARROW)


def why_not(length: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the block FFT cannot take sequences of this length; None: it can."""
    most = longest(dtype, device)
    if length <= most:
        return None
    return f"{length:,} tokens are more than the {most:,} whose transform in {str(operand(dtype))[6:]} fits on this chip"
