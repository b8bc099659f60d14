"""Tables on standard output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells below `heads`, which are not shown where all are empty."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, show_header=any(heads))
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_scores(scores: dict[str, dict[str, float]], headline: str, floors: Mapping[str, float]) -> None:
    """A row a split, and one for each floor of the headline score."""
    named = scores | {f"({name})": {headline: value} for name, value in floors.items()}
    names = sorted({name for row in named.values() for name in row})
    rows = [(split, *[f"{row[name]:.4f}" if name in row else "" for name in names]) for split, row in named.items()]
    print_table(("split", *[name.replace("_", " ") for name in names]), rows)
