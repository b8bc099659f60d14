"""Parts are found by their file, configs survive JSON, and what is misspelt gets the nearest name."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

import hippodrome
from hippodrome import part
from hippodrome.channels.mlp import Mlp
from hippodrome.lti._base import LTI
from hippodrome.lti.s4d import S4D
from hippodrome.lti.shift import Shift
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, ChannelMixer, Mixer
from hippodrome.part import BadInput, Part, find, from_dict, names, nearest, part_name, to_dict
from hippodrome.patterns import Causal, Window


def through_json(config: Any, kind: Any = None) -> Any:
    return from_dict(kind or type(config), json.loads(json.dumps(to_dict(config))))


# Finding


def test_names_are_the_files_of_a_folder():
    assert {"attention", "h3", "ssm"} <= set(names("mixers"))
    assert not any(name.startswith("_") for name in names("lti"))
    assert names("no_such_folder") == []


def test_find_gives_the_class_of_the_file():
    assert find(Mixer, "attention") is Attention
    assert find(ChannelMixer, "mlp") is Mlp
    assert part_name(Attention) == "mixers/attention"
    assert Attention.Config.part is Attention
    assert Attention.Config.__qualname__ == "Attention.Config"


@pytest.mark.parametrize(
    ("slot", "wrong", "hint"), [(Mixer, "atention", "did you mean 'attention'"), (LTI, "s5d", "did you mean 's4d'")]
)
def test_a_near_name_is_offered(slot, wrong, hint):
    with pytest.raises(BadInput, match=f"no {slot.__name__} is called '{wrong}': {hint}"):
        find(slot, wrong)


def test_a_far_name_gets_the_list():
    with pytest.raises(BadInput, match=r"no ChannelMixer is called 'zzz': known: .*glu, mlp"):
        find(ChannelMixer, "zzz")
    assert nearest("x", []) == "known: none"


@pytest.mark.parametrize("name", ["../part", "_base", "attention.py", ""])
def test_only_part_files_can_be_named(name):
    with pytest.raises(BadInput):
        find(Mixer, name)


class Slot(Part, folder="slots_of_a_test"):
    """A slot whose folder a test fills."""


@pytest.fixture
def slots(tmp_path, monkeypatch):
    """Write files into the folder of `Slot`."""
    monkeypatch.setattr(part, "_ROOT", tmp_path)
    monkeypatch.setattr(hippodrome, "__path__", [*hippodrome.__path__, str(tmp_path)])
    (tmp_path / "slots_of_a_test").mkdir()

    def write(name: str, *lines: str) -> None:
        head = ["from tests.test_part import Slot"]
        (tmp_path / "slots_of_a_test" / f"{name}.py").write_text("\n".join([*head, *lines]))

    return write


@pytest.mark.parametrize(
    ("name", "lines", "count"),
    [
        ("none", ["x = 1"], 0),
        ("two", ["class A(Slot): pass", "class B(Slot): pass"], 2),
        ("hidden", ["class _A(Slot): pass"], 0),
    ],
)
def test_a_file_must_hold_exactly_one_part(slots, name, lines, count):
    slots(name, *lines)
    with pytest.raises(TypeError, match=f"{name} must hold one public Slot, it holds {count}"):
        find(Slot, name)


def test_helpers_and_imported_parts_do_not_count(slots):
    slots("base", "class Base(Slot): pass")
    slots(
        "derived", "from hippodrome.slots_of_a_test.base import Base", "class _Helper(Base): pass", "class Derived(Base): pass"
    )
    assert find(Slot, "derived").__name__ == "Derived"
    assert find(Slot, "base").__name__ == "Base"
    assert names("slots_of_a_test") == ["base", "derived"]


def test_a_part_without_a_config_has_an_empty_one(slots):
    slots("plain", "class Plain(Slot): pass")
    plain = find(Slot, "plain")
    assert plain.Config.part is plain
    assert to_dict(plain.Config()) == {"part": "slots_of_a_test/plain"}
    assert from_dict(Slot.Config, {"part": "slots_of_a_test/plain"}) == plain.Config()


# Configs to JSON and back


@dataclass(frozen=True, kw_only=True)
class Leaf:
    x: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Every kind of field there is."""

    count: int
    rate: float = 1.0
    name: str = "a"
    on: bool = False
    kind: Literal["small", "large"] = "small"
    maybe: int | None = None
    words: tuple[str, ...] = ()
    leaf: Leaf = field(default_factory=Leaf)
    leaves: tuple[Leaf, ...] = ()
    number_or_name: int | str | None = None
    leaf_or_words: Leaf | tuple[str, ...] | None = None
    nested: tuple[tuple[int, ...], ...] = ()


@pytest.mark.parametrize(
    "tree",
    [
        Tree(count=1),
        Tree(count=0, rate=1e-9, name="b", on=True, kind="large", maybe=3, words=("x", "y")),
        Tree(count=1, leaf=Leaf(x=2.0), leaves=(Leaf(), Leaf(x=-1.0)), nested=((1, 2), (), (3,))),
        Tree(count=1, number_or_name=7, leaf_or_words=Leaf(x=3.0)),
        Tree(count=1, number_or_name="seven", leaf_or_words=("a", "b")),
    ],
)
def test_configs_survive_json(tree):
    assert through_json(tree) == tree


def test_parts_and_choices_survive_json_inside_of_each_other():
    block = BlockConfig(
        mixer=SSM.Config(system=S4D.Config(d_state=4, init="legs")), channel=Mlp.Config(d_ff=3, activation="relu"), norm="rms"
    )
    assert through_json(block) == block
    window = BlockConfig(mixer=Attention.Config(pattern=Window(size=9)))
    assert through_json(window) == window
    assert through_json(window).mixer.pattern != Causal()


@pytest.mark.parametrize("system", [None, Shift.Config(d_state=8), S4D.Config(d_state=8)])
def test_an_optional_part_survives_json(system):
    from hippodrome.mixers.h3 import H3

    config = H3.Config(shift=system)
    assert through_json(config, Mixer.Config) == config


def test_an_integer_serves_as_a_float_and_a_list_as_a_tuple():
    tree = from_dict(Tree, {"count": 1, "rate": 2, "words": ["x"]})
    assert type(tree.rate) is float
    assert tree.words == ("x",)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="a config may not hold a object"):
        to_dict({"x": object()})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"count": 1, "rat": 2.0}, "config has no field 'rat': did you mean 'rate'"),
        ({}, "config lacks 'count', which a Tree needs"),
        ({"count": "1"}, "config.count must be int, not '1'"),
        ({"count": True}, "config.count must be int, not True"),
        ({"count": 1.0}, "config.count must be int, not 1.0"),
        ({"count": 1, "on": 1}, "config.on must be bool, not 1"),
        ({"count": 1, "kind": "lage"}, "config.kind is 'lage': did you mean 'large'"),
        ({"count": 1, "words": "xy"}, "config.words must be a list, not 'xy'"),
        ({"count": 1, "words": ["x", 2]}, r"config.words\[1\] must be str, not 2"),
        ({"count": 1, "leaf": {"y": 1.0}}, "config.leaf has no field 'y'"),
        ({"count": 1, "leaves": [{}, {"x": None}]}, r"config.leaves\[1\].x must be float, not None"),
        ({"count": 1, "maybe": "x"}, "config.maybe must be int, not 'x'"),
        ({"count": 1, "number_or_name": 1.5}, "config.number_or_name must be str, not 1.5"),
        ({"count": 1, "nested": [[1], [None]]}, r"config.nested\[1\]\[0\] must be int, not None"),
        ([], "config must be the fields of a Tree, not "),
    ],
)
def test_data_that_does_not_fit_is_named_with_its_place(data, message):
    with pytest.raises(BadInput, match=message):
        from_dict(Tree, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"part": "mixers/h4"}, "no Mixer is called 'h4': did you mean 'h3'"),
        ({"part": "channels/mlp"}, "config needs a part of mixers/, not 'channels/mlp'"),
        ({}, "config needs a part of mixers/, not None"),
        ({"part": "mixers/attention", "n_heads": 3}, "config has no field 'n_heads': did you mean 'n_head'"),
        (
            {"part": "mixers/attention", "pattern": {"choice": "Windo"}},
            "config.pattern has no Pattern 'Windo': did you mean 'Window'",
        ),
        ({"part": "mixers/attention", "pattern": {"choice": "Window", "size": 0}}, "a window of 0 keys"),
        ({"part": "mixers/attention", "pattern": {"choice": "Causal", "size": 1}}, "config.pattern has no field 'size'"),
        (
            {"part": "mixers/ssm", "system": {"part": "lti/s4d", "init": "lim"}},
            "config.system.init is 'lim': did you mean 'lin'",
        ),
        ({"part": "mixers/h3", "shift": {"part": "lti/shft"}}, "no LTI is called 'shft': did you mean 'shift'"),
    ],
)
def test_parts_that_do_not_fit_are_named(data, message):
    with pytest.raises(BadInput, match=message):
        from_dict(Mixer.Config, data)


def test_a_message_begins_with_the_place_it_was_told():
    with pytest.raises(BadInput, match=r"^runs/x/config\.json\.count must be int"):
        from_dict(Tree, {"count": None}, where="runs/x/config.json")


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        Attention.Config().n_head = 3
