"""A mixer by name: one of mixers/, or one of lti/ in S4's layer, with what it must know of the model around it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from hippodrome.lti._base import LTI
from hippodrome.mixers.ssm import SSM
from hippodrome.model import Mixer
from hippodrome.part import BadInput, find, names, nearest
from hippodrome.patterns import Full
from hippodrome.positions import Rotary


def mixer_named(
    name: str, *, d_model: int, length: int, bidirectional: bool, n_head: int | None = None, rotary: bool = True
) -> Mixer.Config:
    """The default config of a mixer or system; one that knows a length knows this one.

    n_head: heads of a mixer that has them; None: as by default. rotary: whether attention has rotary positions or none of its
    own. Raises `BadInput` for a name that is none, and for one that cannot look both ways.
    """
    if name in names("lti"):
        system = find(LTI, name).Config()
        known: dict[str, Any] = {"length": length} if _has(system, "length") else {}
        return SSM.Config(system=replace(system, **known), bidirectional=bidirectional)
    if name not in names("mixers"):
        raise BadInput(f"no system is called {name!r}: {nearest(name, [*names('mixers'), *names('lti')])}")
    config = find(Mixer, name).Config()
    changes: dict[str, Any] = {"n_head": n_head} if n_head is not None and _has(config, "n_head") else {}
    if rotary and _has(config, "position"):
        heads: int = changes.get("n_head", getattr(config, "n_head", 1))
        if d_model % (2 * heads):
            raise BadInput(f"d_model is {d_model}: rotary positions of {heads} heads need a multiple of {2 * heads}")
        changes["position"] = Rotary()
    if bidirectional:
        both_ways = {"bidirectional": True, "pattern": Full(), "causal": False}
        switch = next((field for field in both_ways if _has(config, field)), None)
        if switch is None:
            raise BadInput(f"{name} looks one way only: leave bidirectional off")
        changes[switch] = both_ways[switch]
    return replace(config, **changes)


def _has(config: Any, name: str) -> bool:
    return name in {field.name for field in fields(config)}
