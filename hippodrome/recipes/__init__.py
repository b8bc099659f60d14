"""Recipes: functions that return a `RunConfig`; their keyword arguments are the flags of the command line.

A public function of a file in this folder is a recipe: `h3` is the function `h3` of h3.py, `h3.pure` its function `pure`.
Files and functions beginning with an underscore are not.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path

from hippodrome.part import BadInput, nearest
from hippodrome.run import RunConfig

Recipe = Callable[..., RunConfig]


def recipes() -> dict[str, str]:
    """Name -> first line of the docstring, of every recipe. The files are read, not imported."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                name = path.stem if node.name == path.stem else f"{path.stem}.{node.name}"
                found[name] = (ast.get_docstring(node) or "").partition("\n")[0]
    return found


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`. Imports one file."""
    if name not in recipes():
        raise BadInput(f"no recipe is called {name!r}: {nearest(name, recipes())}")
    file, _, function = name.partition(".")
    return getattr(importlib.import_module(f"hippodrome.recipes.{file}"), function or file)
