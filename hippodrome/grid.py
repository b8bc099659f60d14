"""Race recipes once for every value of one of their flags: a table of recipes by values, such as systems by tasks.

FOLDER/report.json      the table's numbers, with provenance
       curves.png       where the values are numbers: score, tokens a second and memory by value
       VALUE/           the comparison under each value, see `compare`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hippodrome.compare import Display, check_budgets, compare
from hippodrome.files import write_json
from hippodrome.part import BadInput
from hippodrome.run import RunConfig


def grid(
    over: str,
    races: Mapping[str, Mapping[str, RunConfig]],
    folder: Path,
    *,
    seeds: int = 1,
    match_parameters: bool = True,
    tolerance: float = 0.02,
    resume: bool = False,
    jobs: int = 1,
    display: Display | None = None,
) -> dict[str, Any]:
    """Compare the recipes of every race, and return the report (also report.json). All other arguments are those of `compare`.

    over: the name of the flag. races: its values -> recipes by name. Raises `BadInput` before anything is trained where the
    recipes of a race cannot be compared, or where two values would share a folder.
    """
    places = {value: re.sub(r"[^\w.-]+", "-", value) for value in races}
    if not races or len(set(places.values())) < len(places):
        raise BadInput(f"the values of {over} are {', '.join(races) or 'none'}: wanted are several, each another")
    for recipes in races.values():
        check_budgets(recipes)
    settings: dict[str, Any] = {"seeds": seeds, "match_parameters": match_parameters, "tolerance": tolerance}
    settings |= {"resume": resume, "jobs": jobs, "display": display}
    reports = {value: compare(recipes, folder / places[value], **settings) for value, recipes in races.items()}
    first = next(iter(reports.values()))

    def headlines(name: str) -> dict[str, Any]:
        return {value: each["results"][name]["scores"][each["headline"]] for value, each in reports.items()}

    report = {
        "over": over,
        "seeds": seeds,
        "headlines": {value: each["headline"] for value, each in reports.items()},
        "results": {name: headlines(name) for name in first["results"]},
        "costs": {name: {value: _cost(each["results"][name]) for value, each in reports.items()} for name in first["results"]},
        "floors": {value: each["floors"] for value, each in reports.items()},
        "provenance": first["provenance"],
    }
    write_json(folder / "report.json", report)
    _draw(folder / "curves.png", report)
    return report


def _cost(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("parameters", "steady_tokens_per_s", "peak_bytes")}


def _draw(path: Path, report: Mapping[str, Any]) -> None:
    """Panels by the value, where there are several and all are numbers."""
    from hippodrome import plots

    values = list(report["headlines"])
    if len(values) < 2 or not all(re.fullmatch(r"\d+(\.\d+)?", value) for value in values):
        return
    values.sort(key=float)
    x, called = [float(value) for value in values], _called(report["results"])

    def panel(title: str, y: str, of: Callable[[str, str], float | None], **how: bool) -> plots.Panel | None:
        points = {called[name]: [of(name, value) for value in values] for name in report["results"]}
        if any(point is None for row in points.values() for point in row):
            return None
        curves: dict[str, list[plots.Curve]] = {name: [(x, [point or 0.0 for point in row])] for name, row in points.items()}
        return plots.Panel(title=title, x=report["over"], y=y, curves=curves, log_x=True, markers=True, **how)

    results, costs = report["results"], report["costs"]
    score = " or ".join(dict.fromkeys(name.replace("_", " ") for name in report["headlines"].values()))
    drawn = [
        panel("quality on the test split", score, lambda name, value: results[name][value]["mean"]),
        panel("training", "tokens a second", lambda name, value: costs[name][value]["steady_tokens_per_s"], log_y=True),
        panel("memory", "bytes at the peak", lambda name, value: costs[name][value]["peak_bytes"], log_y=True),
    ]
    plots.draw(path, [each for each in drawn if each is not None], f"{', '.join(called.values())}: equal tokens")


def _called(names: Iterable[str]) -> dict[str, str]:
    """Name -> what a table calls it: where all are one recipe with one word chosen, the word."""
    parts = {name: name.rpartition("=") for name in names}
    alike = len({head for head, _, _ in parts.values()}) == 1
    return {name: word if alike and sign else name for name, (_, sign, word) in parts.items()}


def print_grid(report: Mapping[str, Any]) -> None:
    """The table of a report, on standard output: a row a value, a column a recipe, and what no model is needed for."""
    from rich.console import Console
    from rich.table import Table

    results, floors = report["results"], report["floors"]
    scores = ", ".join(dict.fromkeys(name.replace("_", " ") for name in report["headlines"].values()))
    table = Table(report["over"], title=f"{scores} on the test split, seeds: {report['seeds']}")
    known = list(dict.fromkeys(name for each in floors.values() for name in each))
    called = _called(results)
    for name in (*called.values(), *(f"({name})" for name in known)):
        table.add_column(name, justify="right")
    for value in report["headlines"]:
        cells = [f"{row[value]['mean']:.4f}" for row in results.values()]
        cells += [f"{floors[value][name]:.4f}" if name in floors[value] else "" for name in known]
        table.add_row(value, *cells)
    console = Console()
    console.print(table)
    for key, title, unit in (("steady_tokens_per_s", "tokens a second", 1.0), ("peak_bytes", "GB at the peak", 1e-9)):
        costs = report.get("costs", {})
        if costs and all(cell[key] is not None for row in costs.values() for cell in row.values()):
            table = Table(report["over"], title=title)
            for name in called.values():
                table.add_column(name, justify="right")
            for value in report["headlines"]:
                table.add_row(value, *(f"{unit * row[value][key]:,.{0 if unit == 1 else 2}f}" for row in costs.values()))
            console.print(table)
