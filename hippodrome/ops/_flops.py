"""What torch's FlopCounterMode is told of the leaves, whose insides it cannot see."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

_waiting: dict[Any, Callable[..., int]] = {}


def count_flops(formulas: Mapping[Any, Callable[..., int]]) -> None:
    """For each leaf a formula: from the leaf's arguments to floating-point operations, two a multiply-add.

    The counter's module imports Triton, so if nobody has imported it yet, the formulas wait for `register_flops`.
    """
    _waiting.update(formulas)
    if "torch.utils.flop_counter" in sys.modules:
        register_flops()


def register_flops() -> None:
    """Let every FlopCounterMode that is made from now on count the leaves of all ops."""
    while _waiting:
        from torch.utils.flop_counter import register_flop_formula

        leaf, formula = _waiting.popitem()
        register_flop_formula(leaf, get_raw=True)(formula)
