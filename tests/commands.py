"""Run the command in this process, as a shell would see it."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

from hippodrome.cli import main

TINY = ["--tokenizer", "bytes", "--n-layer", "2", "--d-model", "16", "--length", "32"]
TINY += ["--steps", "4", "--batch-size", "4", "--eval-every", "2", "--eval-batches", "1", "--log-every", "1", "--device", "cpu"]
"""Flags of a language model that trains in a second."""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on standard error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


def run(*words: object) -> Result:
    """Exit code and output of `hippodrome WORDS`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Result(code, out.getvalue(), err.getvalue())


def write_text(path: Path, documents: int = 12) -> Path:
    """A small text of several documents, apart by ---."""
    lines = [f"document {i} says that {i} times {i} is {i * i}, and nothing else of note\n" * 8 for i in range(documents)]
    path.write_text("\n---\n".join(lines))
    return path


def tree(folder: Path) -> set[str]:
    """Every file and folder below `folder`."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
