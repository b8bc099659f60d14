"""What a run of bench leaves: NAME_DEVICE.json with provenance, ceilings and ratios, and a picture beside it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hippodrome.bench._peers as _peers
from hippodrome import plots
from hippodrome.bench._measure import FORWARD, Ceilings, Row
from hippodrome.bench._targets import Ratio
from hippodrome.files import replacing, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that a run found."""

    subject: str
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    ceilings: Ceilings
    provenance: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """What the file holds: rows flat, each with its shares of the ceilings; ratios with what they were to reach."""
        return {
            "subject": self.subject,
            "rows": [_flat(row, self.ceilings) for row in self.rows],
            "ratios": [dataclasses.asdict(ratio) | {"met": ratio.met} for ratio in self.ratios],
            "crossover": crossover(self.rows),
            "ceilings": dataclasses.asdict(self.ceilings),
            "peers": _peers.versions(),
            "provenance": dict(self.provenance),
        }


def save(report: Report, folder: Path, device: torch.device) -> Path:
    """Write the JSON, whole or not at all. Returns its path."""
    path = path_of(report, folder, device)
    write_json(path, report.as_json())
    return path


def path_of(report: Report, folder: Path, device: torch.device) -> Path:
    """FOLDER/SUBJECT_DEVICE.json."""
    return folder / f"{report.subject}_{device_name(device)}.json"


def device_name(device: torch.device) -> str:
    """ "cpu", or the GPU's model: "h200"."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower().removeprefix("nvidia ")).strip("-")


def _flat(row: Row, ceilings: Ceilings) -> dict[str, Any]:
    data = dataclasses.asdict(row)
    sizes, more = data.pop("sizes"), data.pop("more")
    return data | sizes | more | {"roofline": roofline(row, ceilings)}


def roofline(row: Row, ceilings: Ceilings) -> dict[str, float | str] | None:
    """Achieved rates as shares of what this device did in this run, and which of the two ceilings is the nearer."""
    if not row.ms or not row.bytes:
        return None
    seconds = row.ms / 1e3
    shares: dict[str, float | str] = {"share_of_copy": row.bytes / seconds / ceilings.copy_bytes_per_s}
    if row.flops:
        shares["share_of_matmul"] = row.flops / seconds / ceilings.matmul_flop_per_s
        by_bytes, by_flops = row.bytes / ceilings.copy_bytes_per_s, row.flops / ceilings.matmul_flop_per_s
        shares["bound"] = "bytes" if by_bytes >= by_flops else "FLOPs"
        shares["share_of_roofline"] = max(by_bytes, by_flops) / seconds
    return shares


def crossover(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For every pair of ways whose order changes with the length: the first length from which on the second is the faster."""
    found = []
    for task in dict.fromkeys(row.task for row in rows):
        costs = {way: _by_length(rows, way, task) for way in dict.fromkeys(row.way for row in rows)}
        for a, b in ((a, b) for a in costs for b in costs if a != b):
            shared = sorted(set(costs[a]) & set(costs[b]))
            wins = [costs[b][n] < costs[a][n] for n in shared]
            if wins and wins[-1] and not wins[0]:
                last = max(i for i, won in enumerate(wins) if not won)
                found.append({"task": task, "from": a, "to": b, "between": [shared[last], shared[last + 1]]})
    return found


def _by_length(rows: Sequence[Row], way: str, task: str) -> dict[int, float]:
    """Seconds by length, a token (models) or a token of a channel; of several batches of a length, the largest."""
    mine = sorted((row for row in rows if (row.way, row.task) == (way, task) and row.ms), key=lambda row: row.batch)
    return {row.length: _seconds(row) for row in mine}


def _seconds(row: Row) -> float:
    if "tokens_per_s" in row.more:
        return 1 / row.more["tokens_per_s"]
    assert row.ms is not None
    return row.ms / 1e3 / (row.batch * row.length * row.sizes["channels"])


def draw(report: Report, path: Path) -> None:
    """A picture: a panel a task (picoseconds a value, or tokens a second, by length), and the roofline where it is known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in report.rows if row.ms]
    if not timed:
        return
    tasks = list(dict.fromkeys(row.task for row in timed))
    counted = [row for row in timed if row.bytes and row.flops]
    panels = len(tasks) + bool(counted)
    columns = min(2, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(6.4 * columns, 4.4 * lines + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{report.subject}: {_title(timed)}\n{report.provenance['device']}", fontsize=13)
    ways = list(dict.fromkeys(row.way for row in timed))
    for i, task in enumerate(tasks):
        _draw_by_length(figure.add_subplot(lines, columns, i + 1), [row for row in timed if row.task == task], ways)
    if counted:
        _draw_roofline(figure.add_subplot(lines, columns, panels), counted, ways, report.ceilings)
    with replacing(path) as beside:
        figure.savefig(beside, format="png")


_COLUMNS = 6
"""Ways that a printed table has columns for."""
_IN_WORDS = {"head_dim": "channels a head", "vocabulary": "ids", "new_tokens": "new tokens", "bidirectional": "both directions"}


def _title(rows: Sequence[Row]) -> str:
    shared = {name: value for name, value in rows[0].sizes.items() if all(row.sizes.get(name) == value for row in rows)}
    return ", ".join([rows[0].dtype, *(f"{_IN_WORDS.get(name, name)}: {value:,}" for name, value in shared.items())])


def _draw_by_length(axes: Axes, rows: Sequence[Row], ways: Sequence[str]) -> None:
    fast = all("tokens_per_s" in row.more for row in rows)
    found = {way: _by_length(rows, way, rows[0].task) for way in ways}
    least = min(cost for costs in found.values() for cost in costs.values())
    scale, unit = (1e9, "nanoseconds") if least > 1e-9 else (1e12, "picoseconds")
    for i, (way, costs) in enumerate(found.items()):
        lengths = sorted(costs)
        y = [1 / costs[n] if fast else scale * costs[n] for n in lengths]
        axes.plot(lengths, y, label=way, **plots.look(i, markers=True))
    axes.set(title=rows[0].task, xlabel="length", ylabel="tokens a second" if fast else f"{unit} a token and channel")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row.length for row in rows})
    axes.set_xticks(ticks, [_short(tick) for tick in ticks], rotation=45 if len(ticks) > 7 else 0)
    axes.xaxis.minorticks_off()
    _finish(axes)


def _draw_roofline(axes: Axes, rows: Sequence[Row], ways: Sequence[str], ceilings: Ceilings) -> None:
    """Achieved FLOP/s by FLOPs a byte, under the two ceilings measured in the run."""
    knee = ceilings.matmul_flop_per_s / ceilings.copy_bytes_per_s
    intensity = [_intensity(row) for row in rows]
    x = [min(*intensity, knee) / 2, knee, max(*intensity, knee) * 2]
    roof = [min(at * ceilings.copy_bytes_per_s, ceilings.matmul_flop_per_s) / 1e12 for at in x]
    axes.plot(x, roof, color="black", linewidth=1.5, label="copy and matrix product, measured")
    for i, way in enumerate(ways):
        for forward in (True, False):
            mine = [row for row in rows if row.way == way and row.task.endswith(FORWARD) == forward]
            if not mine:
                continue
            look = plots.look(i, markers=True) | {"linestyle": "none"} | ({"fillstyle": "none"} if forward else {})
            y = [(row.flops or 0) / (row.ms or 1) * 1e-9 for row in mine]
            axes.plot([_intensity(row) for row in mine], y, label=f"{way}, {FORWARD}" if forward else way, **look)
    axes.set(title="roofline", xlabel="FLOPs a byte that must be moved", ylabel="TFLOP/s", xscale="log", yscale="log")
    _finish(axes)


def _intensity(row: Row) -> float:
    assert row.flops
    assert row.bytes
    return row.flops / row.bytes


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _short(length: int) -> str:
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def table(report: Report) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Heads and cells of what is printed: a line a task, batch and length and a column a way; of many ways a line each."""
    ways = list(dict.fromkeys(row.way for row in report.rows))
    if len(ways) > _COLUMNS:
        tasks = list(dict.fromkeys(row.task for row in report.rows))
        lines = sorted(report.rows, key=lambda row: (tasks.index(row.task), row.length))
        found = [(row.task, f"{row.batch} x {row.length:,}", row.way, _figure(row), _peak(row)) for row in lines]
        return ("task", "batch x length", "way", "found", "peak memory"), found
    places = dict.fromkeys((row.task, row.length) for row in report.rows)
    cells = []
    for task, length in places:
        here = [row for row in report.rows if (row.task, row.length) == (task, length)]
        for batches in _batches(here):
            figures = {row.way: _figure(row) for row in here if row.batch in batches}
            size = f"{'/'.join(map(str, sorted(batches, reverse=True)))} x {length:,}"
            cells.append((task, size, *(figures.get(way, "") for way in ways)))
    return ("task", "batch x length", *ways), cells


def _peak(row: Row) -> str:
    return f"{row.peak_bytes / 1e9:.2f} GB" if row.ms and row.peak_bytes else ""


def _batches(rows: Sequence[Row]) -> list[set[int]]:
    """Batches that share a line: all of a length where rates are compared, else each its own."""
    batches = {row.batch for row in rows}
    if any("tokens_per_s" in row.more for row in rows):
        return [batches]
    return [{batch} for batch in sorted(batches, reverse=True)]


def _figure(row: Row) -> str:
    if row.ms is None:
        return row.error or ""
    if "tokens_per_s" in row.more:
        return f"{row.more['tokens_per_s']:,.0f} tokens/s"
    return f"{row.ms:.3g} ms" + (f", {row.more['tflop_per_s']:.3g} TFLOP/s" if "tflop_per_s" in row.more else "")


def ratio_lines(report: Report) -> Iterator[str]:
    """Every ratio in a line a subject and task: its values by size, and what they were to be."""
    for what, task in dict.fromkeys((ratio.what, ratio.task) for ratio in report.ratios):
        mine = [ratio for ratio in report.ratios if (ratio.what, ratio.task) == (what, task)]
        yield f"{what}, {task}: {'; '.join(map(_stated, mine))}"


def _stated(ratio: Ratio) -> str:
    place = f" at {ratio.batch} x {ratio.length:,}" if ratio.length else ""
    judged = "" if ratio.bound is None else f" ({ratio.kind} {ratio.bound:g}: {'met' if ratio.met else 'MISSED'})"
    return f"{ratio.value:.2f}{place}{judged}"
