import json
import re

import pytest
import torch

from hippodrome.ops.long_conv import _table

BF16, F32 = torch.bfloat16, torch.float32
SHIPPED = json.loads(_table.FILE.read_text())
MEASURED = [row for rows in SHIPPED.values() for row in rows if row["source"] != _table.COUNTED]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """An empty table in place of the one that is shipped."""
    monkeypatch.setattr(_table, "FILE", tmp_path / "table.json")
    yield _table.FILE
    _table._rows.cache_clear()
    _table.fastest.cache_clear()


def row(length, source="measured: here, 2026-01-01", gated=False, **ms):
    point = _table.Point(8, 64, length, length)
    return {"pass": "forward", "dtype": "float32", "gated": gated, **point._asdict(), "ms": ms, "source": source}


def choose(device, length, gated=False):
    return _table.fastest("forward", F32, device, _table.Point(2, 768, length, length), gated)


def test_the_nearest_point_decides(file):
    _table.save("b", [row(256, fft=1.0)], file)
    _table.save("a", [row(256, toeplitz=1.0, fft=2.0), row(4096, toeplitz=3.0, fft=2.5)], file)
    assert [choose("a", length) for length in (1, 300, 900, 1100, 1 << 20)] == ["toeplitz"] * 3 + ["fft"] * 2
    assert choose("b", 300) == "fft"


def test_the_device_measured_last_stands_for_those_unknown(file):
    _table.save("a", [row(256, toeplitz=1.0)], file)
    _table.save("b", [row(256, fft=1.0)], file)
    assert choose("unknown", 300) == "fft"
    _table.save("a", [row(256, partitioned=1.0)], file)
    assert choose("unknown", 300) == choose("a", 300) == "partitioned"
    assert list(json.loads(file.read_text())) == ["a", "b"]


def test_calls_with_gates_have_rows_of_their_own(file):
    _table.save("a", [row(256, toeplitz=1.0, fft=2.0), row(256, gated=True, toeplitz=4.0, fft=3.0)], file)
    assert (choose("a", 256), choose("a", 256, gated=True)) == ("toeplitz", "fft")


@pytest.mark.parametrize(("counted", "path"), [(0.9, "toeplitz"), (0.7, "fft")])
def test_a_counted_time_stands_against_a_measured_one_if_it_is_much_less(file, counted, path):
    _table.save("a", [row(256, toeplitz=1.0), row(256, source="counted", fft=counted, partitioned=5.0)], file)
    assert choose("a", 256) == path


def test_counting_leaves_out_what_is_known():
    point = next(p for p in _table.grid() if p.length == 2048)
    known = {
        "pass": "backward",
        "dtype": "bfloat16",
        "gated": True,
        **point._asdict(),
        "ms": {"fft": 1.0},
        "source": "measured",
    }
    whole, rest = _table.counted(), _table.counted([known])
    assert len(whole) == len(rest)
    ((all_paths, others),) = [(a, b) for a, b in zip(whole, rest, strict=True) if a != b]
    assert all_paths["ms"].keys() - others["ms"].keys() == {"fft"}
    assert all(others[name] == known[name] for name in ("pass", "dtype", "gated", *_table.Point._fields))


def test_tuning_replaces_a_device_s_rows(file, monkeypatch):
    monkeypatch.setattr(_table, "_compile", lambda *_: None)
    monkeypatch.setattr(_table, "_measure", lambda *_: {kind: {"fft": 1.0} for kind in _table.KINDS})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    _table.save("a card", _table.counted(), file)
    said = []
    _table.save("a card", _table.tune("cuda", say=said.append), file)
    (rows,) = json.loads(file.read_text()).values()
    assert len(rows) == len(_table.counted()) == len(said) - 1
    assert all(re.fullmatch(r"measured: a card, \d{4}-\d\d-\d\d", row["source"]) for row in rows)
    assert _table.fastest("backward", BF16, "a card", _table.Point(1, 1, 64, 64), True) == "fft"


def test_every_row_that_is_shipped_has_a_source():
    for device, rows in SHIPPED.items():
        for one in rows:
            measured = rf"measured: {re.escape(device)}, \d{{4}}-\d\d-\d\d(, less the forward)?"
            assert one["source"] == "counted" or re.fullmatch(measured, one["source"])
            assert one["ms"].keys() <= set(_table.PATHS)


def test_what_is_shipped_is_what_was_measured_and_counting_for_the_rest():
    (rows,) = SHIPPED.values()
    assert len(MEASURED) == 20
    assert rows == MEASURED + _table.counted(MEASURED)


@pytest.mark.parametrize("one", MEASURED, ids=lambda one: f"{one['pass']}-{one['gated']}-{one['length']}")
def test_counting_comes_as_near_to_what_was_measured_as_the_margin(one):
    count = _table._count(_table._point(one), getattr(torch, one["dtype"]), one["pass"], one["gated"])
    for path, ms in one["ms"].items():
        assert 1 / _table.MARGIN < count[path] / ms < _table.MARGIN


@pytest.mark.parametrize(
    ("batch", "length", "forward", "backward", "gated_forward", "gated_backward"),
    [
        (128, 1024, "toeplitz", "toeplitz", "toeplitz", "toeplitz"),
        (64, 2048, "toeplitz", "toeplitz", "toeplitz", "partitioned"),
        (32, 4096, "toeplitz", "partitioned", "partitioned", "partitioned"),
        (16, 8192, "partitioned", "partitioned", "partitioned", "partitioned"),
        (8, 16384, "partitioned", "partitioned", "partitioned", "partitioned"),
        (2, 65536, "partitioned", "fft", "partitioned", "fft"),
        (1, 1 << 20, "fft", "fft", "fft", "fft"),
    ],
)
def test_the_choices_that_are_shipped(batch, length, forward, backward, gated_forward, gated_backward):
    point = _table.Point(batch, 768, length, length)
    chosen = [_table.fastest(which, BF16, "no such device", point, gated) for gated in (False, True) for which in _table.PASSES]
    assert chosen == [forward, backward, gated_forward, gated_backward]


@pytest.mark.parametrize("dtype", _table.DTYPES)
def test_the_table_that_is_shipped_knows_every_call(dtype):
    for which, gated in _table.KINDS:
        for length in (1, 777, 8193, 5_000_000):
            point = _table.Point(3, 96, length, length)
            assert _table.fastest(which, dtype, "no such device", point, gated) in _table.PATHS


def test_a_path_that_cannot_take_a_call_is_not_chosen(file):
    _table.save("a", [row(256, toeplitz=3.0, block_fft=1.0), row(1024, block_fft=1.0), row(4096, fft=2.0)], file)
    point = _table.Point(8, 64, 1024, 1024)
    ask = lambda *able: _table.fastest("forward", F32, "a", point, False, able)  # noqa: E731
    assert ask(*_table.PATHS) == "block_fft"
    assert ask("toeplitz", "partitioned") == "toeplitz"
    assert ask("partitioned", "fft") == "fft"


def test_tuning_a_part_keeps_the_rest(file):
    old = [row(256, toeplitz=1.0, fft=2.0), row(1024, fft=2.0), row(256, gated=True, fft=2.0)]
    _table.save("a", old, file)
    new = [row(256, fft=0.5, block_fft=0.4), row(1024, fft=1.0)]
    assert _table.without("a", new, file) == [row(256, toeplitz=1.0), row(256, gated=True, fft=2.0)]
    assert _table.without("unknown", [], file) == _table.counted()


def test_what_is_tuned_is_measured_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(_table, "_compile", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(_table, "_measure", lambda *call: asked.append(call) or {kind: {} for kind in _table.KINDS})
    rows = _table.tune("cuda", lambda line: None, lengths=[512, 1024], dtypes=[BF16], paths=["block_fft"])
    assert rows == []
    assert {(point.length, dtype, *paths) for point, dtype, _, paths in asked} == {
        (512, BF16, "block_fft"),
        (1024, BF16, "block_fft"),
    }
