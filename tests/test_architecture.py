"""The house keeps its shape: imports point down, importing is cheap, the folder is the registry, and demolition is cheap."""

import ast
import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hippodrome
import hippodrome.lti._base
import hippodrome.model
import hippodrome.task
from hippodrome.part import Part, find, names

PACKAGE = Path(hippodrome.__file__).parent
TESTS = Path(__file__).parent

FLOORS = (
    "part state patterns positions task files documents tokenizer data devices metrics flags plots tables",
    "ops norms inits stepper slots model memory tasks",
    "run",
    "lti embeds readouts checkpoint",
    "mixers channels models cuda_graph optim step train sampling stop_strings decoder generation timing evaluate by_position "
    "parity progress",
    "recipes compare grid catalog h3_checkpoint h3_reference convert convert_vit doctor verify bench",
    "demo dispatch cli_tools cli __main__",
)
"""From the ground up. A module imports from its own floor and those below."""

REPLACEABLE = ("recipes", "convert", "convert_vit", "demo", "bench")
"""What may name single parts, and so goes or changes with them; parts may too. The rest of the house may not."""

SLOTS = {slot.folder: slot for slot in Part.__subclasses__() if slot.__module__.startswith("hippodrome.")}


def modules() -> dict[str, Path]:
    """Module name without `hippodrome.` -> file, for every module but the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            found[name] = path
    return found


MODULES = modules()


def imported(name: str, *, at_import: bool) -> set[str]:
    """The modules of the package that `name` imports; at_import: only those that importing it loads. Types do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and at_import:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            found.update({f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    inside = {target.removeprefix("hippodrome.") for target in found if target.startswith("hippodrome.")}
    return {target for target in inside if target in MODULES} - {name}


def floor(name: str) -> int:
    top = name.partition(".")[0]
    places = [i for i, line in enumerate(FLOORS) if top in line.split()]
    assert len(places) == 1, f"hippodrome/{top} stands on no floor: add it to FLOORS and to docs/design.md"
    return places[0]


def parts() -> list[str]:
    return [f"{folder}.{name}" for folder in sorted(SLOTS) for name in names(folder)]


def dependents(name: str) -> set[str]:
    """The modules that cannot be imported without `name`, itself included."""
    needs = {module: imported(module, at_import=True) for module in MODULES}
    gone = {name}
    while more := {module for module, need in needs.items() if need & gone} - gone:
        gone |= more
    return gone


def run_python(code: str, *arguments: str, path: Path = PACKAGE.parent) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", inspect.cleandoc(code), *arguments]
    result = subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


# Imports


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    for target in imported(name, at_import=False):
        assert floor(target) <= floor(name), f"{name} imports {target}, which stands above it"


def test_imports_do_not_run_in_circles():
    """An operation and its backends are one: the backends register themselves with it."""

    def node(name: str) -> str:
        return ".".join(name.split(".")[:2]) if name.startswith("ops.") else name

    graph: dict[str, set[str]] = {}
    for name in MODULES:
        targets = {node(target) for target in imported(name, at_import=False)} - {node(name)}
        graph.setdefault(node(name), set()).update(targets)
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_the_floors_are_those_of_the_design():
    """Every module that the page places stands where it says."""
    page = " ".join((PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8").split())
    chain = page.partition("`tests/test_architecture.py`): ")[2].partition(". ")[0]
    storeys = [line.strip("` ").replace("`", "").split(", ") for line in chain.split(" > ")]
    assert len(storeys) >= 6, chain
    for upper, lower in itertools.pairwise(storeys):
        assert min(map(floor, upper)) > max(map(floor, lower)), f"{upper} above {lower}"


def test_import_hippodrome_brings_torch_and_nothing_heavier():
    added = json.loads(
        run_python("""
            import json, sys, torch
            before = set(sys.modules)
            import hippodrome
            print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
        """)
    )
    assert set(added) - set(sys.stdlib_module_names) - {"torch"} == {"hippodrome"}


def test_importing_every_part_brings_no_tool():
    """Parts are for training on machines that have torch and numpy; drawing, printing and reading text come when asked for."""
    added = json.loads(
        run_python(
            """
            import importlib, json, sys, torch, numpy
            before = set(sys.modules)
            for name in sys.argv[1:]:
                importlib.import_module(f"hippodrome.{name}")
            print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
            """,
            *parts(),
        )
    )
    assert not set(added) & {"matplotlib", "rich", "tyro", "tokenizers", "triton", "pyarrow", "datasets", "zstandard"}


# Parts


def test_every_folder_of_parts_has_a_slot():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert folders - {"ops", "recipes", "bench", "export", "patterns"} == set(SLOTS)


@pytest.mark.parametrize("name", parts())
def test_a_part_is_one_file_with_one_class_that_says_what_it_computes(name):
    folder, _, stem = name.partition(".")
    part = find(SLOTS[folder], stem)
    module = inspect.getmodule(part)
    assert module is not None
    assert module.__doc__, f"hippodrome/{folder}/{stem}.py begins with what it computes, and where it is from"
    assert part.__doc__ != SLOTS[folder].__doc__
    assert part.__doc__, f"{part.__name__} has no docstring"
    assert part.Config.part is part
    assert part.Config.__dataclass_params__.frozen
    named = stem.replace("_", "")
    assert part.__name__.lower() == named, f"{part.__name__} lives in {stem}.py"


@pytest.mark.parametrize("name", parts())
def test_a_part_has_a_test_of_its_own(name):
    folder, _, stem = name.partition(".")
    assert (TESTS / folder / f"test_{stem}.py").is_file()


@pytest.mark.parametrize("name", parts())
def test_only_replaceable_modules_name_a_part(name):
    outside = {module for module in dependents(name) if module.partition(".")[0] not in (*REPLACEABLE, *SLOTS)}
    assert not outside, f"{sorted(outside)} cannot be imported without hippodrome/{name.replace('.', '/')}.py"


# Demolition

DELETE_ONE = """
    import importlib, importlib.util, json, os, sys, traceback
    from pathlib import Path
    import torch, numpy

    broken = {}
    for part, others in json.loads(Path("plan.json").read_text()).items():
        path = Path("hippodrome", *part.split(".")).with_suffix(".py")
        hidden = path.rename(path.with_suffix(".gone"))
        reader, writer = os.pipe()
        if not os.fork():
            failed = {}
            for name in ["hippodrome", *(f"hippodrome.{other}" for other in others)]:
                try:
                    importlib.import_module(name)
                except BaseException:
                    failed[name] = traceback.format_exc(limit=-1)
            from hippodrome.part import names
            if path.stem in names(path.parent.name):
                failed["names"] = "still listed"
            if importlib.util.find_spec(f"hippodrome.{part}") is not None:
                failed["the part itself"] = "still imports"
            with os.fdopen(writer, "w") as answer:
                json.dump(failed, answer)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            broken.update({f"{name} without {part}": why for name, why in json.loads(answer.read()).items()})
        os.wait()
        hidden.rename(path)
    print(json.dumps(broken))
"""
"""Hides one part at a time; a fork of a process that has torch already imports all the rest without it."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_deleting_a_part_leaves_the_rest_standing(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "hippodrome", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    plan = {part: sorted(set(MODULES) - dependents(part) - {"__main__"}) for part in parts()}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert len(plan) >= 10
    assert json.loads(run_python(DELETE_ONE, path=tmp_path)) == {}
