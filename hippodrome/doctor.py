"""Doctor: what is installed, what it runs on, and which backend each op takes here and why not the others."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hippodrome
from hippodrome.ops._op import Op
from hippodrome.part import BadInput, nearest
from hippodrome.patterns import Causal

NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "tyro", "rich", "matplotlib")
EXTRAS = {
    "triton": "GPU kernels",
    "pyarrow": "text from .parquet",
    "zstandard": "text from .zst",
    "datasets": "data sets by name",
    "tensorboard": "--tensorboard",
    "flash-linear-attention": "a peer to compare with",
    "flash-attn": "a peer to compare with",
    "causal-conv1d": "a peer to compare with",
}
"""Packages that nothing needs, and what each is for."""


@dataclass(frozen=True)
class Package:
    """An installed or absent package. version: None when absent."""

    name: str
    version: str | None
    purpose: str
    needed: bool


@dataclass(frozen=True)
class Choice:
    """What an op does with a typical call on a device. reasons: backend -> "ok", or why it cannot take the call."""

    op: str
    device: str
    call: str
    backend: str
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """All that the doctor finds."""

    versions: Mapping[str, str]
    packages: tuple[Package, ...]
    devices: tuple[str, ...]
    threads: Mapping[str, int]
    choices: tuple[Choice, ...]

    @property
    def missing(self) -> list[str]:
        """Packages without which Hippodrome does not run."""
        return [package.name for package in self.packages if package.needed and package.version is None]


def examine() -> Report:
    """Look at this machine. Ops are asked, not run, so nothing is compiled and no memory to speak of is used."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return Report(
        versions={"hippodrome": hippodrome.__version__, "python": platform.python_version(), "system": platform.platform()},
        packages=tuple(_package(name, "", True) for name in NEEDED)
        + tuple(_package(name, purpose, False) for name, purpose in EXTRAS.items()),
        devices=tuple(_devices()),
        threads={"torch": torch.get_num_threads(), "cores": os.cpu_count() or 1},
        choices=tuple(_choice(name, kind) for kind in kinds for name in ops()),
    )


def ops() -> list[str]:
    """Names of the ops: the folders in hippodrome/ops."""
    return sorted(path.parent.name for path in (Path(__file__).parent / "ops").glob("*/__init__.py"))


def find_op(name: str) -> Op:
    """The op of the folder hippodrome/ops/<name>, which bears the folder's name."""
    return getattr(importlib.import_module(f"hippodrome.ops.{name}"), name)


def show(report: Report) -> None:
    """Print a report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    for device in report.devices:
        console.print(device)
    console.print(f"{report.threads['torch']} threads on {report.threads['cores']} cores")
    packages = Table("package", "version", "what for", title="Packages", title_justify="left")
    for package in report.packages:
        purpose = "needed" if package.needed else package.purpose
        packages.add_row(package.name, package.version or ("MISSING" if package.needed else "absent"), purpose)
    console.print(packages)
    choices = Table("op", "device", "typical call", "takes", "why not the others", title="Backends", title_justify="left")
    for choice in report.choices:
        others = [f"{name}: {reason}" for name, reason in choice.reasons.items() if reason != "ok"]
        choices.add_row(choice.op, choice.device, choice.call, choice.backend, "\n".join(others))
    console.print(choices)
    if report.missing:
        console.print(f"missing: {', '.join(report.missing)}; pip install hippodrome brings them")


def _package(name: str, purpose: str, needed: bool) -> Package:
    try:
        return Package(name, metadata.version(name), purpose, needed)
    except metadata.PackageNotFoundError:
        return Package(name, None, purpose, needed)


def _devices() -> list[str]:
    found = [f"cpu: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}"
        )
    return found


def _choice(name: str, kind: str) -> Choice:
    call, args, kwargs = example(name, kind)
    op = find_op(name)
    return Choice(name, kind, call, op.choose(*args, **kwargs), op.explain(*args, **kwargs))


def example(name: str, kind: str) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """A typical call of an op on "cpu" or "cuda": in words, and its arguments, whose values mean nothing."""
    if name not in _EXAMPLES:
        raise BadInput(f"no example call is known for the op {name!r}: {nearest(name, _EXAMPLES)}")
    return _EXAMPLES[name](kind, torch.bfloat16 if kind == "cuda" else torch.float32)


def _blank(*shape: int, kind: str, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=kind)


def _diagonal_ssm(kind: str, dtype: torch.dtype) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    u = _blank(8, 128, 2048, kind=kind, dtype=torch.float32)
    modes = _blank(128, 32, kind=kind, dtype=torch.complex64)
    return "8 x 128 channels x 2048, 32 modes, gates", (u, modes, modes), {"pre_gate": u, "post_gate": u}


def _long_conv(kind: str, dtype: torch.dtype) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    u, kernel = _blank(8, 128, 2048, kind=kind, dtype=dtype), _blank(128, 2048, kind=kind, dtype=torch.float32)
    return "8 x 128 channels x 2048, as long a kernel", (u, kernel), {}


def _h3(kind: str, dtype: torch.dtype) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    q = _blank(8, 128, 2048, kind=kind, dtype=dtype)
    taps, modes = _blank(128, 64, kind=kind, dtype=torch.float32), _blank(128, 32, kind=kind, dtype=torch.complex64)
    return "8 x 128 channels x 2048, 64 taps, 32 modes", (q, q, q, taps, modes, modes), {}


def _h3_step(kind: str, dtype: torch.dtype) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    q, ring = _blank(8, 128, kind=kind, dtype=dtype), _blank(8, 64, 128, kind=kind, dtype=dtype)
    taps, modes = _blank(64, 128, kind=kind, dtype=torch.float32), _blank(128, 32, kind=kind, dtype=torch.complex64)
    skip, state = _blank(128, kind=kind, dtype=torch.float32), _blank(8, 1, 1, 128, 32, 2, kind=kind, dtype=torch.float32)
    position = _blank(8, kind=kind, dtype=torch.int64)
    return "8 x 128 channels, 64 taps, 32 modes", (q, q, q, taps, modes, modes, skip, ring, position, state), {}


def _add_norm(kind: str, dtype: torch.dtype) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    x, weight = _blank(8, 1024, kind=kind, dtype=dtype), _blank(1024, kind=kind, dtype=dtype)
    return "8 x 1024 channels", (x, x, weight, weight, 1e-5), {"centred": True}


def _attention_step(kind: str, dtype: torch.dtype) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    q, keys = _blank(8, 12, 64, kind=kind, dtype=dtype), _blank(8, 12, 1024, 64, kind=kind, dtype=dtype)
    return "8 x 12 heads of 64, 1024 slots", (q, q, q, keys, keys, _blank(8, kind=kind, dtype=torch.int64)), {}


def _attention(kind: str, dtype: torch.dtype) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    q = _blank(8, 12, 1024, 64, kind=kind, dtype=dtype)
    return "8 x 12 heads of 64 x 1024, causal", (q, q, q), {"pattern": Causal()}


def _linear_attention(kind: str, dtype: torch.dtype) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    q = _blank(8, 12, 1024, 64, kind=kind, dtype=dtype)
    return "8 x 12 heads of 64 x 1024, causal", (q, q, q), {}


def _scan(kind: str, dtype: torch.dtype) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    b = _blank(8, 2048, 128, kind=kind, dtype=torch.complex64)
    return "8 x 2048 x 128 complex states", (b, b), {}


def _cross_entropy(kind: str, dtype: torch.dtype) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    hidden, weight = _blank(8, 1024, 768, kind=kind, dtype=dtype), _blank(50264, 768, kind=kind, dtype=dtype)
    targets = _blank(8, 1024, kind=kind, dtype=torch.int64)
    return "8 x 1024 tokens of 768, 50264 ids", (hidden, weight, targets), {}


_EXAMPLES: dict[str, Callable[[str, torch.dtype], tuple[str, tuple[Any, ...], dict[str, Any]]]] = {
    "add_norm": _add_norm,
    "attention": _attention,
    "attention_step": _attention_step,
    "cross_entropy": _cross_entropy,
    "diagonal_ssm": _diagonal_ssm,
    "h3": _h3,
    "h3_step": _h3_step,
    "linear_attention": _linear_attention,
    "long_conv": _long_conv,
    "scan": _scan,
}
