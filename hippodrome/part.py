"""Parts and their configs: a replaceable piece is one file in the folder of its slot, and the folder is the registry.

A slot is a subclass of `Part` that names its folder (`class Mixer(Part, folder="mixers")`). A part is the one public
subclass of the slot in `hippodrome/<folder>/<name>.py`; it declares a frozen dataclass `Config` whose `build(*sizes)`
constructs it. Configs become JSON through `to_dict` and come back through `from_dict`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, cast

T = TypeVar("T")
P = TypeVar("P", bound="Part")

_ROOT = Path(__file__).parent


class BadInput(ValueError):
    """What a user gave cannot be used. The message is one line: the value, what is allowed, the nearest good one."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`word` and what it should have been, as the end of an error message."""
    known = sorted(choices)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) if known else 'none'}"


@dataclass(frozen=True, kw_only=True)
class OptimRule:
    """How the optimiser treats one parameter. `lr_max` caps the learning rate; `weight_decay` replaces the run's."""

    lr_scale: float = 1.0
    lr_max: float | None = None
    weight_decay: float | None = None


class Part:
    """A replaceable piece, declared by one frozen Config and found by its file name."""

    folder: ClassVar[str]
    optim_rules: ClassVar[Mapping[str, OptimRule]] = {}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Base of all part configs. `build(*sizes)` constructs the part the config is nested in."""

        part: ClassVar[type[Part]]

        def build(self, *sizes: Any) -> Any:
            return self.part(self, *sizes)

    def __init_subclass__(cls, folder: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if folder is not None:
            cls.folder = folder
        if "Config" not in cls.__dict__:
            inherited = cls.Config
            plain = type("Config", (inherited,), {"__module__": cls.__module__})
            type.__setattr__(cls, "Config", dataclass(frozen=True, kw_only=True)(plain))
        cls.Config.part = cls
        cls.Config.__qualname__ = f"{cls.__qualname__}.Config"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def names(folder: str) -> list[str]:
    """Names of the parts in `hippodrome/<folder>`: the stems of its files. Imports nothing."""
    return sorted(path.stem for path in (_ROOT / folder).glob("*.py") if not path.stem.startswith("_"))


@functools.cache
def find(slot: type[P], name: str) -> type[P]:
    """The part `name` of a slot. Imports one file, which must hold exactly one public subclass of the slot."""
    if name not in names(slot.folder):
        raise BadInput(f"no {slot.__name__} is called {name!r}: {nearest(name, names(slot.folder))}")
    module = importlib.import_module(f"hippodrome.{slot.folder}.{name}")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, slot)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must hold one public {slot.__name__}, it holds {len(found)}")
    return found[0]


def part_name(part: type[Part]) -> str:
    """`mixers/h3` for the class H3 of hippodrome/mixers/h3.py."""
    return f"{part.folder}/{part.__module__.rsplit('.', 1)[-1]}"


class Choice:
    """A family of frozen dataclasses of one module, told apart by class name when a config is written (patterns)."""


def to_dict(config: Any) -> Any:
    """A config as JSON data. Parts carry their file (`"part": "mixers/h3"`), choices their class name."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        data: dict[str, Any] = {}
        if isinstance(config, Part.Config):
            data["part"] = part_name(config.part)
        elif isinstance(config, Choice):
            data["choice"] = type(config).__name__
        return data | {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise TypeError(f"a config may not hold a {type(config).__name__}: {config!r}")


def from_dict(kind: type[T], data: Any, where: str = "config") -> T:
    """The config of type `kind` that `to_dict` wrote as `data`. An unknown field raises, naming the nearest."""
    if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, Choice)):
        return _dataclass_from(kind, data, where)
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return _union_from(typing.get_args(kind), data, where)
    if origin is tuple:
        _expect(isinstance(data, list), where, "a list", data)
        return tuple(from_dict(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(data))  # type: ignore[return-value]
    if origin is Literal:
        allowed = typing.get_args(kind)
        if data not in allowed:
            raise BadInput(f"{where} is {data!r}: {nearest(str(data), map(str, allowed))}")
        return cast(T, data)
    if kind is float and type(data) is int:
        return float(data)  # type: ignore[return-value]
    _expect(isinstance(kind, type) and type(data) is kind, where, getattr(kind, "__name__", str(kind)), data)
    return cast(T, data)


def _dataclass_from(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, f"the fields of a {kind.__qualname__}", data)
    fields = dict(data)
    if issubclass(kind, Part.Config):
        kind = _part_config(kind, fields.pop("part", None), where)
    elif issubclass(kind, Choice):
        kind = _choice(kind, fields.pop("choice", None), where)
    elif "part" in fields:
        # A slot may stand for a plain config, as a whole model for that of a stack of blocks.
        slots = [slot.Config for slot in Part.__subclasses__() if issubclass(slot.Config, kind)]
        kind = _part_config(slots[0], fields.pop("part"), where) if slots else kind
    known = {field.name for field in dataclasses.fields(kind)}
    for name in fields:
        if name not in known:
            raise BadInput(f"{where} has no field {name!r}: {nearest(name, known)}")
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in fields and _required(f)]
    if missing:
        raise BadInput(f"{where} lacks {', '.join(map(repr, missing))}, which a {kind.__qualname__} needs")
    hints = typing.get_type_hints(kind)
    return kind(**{name: from_dict(hints[name], value, f"{where}.{name}") for name, value in fields.items()})


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _part_config(kind: type[Part.Config], name: Any, where: str) -> type[Part.Config]:
    slot_folder = kind.part.folder
    folder, _, stem = str(name).partition("/")
    if folder != slot_folder:
        raise BadInput(f"{where} needs a part of {slot_folder}/, not {name!r}")
    slot = next(base for base in kind.part.__mro__ if getattr(base, "folder", None) == slot_folder and Part in base.__bases__)
    return find(slot, stem).Config


def _choice(kind: type[Choice], name: Any, where: str) -> type[Choice]:
    found = {cls.__name__: cls for cls in _subclasses(kind)}
    if name not in found:
        raise BadInput(f"{where} has no {kind.__name__} {name!r}: {nearest(str(name), found)}")
    return found[name]


def _subclasses(kind: type[T]) -> Iterable[type[T]]:
    sub: type[T]
    for sub in kind.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _union_from(options: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    for option in rest[:-1]:
        try:
            return from_dict(option, data, where)
        except BadInput:
            continue
    return from_dict(rest[-1], data, where)


def _expect(ok: bool, where: str, wanted: str, data: Any) -> None:
    if not ok:
        raise BadInput(f"{where} must be {wanted}, not {data!r}")
