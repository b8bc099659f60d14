"""DSS (Gupta, Gu, Berant, NeurIPS 2022): on the atomic tasks of DLR's paper."""

from __future__ import annotations

from hippodrome.lti.dss import DSS
from hippodrome.mixers.ssm import SSM
from hippodrome.recipes._atomic import PAPER as PAPER_ATOMIC
from hippodrome.recipes._atomic import Exercise
from hippodrome.recipes._atomic import atomic as _atomic
from hippodrome.run import RunConfig


def atomic(*, d_state: int = 4096, exercise: Exercise = PAPER_ATOMIC) -> RunConfig:
    """DSS-EXP on an atomic task, as DLR's paper trains it.

    Args:
        d_state: Modes, shared by the channels.
    """
    system = DSS.Config(d_state=d_state, init="lin", dt_min=1e-4, dt_max=1e-2)
    return _atomic(SSM.Config(system=system, glu=False), exercise, lr=1e-3)
