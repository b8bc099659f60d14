"""Hippodrome: the track on which every long-sequence model races under the same rules."""

from typing import TYPE_CHECKING, Any

from hippodrome.model import Model, ModelConfig
from hippodrome.part import BadInput

if TYPE_CHECKING:
    from hippodrome.checkpoint import load, save
    from hippodrome.generation import generate

__version__ = "0.1.0"
__all__ = ["BadInput", "Model", "ModelConfig", "generate", "load", "save"]

_LATER = {"load": "checkpoint", "save": "checkpoint", "generate": "generation"}


def __getattr__(name: str) -> Any:
    # Loading weights and sampling pull in more than torch, so `import hippodrome` waits for the first use.
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"hippodrome.{_LATER[name]}"), name)
