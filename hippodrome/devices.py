"""Where a run computes: a device by its name, autocast, and the processes that share one run under torchrun.

A lone process is a world of one: every function here then returns at once and needs no process group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hippodrome.part import BadInput, nearest

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name. "auto" is this process's GPU where there is one, else the CPU."""
    if name == "auto" or name == "cuda":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if name == "auto":
            return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"no device is called {str(name)!r}: {nearest(str(name), ['auto', 'cpu', 'cuda', 'cuda:0'])}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"device {str(name)!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices; try 'cpu'")
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision: fp32 (none), bf16 or fp16."""
    half = _HALF.get(precision)
    return torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the process group that torchrun's environment describes, and leave it at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process among those that share the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place. On a GPU it must be a GPU tensor; the host does not wait."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def gathered(value: Any) -> list[Any]:
    """A small picklable value of every process, in the order of their ranks."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier()


def watch_memory(device: torch.device) -> int:
    """Begin to watch the device's memory for `peak_memory`. Returns the bytes that are held now; 0 off GPUs."""
    if device.type != "cuda":
        return 0
    torch.cuda.init()  # before that there are no statistics to reset
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held at once since `watch_memory`; None off GPUs."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
