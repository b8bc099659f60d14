"""The golden vectors: numbers computed by the authors' own code, one safetensors file a case (tests/golden)."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, Tensor]:
    """The tensors of one case by name: in/*, param/*, out/*, grad/*."""
    return load_file(FOLDER / f"{name}.safetensors")


def cases(prefix: str) -> list[str]:
    """Names of the cases that begin with `prefix`, sorted."""
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.safetensors"))


def as_complex(pairs: Tensor) -> Tensor:
    """The complex tensor of (re, im) pairs (..., 2)."""
    return torch.view_as_complex(pairs.contiguous())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|, in double precision."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    found, expected = found.detach().to(wide), expected.detach().to(wide)
    return float((found - expected).abs().max() / expected.abs().max())


def shift_register(b: Tensor, inputs: Tensor) -> Tensor:
    """x[n] = sum_(j<=n) B[n-j] u_(t-j), (..., H, N): the authors' state of a shift.

    b (H, N); inputs (..., H, N): the last N inputs, the newest last, which is what our state keeps.
    """
    newest_first = inputs.flip(-1)
    x = torch.zeros_like(newest_first)
    for n in range(b.shape[-1]):
        for j in range(n + 1):
            x[..., n] += b[:, n - j] * newest_first[..., j]
    return x
