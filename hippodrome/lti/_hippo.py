"""HiPPO matrices and their normal-plus-low-rank form, float64.

    x' = A x + B u,   A = V diag(w) V^* - P^T P   (conjugate pairs kept once, hence twice the real part)

Sources: HiPPO (Gu, Dao et al., NeurIPS 2020) for LegS and LegT; How to Train Your HiPPO (Gu, Johnson et al., ICLR 2023) for
FouT; S4 (Gu, Goel, Ré, ICLR 2022) for the low-rank correction. Rows and columns count from 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Measure = Literal["legs", "legt", "fout"]
Real = NDArray[np.float64]
Complex = NDArray[np.complex128]


def transition(measure: Measure, n: int) -> tuple[Real, Real]:
    """A (n, n) and B (n,) of a measure. LegT is halved so that its time scale is that of the others; FouT needs an even n."""
    if measure == "legs":
        root = np.sqrt(2.0 * np.arange(n) + 1)
        return -np.tril(np.outer(root, root), -1) - np.diag(np.arange(1.0, n + 1)), root
    if measure == "legt":
        order = np.arange(n)
        root = np.sqrt(2.0 * order + 1)
        above = np.where(order[:, None] < order, (-1.0) ** (order[:, None] - order), 1.0)
        return -0.5 * np.outer(root, root) * above, 0.5 * root
    b = np.where(np.arange(n) % 2 == 0, np.sqrt(2.0), 0.0)
    b[0] = 1.0
    turn = np.zeros(n - 1)
    turn[::2] = np.pi * np.arange(n // 2)
    return np.diag(turn, -1) - np.diag(turn, 1) - np.outer(b, b), b


def low_rank(measure: Measure, n: int) -> Real:
    """P (rank, n) for which A + P^T P is a multiple of the identity plus a skew matrix, hence normal."""
    if measure == "legs":
        return np.sqrt(np.arange(n) + 0.5)[None]
    if measure == "legt":
        odd = np.arange(n) % 2 == 1
        root = np.sqrt(np.arange(n) + 0.5)
        return np.stack([np.where(odd, root, 0.0), np.where(odd, 0.0, root)])
    return transition(measure, n)[1][None]


@dataclass(frozen=True)
class Nplr:
    """The system in the eigenbasis of its normal part: of each conjugate pair the mode with negative imaginary part.

    w (n/2,) ascending in the imaginary part, V (n, n/2), B = V^* B (n/2,), P = V^* P (rank, n/2). The first entry of an
    eigenvector is made real and positive, so that the same numbers come out on every machine.
    """

    w: Complex
    V: Complex
    B: Complex
    P: Complex


@functools.lru_cache(maxsize=64)
def nplr(measure: Measure, n: int) -> Nplr:
    """Normal plus low rank, for an even n. Decomposed once a process, as every channel of every layer asks for the same; the
    arrays are read-only.
    """
    a, b = transition(measure, n)
    p = low_rank(measure, n)
    normal = a + p.T @ p
    decay = np.mean(np.diag(normal))
    frequency, vectors = np.linalg.eigh((normal - decay * np.eye(n)) * -1j)
    frequency, vectors = frequency[: n // 2].copy(), vectors[:, : n // 2].copy()
    if measure == "fout":
        # Its constant mode is a pair of zeros in the first two coordinates, of which eigh returns any two vectors.
        frequency[-1] = 0.0
        vectors[:, -1] = 0.0
        vectors[:2, -1] = np.sqrt(0.5), 1j * np.sqrt(0.5)
    vectors *= _phase_of_first_entry(vectors).conj()
    found = Nplr(
        w=decay + 1j * frequency, V=vectors, B=(vectors.conj().T @ b).astype(complex), P=(p @ vectors.conj()).astype(complex)
    )
    for array in (found.w, found.V, found.B, found.P):
        array.setflags(write=False)
    return found


def _phase_of_first_entry(vectors: Complex) -> Complex:
    """The phase of the first entry of each column that is not zero to rounding."""
    first = (np.abs(vectors) > 1e-8).argmax(0)
    entry = np.take_along_axis(vectors, first[None], 0)[0]
    return entry / np.abs(entry)
