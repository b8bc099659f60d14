"""Op: a reference that anyone can read, and faster backends that state when they do not apply."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from hippodrome.part import BadInput, nearest

log = logging.getLogger(__name__)

WhyNot = Callable[..., str | None]
P = ParamSpec("P")
R = TypeVar("R")

PREFERENCE = ("triton", "cpu", "sdpa", "chunked", "reference")
"""The order in which backends are asked."""

PATIENCE = 2.0
"""Seconds that a first call may take before it says what it is doing."""

_forced: str | None = None
_said: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Backend:
    """One implementation: what runs, and a function of the same arguments that says why it cannot (None: it can)."""

    name: str
    run: Callable[..., Any]
    why_not: WhyNot
    yields: WhyNot | None = None
    """Why a later backend is the better choice, though this one can: binds the automatic choice, not `use_backend`."""


class Op:
    """One mathematics, several implementations. Calling the op runs the first backend that can take the arguments.

    The reference takes everything. `use_backend(name)` asks for one by name, and then a refusal is an error that gives
    the backend's reason; an automatic choice that passes over a backend is logged once.
    """

    def __init__(self, reference: Callable[..., Any]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self._backends: dict[str, Backend] = {}
        self._valid: Callable[..., None] | None = None
        functools.update_wrapper(self, reference)

    def backend(
        self, name: str, *, why_not: WhyNot, yields: WhyNot | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register an implementation of this op under `name`; `yields`: see `Backend`."""
        if name not in PREFERENCE:
            raise ValueError(f"backend {name!r}: {nearest(name, PREFERENCE)}")

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self._backends[name] = Backend(name, run, why_not, yields)
            return run

        return register

    def check(self, valid: Callable[..., None]) -> None:
        """Register what raises BadInput for arguments that no implementation takes; asked before any backend is."""
        self._valid = valid

    @property
    def backends(self) -> list[str]:
        """Names of the backends this op has, in order of preference."""
        return [name for name in PREFERENCE if name in self._backends or name == "reference"]

    def explain(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        """For each backend "ok" or the reason why it cannot take these arguments; BadInput for those that none can."""
        if self._valid is not None:
            self._valid(*args, **kwargs)
        return {name: self._why_not(name, *args, **kwargs) or "ok" for name in self.backends}

    def choose(self, *args: Any, **kwargs: Any) -> str:
        """The name of the backend that a call with these arguments runs."""
        if self._valid is not None:
            self._valid(*args, **kwargs)
        if _forced is not None:
            return self._check(_forced, *args, **kwargs)
        for name in self.backends:
            reason = self._why_not(name, *args, **kwargs)
            if reason is None:
                return name
            self._say_once(name, reason)
        raise AssertionError("the reference takes every call")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.choose(*args, **kwargs)
        run = self.reference if name == "reference" else self._backends[name].run
        return run(*args, **kwargs)

    def _say_once(self, name: str, reason: str) -> None:
        if not torch.compiler.is_compiling() and (self.name, name) not in _said:
            _said.add((self.name, name))
            log.info("%s passes over its backend %s: %s", self.name, name, reason)

    def _why_not(self, name: str, *args: Any, **kwargs: Any) -> str | None:
        if name == "reference":
            return None
        backend = self._backends[name]
        reason = backend.why_not(*args, **kwargs)
        if reason is None and backend.yields is not None and _forced != name:
            reason = backend.yields(*args, **kwargs)
        return reason

    def _check(self, name: str, *args: Any, **kwargs: Any) -> str:
        if name not in self.backends:
            raise BadInput(f"{self.name} has no backend {name!r}: {nearest(name, self.backends)}")
        reason = self._why_not(name, *args, **kwargs)
        if reason is not None:
            raise BadInput(f"{self.name} cannot run on the backend {name!r} asked for: {reason}")
        return name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every op runs on the backend `name`, or raises with the reason why it cannot. None: automatic."""
    global _forced
    if name is not None and name not in PREFERENCE:
        raise BadInput(f"backend {name!r}: {nearest(name, PREFERENCE)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def announced(what: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Of a leaf that runs GPU kernels: a first call that compiles them for more than `PATIENCE` seconds says so in a line.

    Calls are told apart by what kernels are specialised on: the dtypes of tensors, their absence, and flags. Compiled kernels
    stay on disk (Triton's cache), so that this happens once a machine.
    """
    line = f"hippodrome: compiling the GPU kernels of {what} for this machine, once"

    def decorate(leaf: Callable[P, R]) -> Callable[P, R]:
        called: set[tuple[object, ...]] = set()

        @functools.wraps(leaf)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            key = tuple(_kind(arg) for arg in (*args, *kwargs.values()))
            if key in called:
                return leaf(*args, **kwargs)
            timer = threading.Timer(PATIENCE, print, [line], {"file": sys.stderr, "flush": True})
            timer.daemon = True
            timer.start()
            try:
                found = leaf(*args, **kwargs)
            finally:
                timer.cancel()
            called.add(key)
            return found

        return run

    return decorate


def _kind(arg: object) -> object:
    return arg.dtype if isinstance(arg, Tensor) else len(arg) if isinstance(arg, list) else arg


def on_its_device(leaf: Callable[P, R]) -> Callable[P, R]:
    """Of a leaf that runs GPU kernels: they are launched where its first tensor is, not on the current device."""

    @functools.wraps(leaf)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):
            return leaf(*args, **kwargs)

    return run


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device. By its properties, which torch.compile takes for constants."""
    facts = torch.cuda.get_device_properties(device)
    return facts.major, facts.minor
