"""A command line out of a function's signature: tyro parses, and whatever it refuses becomes one line.

A parameter is a flag, its annotation the type, its line in the docstring the help. A dataclass as a parameter spreads its
fields as flags (no prefix). Positional words are annotated `tyro.conf.Positional`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from hippodrome.part import BadInput, nearest

_SPREAD = (tyro.conf.OmitArgPrefixes,)


def parse(
    function: Callable[..., Any], args: Sequence[str], *, prog: str, given: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The keyword arguments that `args` mean for `function`, and the words that mean nothing to it.

    `given` names parameters that the command line does not set. A value that does not fit raises `BadInput`.
    """
    said = _Said("utf-8")
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return tyro.cli(
                _arguments_of(function, given), args=list(args), prog=prog, return_unknown_args=True, config=_SPREAD
            )
    except SystemExit:
        raise BadInput(f"{_verb(prog)}: {_plain(_above_the_rule(said.getvalue()))}") from None


def refuse(rest: Sequence[str], functions: Sequence[Callable[..., Any]], *, prog: str, given: Sequence[str] = ()) -> None:
    """`BadInput` naming the first of the words `rest` that nobody knows and the nearest flag of `functions`; none: nothing."""
    if not rest:
        return
    flag = next((word for word in rest if word.startswith("-")), None)
    if flag is None:
        raise BadInput(f"{_verb(prog)} knows no use for {rest[0]!r}: see {prog} --help")
    known = [name for function in functions for name in flags(function, given)]
    close = difflib.get_close_matches(flag.partition("=")[0].replace("_", "-"), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"see {prog} --help"
    raise BadInput(f"{_verb(prog)} has no flag {flag}: {hint}")


def flags(function: Callable[..., Any], given: Sequence[str] = ()) -> list[str]:
    """Every flag of a function, from its own help."""
    page = _help({"options": _arguments_of(function, given)}, "", "utf-8")
    return [name for head in re.findall(r"^│ +(--?\w[\w, -]*)", page, re.MULTILINE) for name in re.findall(r"--[\w-]+", head)]


def help_text(functions: dict[str, Callable[..., Any]], *, prog: str, given: Sequence[str] = ()) -> str:
    """One help page for the flags of several functions: the first is what the page is about, then a box a function."""
    groups = {name: _arguments_of(function, given) for name, function in functions.items()}
    return _help(groups, prog, sys.stdout.encoding or "ascii")


def _help(groups: dict[str, Callable[..., Any]], prog: str, encoding: str) -> str:
    first = next(iter(groups.values()))
    about = (inspect.getdoc(first) or "").partition("\n\nArgs:")[0]
    page: Callable[..., Any] = first if len(groups) == 1 else _joined(groups)
    said = _Said(encoding)
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        tyro.cli(page, args=["--help"], prog=prog, description=about, config=_SPREAD)
    return said.getvalue()


def _joined(groups: dict[str, Callable[..., Any]]) -> Callable[..., None]:
    """A function that takes the parameters of all `groups`."""

    def joined(**named: Any) -> None: ...

    kinds = {re.sub(r"\W", "_", name): Annotated[dict, tyro.conf.arg(constructor=each)] for name, each in groups.items()}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, keyword, annotation=kind) for name, kind in kinds.items()]
    joined.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    joined.__annotations__ = dict(kinds)
    return joined


def _arguments_of(function: Callable[..., Any], given: Sequence[str]) -> Callable[..., dict[str, Any]]:
    """A function of the same command line that returns its arguments: tyro would take a ValueError of the call for its own."""

    @functools.wraps(function)
    def arguments(**named: Any) -> dict[str, Any]:
        return named

    signature = inspect.signature(function, eval_str=True)
    kept = [parameter for name, parameter in signature.parameters.items() if name not in given]
    arguments.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return arguments


class _Said(io.StringIO):
    """What is printed, kept. tyro draws its boxes for the encoding of standard output."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


def _verb(prog: str) -> str:
    return prog.removeprefix("hippodrome ")


def _above_the_rule(box: str) -> str:
    """What a box of tyro says above its first rule, on one line."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    said = itertools.takewhile(lambda line: line == "" or line.strip("─"), lines)
    return " ".join(said) or "this command line cannot be read"


def _plain(said: str) -> str:
    """tyro's sentence in the words of the other messages; what is not known here stays as it is."""
    if choice := re.fullmatch(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.", said):
        word, argument, listed = choice.groups()
        known = re.findall(r"'([^']*)'", listed)
        return f"{argument} is {word!r}: {nearest(word, known)}"
    said = re.sub(r"^Missing from [^:]*: (\S+)", r"\1 is missing:", said)
    said = re.sub(r"^Error parsing (?!--)\w+: ", "", said)
    return re.sub(r"^Error parsing (--\S+):", r"\1:", said)
