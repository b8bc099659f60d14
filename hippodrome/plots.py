"""Pictures: races as curves in panels, one colour, marker and dash a competitor; images. matplotlib is imported when needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hippodrome.files import replacing

Curve = tuple[Sequence[float], Sequence[float]]

# Okabe and Ito's palette: told apart with any kind of colour vision; dashes and markers tell them apart in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_CROWDED = 6
"""Competitors from which on one legend beside the panels takes the place of one in each."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes. `curves`: competitor -> its curves, one a seed; drawn as their mean and the range between them."""

    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[Curve]]
    log_x: bool = False
    log_y: bool = False
    markers: bool = False


def draw(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Write a PNG of the panels, two in a row. A competitor looks the same in all of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.2 * rows + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14)
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    for i, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, columns, i + 1), panel, names)
    if len(names) > _CROWDED:
        lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        figure.legend(list(lines.values()), [str(name) for name in lines], loc="outside right center", frameon=False)
    else:
        for axes in figure.axes:
            axes.legend(frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, format="png")


def draw_images(path: Path, rows: Mapping[str, Sequence[tuple[str, Any]]], title: str) -> None:
    """Write a PNG of named rows of images, each (H, W) of bytes from black to white, with a caption."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.6 * columns + 0.4, 1.85 * len(rows) + 0.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    for row, (name, images) in enumerate(rows.items()):
        for column, (caption, image) in enumerate(images):
            axes = figure.add_subplot(len(rows), columns, row * columns + column + 1)
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(caption, fontsize=8)
            if not column:
                axes.set_ylabel(name, fontsize=9)
    with replacing(path) as beside:
        figure.savefig(beside, format="png")


def look(number: int, *, markers: bool) -> dict[str, Any]:
    """How competitor `number` is drawn: arguments of matplotlib's `plot`."""
    drawn: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _DASHES[number % len(_DASHES)]}
    drawn["linewidth"] = 2.0
    return drawn | ({"marker": _MARKERS[number % len(_MARKERS)], "markersize": 6} if markers else {})


def _draw_panel(axes: object, panel: Panel, names: Sequence[str]) -> None:
    from matplotlib.axes import Axes
    from matplotlib.ticker import EngFormatter

    assert isinstance(axes, Axes)
    for name, curves in panel.curves.items():
        x = curves[0][0]
        drawn = look(names.index(name), markers=panel.markers) | ({"markevery": 1 + len(x) // 15} if panel.markers else {})
        columns = list(zip(*[y for _, y in curves], strict=True))
        axes.plot(x, [sum(column) / len(column) for column in columns], label=name, **drawn)
        if len(curves) > 1:
            lows, highs = [min(column) for column in columns], [max(column) for column in columns]
            axes.fill_between(x, lows, highs, color=drawn["color"], alpha=0.2, linewidth=0)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    if panel.log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for curves in panel.curves.values() for xs, _ in curves for x in xs})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.log_y:
        _show_ratios(axes)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _show_ratios(axes: Any) -> None:
    """Logarithmic, but from 0 on where values differ by less than a factor of four: powers of two make poor ticks then."""
    from matplotlib.ticker import EngFormatter

    shown = [y for line in axes.get_lines() for y in line.get_ydata() if y > 0]
    if shown and max(shown) < 4 * min(shown):
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log", base=2)
    large = bool(shown) and max(shown) >= 1e4
    axes.yaxis.set_major_formatter(EngFormatter(sep="") if large else lambda value, _: f"{value:,g}")
