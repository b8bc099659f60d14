"""A pattern as a text and numbers, which a graph can hold: custom operators take no objects."""

from __future__ import annotations

import ast
import dataclasses
import functools
from typing import Any

import torch

from hippodrome.part import BadInput
from hippodrome.patterns import Pattern

Spelled = tuple[str, tuple[int, ...]]

_kinds: dict[str, type[Pattern]] = {}


def spelled(pattern: Pattern) -> Spelled:
    """A text that has %d where `pattern` has a number, and those numbers; torch.compile traces it, whatever made the pattern.

    The numbers stand apart so that a size which a graph does not know, such as the length of an encoder's BigBird, may be one.
    BadInput for a field that is neither a number, a word, None, a pattern nor a tuple of such.
    """
    return _traced(pattern) if torch.compiler.is_compiling() else _remembered(pattern)


@functools.lru_cache(256)
def read(text: str, numbers: tuple[int, ...]) -> Pattern:
    """The pattern that was spelled so in this process."""
    return _pattern(ast.literal_eval(text % numbers))


def _traced(pattern: Pattern) -> Spelled:
    numbers: list[int] = []
    return _text(pattern, numbers), tuple(numbers)


_remembered = functools.lru_cache(256)(_traced)


def _text(value: object, numbers: list[int]) -> str:
    if isinstance(value, Pattern):
        text = ""
        for field in dataclasses.fields(value):
            text += _text(getattr(value, field.name), numbers) + ","
        return f"{{{_name(type(value))!r}:({text})}}"
    if isinstance(value, tuple):
        text = ""
        for item in value:
            text += _text(item, numbers) + ","
        return f"({text})"
    if isinstance(value, int) and not isinstance(value, bool):
        numbers.append(value)
        return "%d"
    if value is None or isinstance(value, bool | float | str):
        return repr(value).replace("%", "%%")
    raise BadInput(f"{value!r} in a pattern: its fields may be numbers, words, None, patterns and tuples of such")


def _name(kind: type[Pattern]) -> str:
    """A name that is `kind`'s alone: a class that is defined anew, as in a notebook, is another one."""
    name = kind.__name__
    while _kinds.setdefault(name, kind) is not kind:
        name += "'"
    return name


# torch.compile runs it as it traces and keeps the answer: the class is known then. What torch.compiler.assume_constant_result
# does, which would import the compiler.
_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _pattern(value: Any) -> Any:
    if isinstance(value, dict):
        ((name, values),) = value.items()
        kind = _kinds[name]
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**dict(zip(names, map(_pattern, values), strict=True)))
    return tuple(map(_pattern, value)) if isinstance(value, tuple) else value
