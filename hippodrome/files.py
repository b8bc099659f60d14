"""Files that are whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, data: Any) -> None:
    """Write JSON beside `path`, then rename: a reader sees the old file or the new one."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` (a file or a folder) that takes its place when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        if path.is_dir():
            path.rename(folder / "old")
        (folder / path.name).rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
