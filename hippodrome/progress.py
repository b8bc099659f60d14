"""What a person sees of a training run: one live line on a terminal, a plain line every so often elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from hippodrome.train import Progress

QUIET_SECONDS = 10.0
"""Between two plain lines."""


class ProgressDisplay:
    """A context manager and a `watch` for `train`: shows each `Progress` it is called with, on standard error."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._scores: dict[str, float] = {}
        self._last_line = float("-inf")
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.scores:
            self._scores = dict(progress.scores)
        if sys.stderr.isatty():
            self._show(self._bar(progress))
        elif progress.step >= progress.steps or time.monotonic() - self._last_line >= QUIET_SECONDS:
            self._last_line = time.monotonic()
            print(f"{self.name}  {progress.step}/{progress.steps}  {self._facts(progress)}", file=sys.stderr, flush=True)

    def _show(self, bar: Table) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            # Not before there is something to show: of the processes of torchrun only one is ever told of progress.
            self._live = Live(console=Console(stderr=True), refresh_per_second=8)
            self._live.start()
        self._live.update(bar)

    def _facts(self, progress: Progress) -> str:
        facts = [f"loss {progress.loss:.4f}"]
        scores = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in self._scores.items() if name != "loss"]
        # One score: the line should fit into a terminal.
        facts += scores[:1]
        facts += [progress.rows or f"{progress.tokens_per_s:,.0f} tokens/s", f"{_clock(progress.seconds_left)} left"]
        return "  ".join(facts)

    def _bar(self, progress: Progress) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        row = Table.grid(padding=(0, 1))
        row.add_row(
            f"[bold]{self.name}[/bold]",
            ProgressBar(total=progress.steps, completed=progress.step, width=12),
            f"{progress.step}/{progress.steps}",
            self._facts(progress),
        )
        return row


def _clock(seconds: float | None) -> str:
    if seconds is None or seconds != seconds:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
