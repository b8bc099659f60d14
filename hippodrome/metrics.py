"""metrics.jsonl: one JSON object a logged step; and TensorBoard beside it, where it is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hippodrome.files import replacing
from hippodrome.part import BadInput

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, oldest first. A last line that a killed writer left unfinished is left out."""
    file = folder / METRICS
    return list(_whole_lines(file.read_text(encoding="utf-8"))) if file.is_file() else []


class MetricsLog:
    """Appends logged steps to a run's folder. Opened at step `step`, it first drops what was logged after that step."""

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        self._board = _open_board(folder, step) if tensorboard else None
        file = folder / METRICS
        if file.is_file():
            with replacing(file) as beside:
                kept = (line for line in read_metrics(folder) if line["step"] <= step)
                beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a step: numbers, and scores as an object of numbers by the name of their split."""
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        if self._board is not None:
            for name, value in _flat(line):
                if name != "step":
                    self._board.add_scalar(name, value, line["step"])
            self._board.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()
        if self._board is not None:
            self._board.close()


def _open_board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise BadInput(
            "TensorBoard is not installed: pip install 'hippodrome[tensorboard]', or leave tensorboard off"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _flat(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in value.items())
        else:
            yield name, value


def _whole_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
