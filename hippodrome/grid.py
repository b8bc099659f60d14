"""Race recipes once for every value of one of their flags: a table of recipes by values, such as systems by tasks.

FOLDER/report.json      the table's numbers, with provenance
       VALUE/           the comparison under each value, see `compare`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
        "floors": {value: each["floors"] for value, each in reports.items()},
        "provenance": first["provenance"],
    }
    write_json(folder / "report.json", report)
    return report


def print_grid(report: Mapping[str, Any]) -> None:
    """The table of a report, on standard output: a row a value, a column a recipe, and what no model is needed for."""
    from rich.console import Console
    from rich.table import Table

    results, floors = report["results"], report["floors"]
    scores = ", ".join(dict.fromkeys(name.replace("_", " ") for name in report["headlines"].values()))
    table = Table(report["over"], title=f"{scores} on the test split, seeds: {report['seeds']}")
    known = list(dict.fromkeys(name for each in floors.values() for name in each))
    for name in (*results, *(f"({name})" for name in known)):
        table.add_column(name, justify="right")
    for value in report["headlines"]:
        cells = [f"{row[value]['mean']:.4f}" for row in results.values()]
        cells += [f"{floors[value][name]:.4f}" if name in floors[value] else "" for name in known]
        table.add_row(value, *cells)
    Console().print(table)
