"""What contract tests share: which configs to test, and how to compare."""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hippodrome.part import Part, find, from_dict, names, to_dict
from tests.golden_files import relative_error

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs Triton's interpreter, which is off where there is a GPU",
)
"""Marks tests that run Triton's programs on CPU tensors."""


def every(slot: type[Part]) -> pytest.MarkDecorator:
    """Parametrises `config` over all parts of a slot: the default config of each and the VARIANTS of its own test file."""
    return pytest.mark.parametrize("config", list(_configs(slot)))


def _configs(slot: type[Part]) -> Iterator[Any]:
    for name in names(slot.folder):
        yield pytest.param(find(slot, name).Config(), id=name)
        for number, config in enumerate(variants(slot.folder, name), start=1):
            yield pytest.param(config, id=f"{name}-{number}")


def variants(folder: str, name: str) -> tuple[Part.Config, ...]:
    """The VARIANTS of a part's own test file: configs that contract tests run beside the default one."""
    return _of_its_test(folder, name, "VARIANTS", ())


def tiny(folder: str, name: str) -> Callable[[Path], dict[str, Any]]:
    """The function `tiny` of a part's own test file: it writes small data and returns the config's values for it."""
    return _of_its_test(folder, name, "tiny", lambda folder: {})


def _of_its_test(folder: str, name: str, what: str, otherwise: Any) -> Any:
    if not (Path(__file__).parent / folder / f"test_{name}.py").exists():
        return otherwise
    return getattr(importlib.import_module(f"tests.{folder}.test_{name}"), what, otherwise)


def build(config: Part.Config, *sizes: int, seed: int = 0) -> Any:
    """The part with parameters moved off their start, where zeros, ones and symmetries hide mistakes."""
    torch.manual_seed(seed)
    part = config.build(*sizes)
    with torch.no_grad():
        for parameter in part.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return part


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Differences of at most `tolerance`, relative to the largest number expected."""
    assert torch.isfinite(found).all()
    if expected.any():
        assert relative_error(found, expected) <= tolerance
    else:
        assert found.shape == expected.shape
        # What cancels exactly in one library leaves roundings in another, on one processor and not on the next.
        assert (found.abs() <= tolerance).all()


def assert_survives_json(slot: type[Part], config: Part.Config) -> None:
    assert from_dict(slot.Config, json.loads(json.dumps(to_dict(config)))) == config


def assert_builds_on_meta(config: Part.Config, *sizes: int) -> None:
    """Same names and shapes as the real thing, without a byte of memory."""
    with torch.device("meta"):
        ghost = config.build(*sizes)
    real = config.build(*sizes)
    assert all(tensor.is_meta for tensor in ghost.state_dict().values())
    assert _shapes(ghost) == _shapes(real)


def _shapes(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}


def assert_rules_name_parameters(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, Part):
            unknown = set(part.optim_rules) - {name for name, _ in part.named_parameters()}
            assert not unknown, f"{type(part).__name__}.optim_rules names {unknown}"


def assert_gradients(module: nn.Module) -> None:
    """Every trainable parameter has a finite gradient."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
