"""What is too large for a device's memory, recognised in torch's errors and said in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from hippodrome.model import Model, ModelConfig
from hippodrome.part import BadInput

_PHRASES = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "Storage size calculation overflowed",
    "Overflow when unpacking long",
)
"""How torch says it: of GPUs, of CPUs, and where a size is beyond what 64 bits hold."""


OUT_OF_MEMORY = "out of memory"


def shortage(failure: BaseException) -> str | None:
    """ "out of memory for 2.00 GiB more" where memory lacked, now or in what the failure came from; None: it did not."""
    lacking = [cause for cause in _causes(failure) if _lacks(cause)]
    for cause in lacking:
        if found := re.search(r"tried to allocate ([\d.]+) (\w+)", str(cause), re.IGNORECASE):
            number, unit = found.groups()
            return f"{OUT_OF_MEMORY} for {f'{int(number) / 2**30:,.2f} GiB' if unit == 'bytes' else f'{number} {unit}'} more"
    return OUT_OF_MEMORY if lacking else None


def count_parameters(config: ModelConfig) -> int:
    """How many numbers a model learns. Nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())


def build_on(config: ModelConfig, device: torch.device) -> Model:
    """The model with fresh weights, drawn on the CPU, on `device`. Raises `BadInput` with its size where it does not fit."""
    try:
        return config.build().to(device)
    except Exception as failure:
        if shortage(failure) is None:
            raise
    raise BadInput(
        f"a model of d_model {config.d_model}{_size(config)} is too large for memory: take a smaller d_model or n_layer"
    )


def _size(config: ModelConfig) -> str:
    try:
        count = count_parameters(config)
    except Exception as failure:
        if shortage(failure) is None:
            raise
        return ""
    return f" has {count:,} parameters, {4 * count / 1e9:,.1f} GB in fp32, and"


def _lacks(failure: BaseException) -> bool:
    if isinstance(failure, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(failure, (RuntimeError, TypeError)) and any(phrase in str(failure) for phrase in _PHRASES)


def _causes(failure: BaseException) -> Iterator[BaseException]:
    """The failure and those it came from: a CUDA graph whose capture runs out of memory ends in another error."""
    current: BaseException | None = failure
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
