"""Doctor: what is installed, what it runs on, and which backend each op takes here and why not the others."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import hippodrome
from hippodrome.ops._op import Op

NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "tyro", "rich", "matplotlib")
EXTRAS = {
    "triton": "GPU kernels",
    "pyarrow": "text from .parquet",
    "zstandard": "text from .zst",
    "datasets": "data sets by name",
    "tensorboard": "--tensorboard",
    "flash-linear-attention": "a peer in hippodrome bench",
    "flash-attn": "a peer in hippodrome bench",
    "causal-conv1d": "a peer in hippodrome bench",
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
