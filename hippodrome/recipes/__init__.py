"""Recipes: functions that return a `RunConfig`; their keyword arguments are the flags of the command line.

A public function of a file in this folder is a recipe: `h3` is the function `h3` of h3.py, `h3.pure` its function `pure`.
Files and functions beginning with an underscore are not. `lra.listops+mixer=s4` is `lra.listops` with one of its words
chosen, so that a comparison can have one recipe twice.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

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
    """The recipe called `name`, perhaps with an argument chosen. Imports one file."""
    plain, _, choice = name.partition("+")
    if plain not in recipes():
        raise BadInput(f"no recipe is called {plain!r}: {nearest(plain, recipes())}")
    file, _, function = plain.partition(".")
    recipe = getattr(importlib.import_module(f"hippodrome.recipes.{file}"), function or file)
    return _chosen(recipe, plain, *choice.split("=", 1)) if choice else recipe


def _chosen(recipe: Recipe, name: str, flag: str, value: str = "") -> Recipe:
    """The recipe without the parameter `flag`, one of words, which is `value`."""
    signature = inspect.signature(recipe, eval_str=True)
    words = {each.replace("_", "-"): parameter for each, parameter in signature.parameters.items() if _words(parameter)}
    if flag.replace("_", "-") not in words:
        raise BadInput(f"{name} has no words to choose for {flag!r}: {nearest(flag, words)}")
    parameter = words[flag.replace("_", "-")]
    if value not in _words(parameter):
        raise BadInput(f"{parameter.name} of {name} is {value!r}: {nearest(value, _words(parameter))}")

    @functools.wraps(recipe)
    def chosen(**named: Any) -> RunConfig:
        return recipe(**{**named, parameter.name: value})

    rest = [each for each in signature.parameters.values() if each is not parameter]
    chosen.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
    return chosen


def _words(parameter: inspect.Parameter) -> tuple[str, ...]:
    """The words that a parameter can be; none where it is no word."""
    return get_args(parameter.annotation) if get_origin(parameter.annotation) is Literal else ()
