"""long_conv by FFT, a group of rows at a time: the arithmetic of the reference in a small part of its memory.

Spectra are made in float32 and live for one group only; the backward makes them again. Lengths of transforms are products of
small primes. Nothing here needs a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from hippodrome.ops.long_conv._taps import Gradients, Taps, Wanted, empty

SCRATCH = 1 << 26
"""Bytes of float32 and complex scratch that a group may always have."""


@functools.lru_cache(maxsize=256)
def good_size(n: int) -> int:
    """The least number from n on that is a power of two times one of a few odd numbers with small primes."""
    return min(odd << max(1, (-(-n // odd) - 1).bit_length()) for odd in (1, 3, 5, 7, 9, 15, 21, 25, 27, 35, 45))


def _groups(u: Tensor, n: int) -> Iterator[tuple[slice, slice]]:
    """Channels and sequences of a group. A row has a padded copy, two spectra and a product of n numbers each."""
    batch, channels, _ = u.shape
    rows = max(1, max(SCRATCH, u.numel() * u.element_size() // 2) // (20 * n))
    sequences = min(batch, rows)
    group = max(1, rows // batch)
    for h in range(0, channels, group):
        for b in range(0, batch, sequences):
            yield slice(h, h + group), slice(b, b + sequences)


class _Spectra:
    """Transforms of n points for one call; the taps' spectrum is kept while the channels stay the same."""

    def __init__(self, u: Tensor, taps: Taps) -> None:
        self.first, self.last = taps.lags()
        self.length, self.taps = u.shape[-1], taps
        self.n = good_size(self.length + max(self.last, -self.first))
        self._of: slice | None = None

    def of_taps(self, channels: slice) -> Tensor:
        if self._of != channels:
            sequence = self.taps.channels(channels).sequence(self.first, self.last)
            ring = sequence.new_zeros(sequence.shape[0], self.n)
            ring[:, : self.last + 1] = sequence[:, -self.first :]
            ring[:, self.n + self.first :] = sequence[:, : -self.first]
            self._of, self._spectrum = channels, torch.fft.rfft(ring)
        return self._spectrum

    def of(self, x: Tensor, gate: Tensor | None) -> Tensor:
        return torch.fft.rfft(x.float() if gate is None else x.float() * gate, self.n)

    def back(self, spectrum: Tensor) -> Tensor:
        return torch.fft.irfft(spectrum, self.n)[..., : self.length]

    def lags(self, spectrum: Tensor) -> Tensor:
        ring = torch.fft.irfft(spectrum, self.n)
        return torch.cat([ring[:, self.n + self.first :], ring[:, : self.last + 1]], -1)


def _at(t: Tensor | None, h: slice, b: slice) -> Tensor | None:
    return t if t is None else t[b, h]


def _write(out: Tensor, value: Tensor, gate: Tensor | None) -> None:
    out.copy_(value if gate is None else value * gate)


def convolve(
    u: Tensor, taps: Taps, pre: Tensor | None, posts: tuple[Tensor | None, ...] = (None,), *, transposed: bool = False
) -> list[Tensor]:
    """For each of `posts` post y, y the convolution of pre u (B, H, L) with the taps, or with their mirror image."""
    spectra = _Spectra(u, taps)
    outs = [empty(u) for _ in posts]
    for h, b in _groups(u, spectra.n):
        product = spectra.of(u[b, h], _at(pre, h, b))
        product *= spectra.of_taps(h).conj() if transposed else spectra.of_taps(h)
        y = spectra.back(product)
        for out, post in zip(outs, posts, strict=True):
            _write(out[b, h], y, _at(post, h, b))
    return outs


def backward(dy: Tensor, u: Tensor, taps: Taps, pre: Tensor | None, post: Tensor | None, wanted: Wanted) -> Gradients:
    """Gradients from dy (B, H, L). Both spectra are made once and serve all of them."""
    spectra = _Spectra(u, taps)
    du = empty(dy) if wanted.inputs else None
    dpre = empty(dy) if wanted.inputs and pre is not None else None
    dpost = empty(u) if wanted.post else None
    lags = torch.zeros(u.shape[1], spectra.last + 1 - spectra.first, device=u.device) if wanted.taps else None
    for h, b in _groups(u, spectra.n):
        z = spectra.of(dy[b, h], _at(post, h, b))
        if wanted.taps or wanted.post:
            w = spectra.of(u[b, h], _at(pre, h, b))
            if lags is not None:
                lags[h] += spectra.lags((z * w.conj()).sum(0))
            if dpost is not None:
                w *= spectra.of_taps(h)
                _write(dpost[b, h], spectra.back(w), dy[b, h])
            del w
        if du is not None:
            z *= spectra.of_taps(h).conj()
            dw = spectra.back(z)
            _write(du[b, h], dw, _at(pre, h, b))
            if dpre is not None:
                _write(dpre[b, h], dw, u[b, h])
    return Gradients(du, dpre, dpost, lags)
