"""Patterns as a command line spells them: `window(size=64) | global(size=4) & causal`."""

from __future__ import annotations

import ast
import re
from typing import Any

from hippodrome.part import BadInput, from_dict, nearest
from hippodrome.patterns._pattern import And, Or, Pattern, _Combined
from hippodrome.patterns._tiled import TilePattern

UNNAMED = (And, Or, _Combined, TilePattern)
"""What is built with & and |, and what only others derive from."""


def kinds() -> dict[str, type[Pattern]]:
    """The patterns that have a name, by that name in lower case."""
    found: dict[str, type[Pattern]] = {}
    waiting = list(Pattern.__subclasses__())
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind not in UNNAMED:
            found[kind.__name__.lower()] = kind
    return dict(sorted(found.items()))


def spelled(text: str) -> Pattern:
    """The pattern of a spelling: names with fields in brackets, joined by & and |, of which & binds closer; `BadInput`."""
    # global is a word that Python keeps for itself; capitalised it is a name, and case does not matter.
    readable = re.sub(r"\bglobal\b", "Global", text.strip())
    try:
        return _built(ast.parse(readable, mode="eval").body, text)
    except SyntaxError:
        raise _unreadable(text) from None
    except (RecursionError, MemoryError):
        raise BadInput(f"a pattern of {len(text)} letters is nested too deeply to be read") from None


def _built(node: ast.expr, text: str) -> Pattern:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        left, right = _built(node.left, text), _built(node.right, text)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, ast.Name):
        return _named(node.id, {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        return _named(node.func.id, {str(word.arg): _literal(word.value, text) for word in node.keywords})
    raise _unreadable(text)


def _named(name: str, fields: dict[str, Any]) -> Pattern:
    known = kinds()
    if name.lower() not in known:
        raise BadInput(f"no pattern is called {name!r}: {nearest(name.lower(), known)}")
    return from_dict(Pattern, {"choice": known[name.lower()].__name__, **fields}, f"pattern {name}")


def _literal(node: ast.expr, text: str) -> Any:
    """Numbers, words (quoted or not) and lists of them."""
    if isinstance(node, ast.Name):
        return node.id
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        raise _unreadable(text) from None
    return list(value) if isinstance(value, tuple) else value


def _unreadable(text: str) -> BadInput:
    return BadInput(f"the pattern {text!r} cannot be read: write it as window(size=64) | global(size=4) & causal")
