"""Prove that a run survives kill -9: run it whole, run it again with kills and resumes, compare every loss bit by bit."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hippodrome.checkpoint import WEIGHTS
from hippodrome.files import write_json
from hippodrome.metrics import METRICS, read_metrics
from hippodrome.part import BadInput, to_dict
from hippodrome.run import RunConfig

_POLL = 0.002


@dataclass(frozen=True)
class Resumed:
    """What `verify_resume` found. rows: (step, loss of the run left alone, loss of the killed run), for every step.

    kills: the last step that each killed process had logged. equal: all losses and the final weights agree in every bit.
    """

    rows: list[tuple[int, float, float]]
    kills: list[int]
    same_weights: bool

    @property
    def equal(self) -> bool:
        return self.same_weights and not self.differing

    @property
    def differing(self) -> list[int]:
        """Steps whose losses differ."""
        return [step for step, alone, killed in self.rows if alone != killed]


def verify_resume(
    config: RunConfig, folder: Path, *, kill_at: Sequence[int] | None = None, kills: int = 3, seed: int = 0
) -> Resumed:
    """Train `config` twice in processes of their own, below `folder`: once left alone, once killed (SIGKILL) and resumed.

    The second run is killed at a random moment of each step in `kill_at`, by default of `kills` random steps. Every step
    is logged, and a checkpoint is written at least 8 times a run, whatever the config says. Bitwise equality is promised
    on a CPU only. Raises `BadInput` with the message of a run that fails by itself, or if `folder` is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty: verify-resume needs a new folder")
    dice = random.Random(seed)
    steps = config.train.steps
    if kill_at is None:
        kill_at = sorted(dice.sample(range(1, steps), min(kills, steps - 1)))
    if not all(1 <= step < steps for step in kill_at):
        raise BadInput(f"kills at steps {list(kill_at)}: each must lie between 1 and {steps - 1}")
    every = min(config.train.save_every or steps, max(1, steps // 8))
    train = dataclasses.replace(config.train, log_every=1, save_every=every)
    recipe = folder / "config.json"
    write_json(recipe, to_dict(dataclasses.replace(config, train=train)))

    alone, killed = folder / "alone", folder / "killed"
    _finish(_start(recipe, alone))
    a_step = read_metrics(alone)[-1]["seconds"] / steps
    hits = [_kill(recipe, killed, step, dice.uniform(0, 2 * a_step)) for step in kill_at]
    _finish(_start(recipe, killed))

    left, right = ({line["step"]: line["loss"] for line in read_metrics(run)} for run in (alone, killed))
    rows = [(step, left.get(step, float("nan")), right.get(step, float("nan"))) for step in range(1, steps + 1)]
    return Resumed(rows, hits, _digest(alone) == _digest(killed))


def _start(recipe: Path, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hippodrome.train", str(recipe), str(run)]
    resume = ["--resume"] if run.exists() else []
    return subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str]) -> None:
    _, complaint = process.communicate()
    if process.returncode:
        last = complaint.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise BadInput(f"the run failed by itself: {last[0].removeprefix('error: ')}")


def _kill(recipe: Path, run: Path, step: int, delay: float) -> int:
    """Start or resume a run, kill it `delay` seconds after it has logged `step`; return the last step it had logged."""
    # A run that starts rewrites its metrics to where it stands: until then they are those of the process killed before.
    before = _file_number(run)
    process = _start(recipe, run)
    while process.poll() is None and (_file_number(run) == before or _last_step(run) < step):
        time.sleep(_POLL)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    if process.wait() > 0:
        _finish(process)
    process.communicate()
    return _last_step(run)


def _file_number(run: Path) -> int | None:
    file = run / METRICS
    return file.stat().st_ino if file.exists() else None


def _last_step(run: Path) -> int:
    return max((line["step"] for line in read_metrics(run)), default=0)


def _digest(run: Path) -> str:
    return hashlib.sha256((run / WEIGHTS).read_bytes()).hexdigest()
