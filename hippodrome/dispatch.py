"""From the words of a command line to the call of a verb, a function whose signature is its command line.

A verb that takes recipes has a parameter `recipe` (one, with its name), `recipes` (by name) or `races` (recipes by the value
of the flag that the verb's own `over` names); the flags of the recipes follow the verb's own. What a user did wrong ends in
one line and exit code 2, memory that does not suffice in one line and 1, Ctrl-C in 130; anything else is a bug and shows its
traceback.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

from hippodrome import __version__, flags
from hippodrome.memory import shortage
from hippodrome.part import BadInput, nearest
from hippodrome.recipes import find_recipe
from hippodrome.run import RunConfig

Verb = Callable[..., None]
_GIVEN = ("recipe", "recipes", "races")


def dispatch(verbs: Mapping[str, Verb], words: Sequence[str]) -> int:
    """Run one command line, its first word one of `verbs`, and return its exit code."""
    try:
        with _one_line_warnings():
            _run(verbs, list(words))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has left. What is still buffered must not raise again when Python closes it.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BadInput as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C", code=130)
    except Exception as failure:
        if (lacking := shortage(failure)) is None:
            raise
        return _fail(f"{lacking}: give a smaller --batch-size, --micro-batch or --length, or a smaller model", code=1)
    return 0


def _fail(message: str, code: int = 2) -> int:
    print("hippodrome:", " ".join(message.split()), file=sys.stderr)
    return code


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    plain = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"hippodrome: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = plain


def _run(verbs: Mapping[str, Verb], words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_overview(verbs))
        return
    if words[0] == "--version":
        print(f"hippodrome {__version__}")
        return
    if words[0] not in verbs:
        raise BadInput(f"no verb is called {words[0]!r}: {nearest(words[0], verbs)}")
    verb, rest, prog = verbs[words[0]], words[1:], f"hippodrome {words[0]}"
    takes_recipes = set(inspect.signature(verb).parameters) & set(_GIVEN)
    if not takes_recipes and {"-h", "--help"} & set(rest):
        print(flags.help_text({words[0]: verb}, prog=prog))
        return
    if takes_recipes:
        _with_recipes(verb, rest, prog)
        return
    named, unknown = flags.parse(verb, rest, prog=prog)
    flags.refuse(unknown, [verb], prog=prog)
    verb(**named)


def _with_recipes(verb: Verb, words: list[str], prog: str) -> None:
    """Parse the verb's own flags, then the rest as the names of recipes and flags that every one of them takes."""
    wants_help = bool({"-h", "--help"} & set(words))
    named, rest = flags.parse(verb, [word for word in words if word not in ("-h", "--help")], prog=prog, given=_GIVEN)
    first_flag = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    names, rest = rest[:first_flag], rest[first_flag:]
    found = {name: find_recipe(name) for name in names}
    if wants_help:
        groups = {prog.rpartition(" ")[2]: verb, **dict(list(found.items())[:1])}
        print(flags.help_text(groups, prog=" ".join([prog, *names[:1]]), given=_GIVEN))
        return
    given = next(name for name in _GIVEN if name in inspect.signature(verb).parameters)
    one = given == "recipe"
    if not names or (one and len(names) > 1):
        wanted = "one recipe" if one else "the names of recipes"
        verb_name = prog.rpartition(" ")[2]
        raise BadInput(f"{verb_name} needs {wanted} before the flags, not {' '.join(names) or 'none'}: see hippodrome list")

    def configs(*more: str) -> dict[str, RunConfig]:
        made = {}
        for name, function in found.items():
            arguments, unknown = flags.parse(function, [*rest, *more], prog=f"{prog} {name}")
            flags.refuse(unknown, [verb, function], prog=f"{prog} {name}", given=_GIVEN)
            made[name] = function(**arguments)
        return made

    if given == "races":
        flag, *values = named["over"] or ("none",)
        if not values:
            raise BadInput(f"over is {flag}: give a flag of the recipes and its values, as in --over task shift cumsum")
        verb({value: configs(f"--{flag.lstrip('-')}", value) for value in values}, **named)
        return
    verb(next(iter(configs().items())) if one else configs(), **named)


def _overview(verbs: Mapping[str, Verb]) -> str:
    width = max(map(len, verbs))
    lines = [f"  {name:<{width}}  {(inspect.getdoc(verb) or '').partition(chr(10))[0]}" for name, verb in verbs.items()]
    head = f"hippodrome {__version__}: train, sample, score, time and compare long-sequence models under the same rules."
    return "\n".join([head, "", *lines, "", "hippodrome VERB --help and hippodrome train RECIPE --help show the flags."])
