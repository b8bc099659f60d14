"""Timings beside peers, each behind a check: no speed without a number, and no number without its JSON.

A subject is a file of this folder whose name does not begin with an underscore: `rows` yields its rows and its keyword
arguments are the flags it takes, `WAYS` names what is timed, `targets` the ratios it was to reach; `draw`, if it has one, makes
its picture.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hippodrome.bench._measure import DTYPES, OURS, TOLERANCE, Bench, Row
from hippodrome.bench._report import Report, draw, save
from hippodrome.bench._report import path_of as path_of
from hippodrome.bench._report import ratio_lines as ratio_lines
from hippodrome.bench._report import table as table
from hippodrome.part import BadInput, nearest
from hippodrome.run import provenance


def subjects() -> list[str]:
    """What can be timed."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def find_subject(name: str) -> ModuleType:
    """The subject of that name."""
    if name not in subjects():
        raise BadInput(f"nothing is timed by the name {name!r}: {nearest(name, subjects())}")
    return importlib.import_module(f"hippodrome.bench.{name}")


def bench(
    subject: str,
    device: torch.device,
    *,
    out: Path | None = None,
    seed: int = 0,
    repeats: int | None = None,
    ways: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Report:
    """Time a subject. `settings`: keyword arguments of its `rows`; None is the subject's own choice for the device.

    With `out`, OUT/SUBJECT_DEVICE.json is written again after every row, so that a run that is stopped leaves what it found,
    and a picture at the end. Raises `BadInput` for what the subject does not know. A way that fails, or differs from its
    reference, has a row that says so instead of a time.
    """
    module = find_subject(subject)
    given = _fitting(subject, module, settings)
    run = Bench(device, seed=seed, repeats=repeats, ways=ways, progress=progress)
    facts = provenance(seed, device)
    rows: list[Row] = []
    timed: Iterator[Row] = module.rows(run, **given)
    for row in timed:
        rows.append(row)
        report = Report(
            subject=subject,
            rows=tuple(rows),
            ratios=tuple(module.targets(rows, run.on_gpu)),
            ceilings=run.ceilings,
            provenance=facts,
        )
        if out is not None:
            path = save(report, out, device)
    if not rows:
        raise BadInput(f"{subject} has nothing to time on {device} with these settings: {', '.join(module.WAYS)} are its ways")
    if out is not None:
        getattr(module, "draw", draw)(report, path.with_suffix(".png"))
    return report


def tune(
    device: torch.device,
    *,
    lengths: Sequence[int] = (),
    dtype: str | None = None,
    paths: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Measure the table by which `long_conv` chooses its algorithm on this GPU. Returns the table's path.

    All of it anew; or with lengths, a dtype or paths (toeplitz, partitioned, fft, block_fft) those alone. Raises `BadInput` for
    what is not known.
    """
    from hippodrome.ops.long_conv import _table

    _fitting("long_conv", find_subject("long_conv"), {"lengths": lengths or None, "dtype": dtype})
    for length in lengths:
        if length not in _table.LENGTHS:
            # There a path measured alone would have no other beside it.
            near = min(_table.LENGTHS, key=lambda known: abs(known - length))
            known = ", ".join(map(str, _table.LENGTHS))
            raise BadInput(f"the table has no length {length}: it has {known}; {near} is the nearest")
    for name in paths:
        if name not in _table.PATHS:
            raise BadInput(f"long_conv has no path {name!r}: {nearest(name, _table.PATHS)}")
    if device.type != "cuda":
        raise BadInput(f"the table that tune measures is for GPUs, not for {device}")
    from hippodrome.ops.long_conv import triton

    dtypes = [DTYPES[dtype]] if dtype else []
    return triton.tune(device, lengths=lengths, dtypes=dtypes, paths=paths, progress=progress)


def differing(report: Report) -> list[str]:
    """Rows of our own that were not timed, and why."""
    return [f"{row.task}, {row.batch} x {row.length}: {row.error}" for row in report.rows if row.way == OURS and row.error]


def _fitting(subject: str, module: ModuleType, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, all of which the subject must know."""
    known = [name for name in inspect.signature(module.rows).parameters if name != "bench"]
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            flags = ", ".join("--" + each.replace("_", "-") for each in known)
            raise BadInput(f"bench {subject} has no flag --{name.replace('_', '-')}: it takes {flags}")
        if name == "lengths" and not value:
            raise BadInput("lengths is empty: give at least one")
        for number in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(number, int) and not isinstance(number, bool) and number < 1:
                raise BadInput(f"{name} is {number}: it must be at least 1")
    if given.get("dtype", "fp32") not in TOLERANCE:
        raise BadInput(f"dtype is {given['dtype']!r}: {nearest(str(given['dtype']), TOLERANCE)}")
    return given
