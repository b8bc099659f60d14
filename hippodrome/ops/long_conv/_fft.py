"""long_conv by FFT, a group of rows at a time: the arithmetic of the reference in a small part of its memory.

Products of polynomials modulo x^n - i keep what belongs to x^t in the real part and what wraps around in the imaginary part.
So for real sequences of up to n tokens one complex transform of n points, of w_t exp(pi i t / 2n), does what a real one of 2 n
points does to the sequence padded by zeros, without the padding. The adjoint of this map is the real part of the same with
conjugate spectra: neither correlations nor taps that look ahead need longer transforms.

Spectra are made in float32 and live for one group only; the backward makes them again. Lengths of transforms are products of
small primes. Nothing here needs a GPU. Source: Nussbaumer (1981), right-angle convolution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hippodrome.ops.long_conv._taps import Gradients, Taps, Wanted, empty, scratch


@functools.lru_cache(maxsize=256)
def good_size(n: int) -> int:
    """The least number from n on that is a power of two times one of a few odd numbers with small primes."""
    return min(odd << max(1, (-(-n // odd) - 1).bit_length()) for odd in (1, 3, 5, 7, 9, 15, 21, 25, 27, 35, 45))


@functools.lru_cache(maxsize=8)
def _turns(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """exp(pi i t / 2n) for t < n; and real and imaginary part of it divided by n."""
    angle = torch.arange(n, dtype=torch.float64) * (math.pi / (2 * n))
    turns = torch.polar(torch.ones_like(angle), angle)
    return (
        turns.to(device, torch.complex64),
        (turns.real / n).to(device, torch.float32),
        (turns.imag / n).to(device, torch.float32),
    )


def _groups(u: Tensor, n: int) -> Iterator[tuple[slice, slice]]:
    """Channels and sequences of a group. A row has four complex sequences of n numbers at a time, with cuFFT's own."""
    batch, channels, _ = u.shape
    rows = max(1, scratch(u) // (32 * n))
    sequences = min(batch, rows)
    group = max(1, rows // batch)
    for h in range(0, channels, group):
        for b in range(0, batch, sequences):
            yield slice(h, h + group), slice(b, b + sequences)


class Spectra:
    """Transforms of n points for one call; the taps' spectrum is kept while the channels stay the same."""

    def __init__(self, u: Tensor, taps: Taps, n: int | None = None) -> None:
        self.length, self.taps = u.shape[-1], taps
        self.n = n or good_size(self.length)
        self.turns, self.real, self.imag = _turns(self.n, u.device)
        self._of: slice | None = None

    def of_taps(self, channels: slice) -> Tensor:
        if self._of != channels:
            self._of, self._spectrum = channels, self._make(self.taps.channels(channels))
        return self._spectrum

    def _make(self, taps: Taps) -> Tensor:
        spectrum = self.of(taps.kernel, None)
        if taps.kernel_rev is not None:
            spectrum += self.of(taps.kernel_rev, None).conj_physical_()
        if taps.skip is not None:
            spectrum += taps.skip.unsqueeze(1)
        return spectrum

    def of(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Of gate x (..., L)."""
        length = x.shape[-1]
        turned = self.turns.new_empty(*x.shape[:-1], self.n)
        torch.mul(x, self.turns[:length], out=turned[..., :length])
        turned[..., length:] = 0
        if gate is not None:
            turned[..., :length] *= gate
        return torch.fft.fft(turned)

    def back(self, spectrum: Tensor) -> Tensor:
        """The real sequence (..., L) in float32."""
        # Unscaled, for scaling would be a pass of its own.
        turned = torch.fft.ifft(spectrum, norm="forward")[..., : self.length]
        return (turned.real * self.real[: self.length]).addcmul_(turned.imag, self.imag[: self.length])

    def lags(self, spectrum: Tensor) -> Tensor:
        """The taps' gradient over lags (H, lags) from the products conj(w) z of spectra."""
        taps = self.taps
        ahead = self.back(spectrum)[:, : taps.kernel.shape[1]]
        if taps.kernel_rev is None:
            return ahead
        return torch.cat([self.back(spectrum.conj_physical())[:, 1 : taps.kernel_rev.shape[1]].flip(1), ahead], -1)


def _at(t: Tensor | None, h: slice, b: slice) -> Tensor | None:
    return t if t is None else t[b, h]


def _write(out: Tensor, value: Tensor, gate: Tensor | None) -> None:
    if gate is None:
        out.copy_(value)
    else:
        torch.mul(value, gate, out=out)


def convolve(
    u: Tensor, taps: Taps, pre: Tensor | None, posts: tuple[Tensor | None, ...] = (None,), *, transposed: bool = False
) -> list[Tensor]:
    """For each of `posts` post y, y the convolution of pre u (B, H, L) with the taps, or with their mirror image."""
    spectra = Spectra(u, taps)
    outs = [empty(u) for _ in posts]
    for h, b in _groups(u, spectra.n):
        product = spectra.of(u[b, h], _at(pre, h, b))
        product *= spectra.of_taps(h).conj() if transposed else spectra.of_taps(h)
        y = spectra.back(product)
        for out, post in zip(outs, posts, strict=True):
            _write(out[b, h], y, _at(post, h, b))
        del product, y
    return outs


def backward(dy: Tensor, u: Tensor, taps: Taps, pre: Tensor | None, post: Tensor | None, wanted: Wanted) -> Gradients:
    """Gradients from dy (B, H, L). Both spectra are made once and serve all of them."""
    spectra = Spectra(u, taps)
    du = empty(dy) if wanted.inputs else None
    dpre = empty(dy) if wanted.inputs and pre is not None else None
    dpost = empty(u) if wanted.post else None
    first, last = taps.lags()
    lags = torch.zeros(u.shape[1], last + 1 - first, device=u.device) if wanted.taps else None
    for h, b in _groups(u, spectra.n):
        z = spectra.of(dy[b, h], _at(post, h, b))
        if wanted.taps or wanted.post:
            w = spectra.of(u[b, h], _at(pre, h, b))
            if lags is not None:
                lags[h] += spectra.lags(torch.linalg.vecdot(w, z, dim=0) if w.shape[0] > 1 else (w.conj() * z)[0])
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
            del dw
        del z
    return Gradients(du, dpre, dpost, lags)
