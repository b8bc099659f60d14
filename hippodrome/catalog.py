"""What there is: the parts and recipes by their files. Files are read, and imported only where their defaults are shown."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hippodrome.part import BadInput, Part, names, nearest
from hippodrome.recipes import find_recipe, recipes

if TYPE_CHECKING:
    from torch import Tensor

_ROOT = Path(__file__).parent
SLOTS = {
    "mixers": "along the sequence",
    "channels": "within a position",
    "lti": "linear time-invariant systems, inside mixers",
    "embeds": "inputs to vectors",
    "readouts": "vectors to what the task asks for",
    "models": "systems that are no stack of blocks",
    "tasks": "what is learned and how it is scored",
}
"""Folder of each slot -> what its parts do."""


def overview() -> str:
    """Every recipe, part, op and pattern with the first line of its file."""
    sections = [("recipes: hippodrome train RECIPE", recipes())]
    for folder, purpose in SLOTS.items():
        sections.append((f"{folder}: {purpose}", {name: _summary(_file(folder, name)) for name in names(folder)}))
    sections.append(("ops: a reference and its backends", {name: _summary(_file("ops", name)) for name in _ops()}))
    sections.append(("patterns: which keys a query sees", {name.lower(): line for name, line in _patterns().items()}))
    lines = []
    for title, entries in sections:
        width = max(map(len, entries), default=0)
        lines += [title, *(f"  {name:<{width}}  {line}" for name, line in entries.items()), ""]
    return "\n".join(lines).rstrip()


def describe(name: str) -> str:
    """All that bears a name: what its file says, its fields and their defaults, its files, the recipes that use it."""
    known = [f"{folder}/{part}" for folder in SLOTS for part in names(folder)]
    known += [f"ops/{op}" for op in _ops()] + [f"recipes/{recipe}" for recipe in recipes()]
    known += [f"patterns/{pattern.lower()}" for pattern in _patterns()]
    found = [entry for entry in known if name in (entry, entry.partition("/")[2])]
    if not found:
        plain = {entry.partition("/")[2] for entry in known}
        raise BadInput(f"nothing is called {name!r}: {nearest(name, known if '/' in name else plain)}")
    return "\n\n\n".join(map(_describe_one, found))


EXAMPLES = {
    "plain": ("full", "causal", "window(size=12)"),
    "far": ("prefix(size=16)", "global(size=6)", "strided(stride=8)"),
    "blocks": ("chunk(size=16)", "documents(lengths=[12, 28])", "butterfly(tile=8)"),
    "random": ("random(tile=8, per_row=2)", "bigbird(tile=8, n_random=1)", "bigbird(tile=8, n_random=1, form=encoder)"),
    "combined": ("strided(stride=8) & causal", "window(size=12) | global(size=6)", "window(size=12) | global(size=6) & causal"),
}
"""Every pattern, sized for about 64 tokens: what `show pattern:all` draws, a row each."""

LONGEST_PICTURE = 4096
"""Tokens of a pattern up to which its mask is drawn: a pixel a pair."""


def describe_pattern(text: str, *, length: int, tile: int, out: Path | None = None) -> str:
    """Facts of a spelled pattern over `length` tokens, of its first head; `out`: a PNG of its mask and its tiles.

    "all": a line for each of `EXAMPLES`, and all of them in one picture. `BadInput` where a pattern cannot be read or sized.
    """
    from hippodrome.patterns import spelled

    if text == "all":
        return _describe_all(length, tile, out)
    pattern = spelled(text).sized(length, 1)
    kept = _kept(pattern.tiles(length, length, tile), tile)
    if out is not None:
        _draw_patterns(out, {"": (text,)}, length, tile)
    reach = "unbounded" if pattern.reach is None else f"{pattern.reach} keys"
    return f"{pattern}\n\ncausal: {pattern.causal}\nreach: {reach}\nover {length} tokens: {kept}"


def _describe_all(length: int, tile: int, out: Path | None) -> str:
    from hippodrome.patterns import spelled

    lines = []
    for text in (text for row in EXAMPLES.values() for text in row):
        pattern = spelled(text).sized(length, 1)
        looks = "causal" if pattern.causal else "both ways"
        lines.append(f"{text:<45} {looks:<10} {_kept(pattern.tiles(length, length, tile), tile)}")
    if out is not None:
        _draw_patterns(out, EXAMPLES, length, tile)
    return "\n".join(lines)


def _kept(tiles: Tensor, tile: int) -> str:
    return f"{int(tiles.sum())} of {tiles.numel()} tiles of {tile} ({float(tiles.float().mean()):.1%})"


def _draw_patterns(path: Path, rows: Mapping[str, Sequence[str]], length: int, tile: int) -> None:
    """A PNG of named rows of spelled patterns: the mask of each under its spelling, and its tiles; black is seen."""
    from hippodrome import plots
    from hippodrome.patterns import spelled

    if length > LONGEST_PICTURE:
        raise BadInput(f"a picture of {length} x {length} pairs: take --length {LONGEST_PICTURE} or less, or leave --out away")
    drawn: dict[str, list[tuple[str, Any]]] = {}
    for name, texts in rows.items():
        drawn[name] = []
        for text in texts:
            pattern = spelled(text).sized(length, 1)
            tiles = pattern.tiles(length, length, tile)
            counted = f"{int(tiles.sum())} of {tiles.numel()} tiles of {tile}"
            for caption, seen in ((text, pattern.mask(length, length)), (counted, tiles)):
                drawn[name].append((textwrap.fill(caption, 26), 255 - 255 * seen.int().numpy()))
    plots.draw_images(path, drawn, f"{length} queries (down) x {length} keys")


def _describe_one(entry: str) -> str:
    folder, _, name = entry.partition("/")
    if folder == "recipes":
        function = find_recipe(name)
        file = Path(inspect.getfile(function))
        return "\n\n".join([entry, inspect.getdoc(function) or "", _defaults_of(function), _files([file])])
    if folder == "patterns":
        import hippodrome.patterns

        pattern = next(getattr(hippodrome.patterns, each) for each in _patterns() if each.lower() == name)
        return "\n\n".join([entry, inspect.getdoc(pattern) or "", _fields(pattern), _files([Path(inspect.getfile(pattern))])])
    file = _file(folder, name)
    sections = [entry, ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""]
    if folder != "ops":
        sections.append(_fields(_part(folder, name).Config))
    sections.append(_files([*([file] if folder != "ops" else sorted(file.parent.glob("*.py"))), *_beside(folder, name)]))
    users = [recipe for recipe in recipes() if _uses(recipe, folder, name)]
    if users:
        sections.append("recipes that use it: " + ", ".join(users))
    return "\n\n".join(section for section in sections if section)


def _part(folder: str, name: str) -> type[Part]:
    import importlib

    module = importlib.import_module(f"hippodrome.{folder}.{name}")
    return next(
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Part)
        and value.__module__ == module.__name__
        and value.folder == folder
        and not value.__name__.startswith("_")
    )


def _fields(config: type[Any]) -> str:
    """The fields of a config and their defaults, a line each."""
    lines = []
    for field in dataclasses.fields(config):
        default: Any = "required"
        if field.default is not dataclasses.MISSING:
            default = repr(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = repr(field.default_factory())
        lines.append(f"  {field.name}: {field.type} = {default}")
    return "\n".join(["fields and defaults:", *(lines or ["  none"])])


def _defaults_of(function: Any) -> str:
    """The keyword arguments of a recipe; those that are dataclasses are spread into their fields, as on the command line."""
    lines = []
    for name, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(parameter.default):
            for field in dataclasses.fields(parameter.default):
                lines.append(f"  {field.name} = {getattr(parameter.default, field.name)!r}")
        else:
            lines.append(f"  {name} = {parameter.default!r}")
    return "\n".join(["flags and defaults:", *lines])


def _files(paths: list[Path]) -> str:
    return "\n".join(["files:", *(f"  {_short(path)}" for path in paths)])


def _short(path: Path) -> str:
    return str(path.relative_to(_ROOT.parent))


def _beside(folder: str, name: str) -> list[Path]:
    """The test and the page of a part, where the source tree is at hand."""
    root = _ROOT.parent
    near = [root / "tests" / folder / f"test_{name}.py", root / "docs" / "systems" / f"{name}.md"]
    return [path for path in near if path.is_file()]


def _uses(recipe: str, folder: str, name: str) -> bool:
    """Whether the recipe's file, or the shared files it imports, import the part."""
    file = _ROOT / "recipes" / f"{recipe.partition('.')[0]}.py"
    wanted = f"hippodrome.{folder}.{name}"
    texts = [file.read_text(encoding="utf-8")]
    texts += [
        shared.read_text(encoding="utf-8") for shared in file.parent.glob("_*.py") if f"recipes.{shared.stem} " in texts[0]
    ]
    return any(f"from {wanted} import" in text for text in texts)


def _file(folder: str, name: str) -> Path:
    return _ROOT / folder / (f"{name}/__init__.py" if folder == "ops" else f"{name}.py")


def _summary(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _ops() -> list[str]:
    return sorted(path.parent.name for path in (_ROOT / "ops").glob("*/__init__.py"))


def _patterns() -> dict[str, str]:
    """Class -> first line of its docstring, of every pattern, what combines them included."""
    from hippodrome.patterns import And, Or, kinds

    classes = [*kinds().values(), And, Or]
    return {kind.__name__: (inspect.getdoc(kind) or "").partition("\n")[0] for kind in classes}
