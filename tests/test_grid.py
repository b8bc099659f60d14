"""A grid is one comparison a value, and a table of their headline scores."""

import json
import re

import pytest

from hippodrome.grid import grid, print_grid
from hippodrome.part import BadInput
from tests.commands import run
from tests.tiny import tiny_run

SHORT = ["--length", 16, "--d-model", 8, "--steps", 2, "--batch-size", 4, "--test-rows", 6, "--device", "cpu"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grids") / "grid"
    words = ["grid", "linear_transformer.atomic", "transformer.atomic", "--over", "task", "shift", "cummax", *SHORT]
    return folder, run(*words, "--no-match-parameters", "--out", folder), words


def test_every_value_is_a_comparison(table):
    folder, result, _ = table
    assert result.code == 0, result.err
    report = json.loads((folder / "report.json").read_text())
    assert report["over"] == "task"
    for task in ("shift", "cummax"):
        alone = json.loads((folder / task / "report.json").read_text())
        assert alone["task"]["task"] == task
        assert report["floors"][task] == alone["floors"]
        for name in ("linear_transformer.atomic", "transformer.atomic"):
            assert report["results"][name][task] == alone["results"][name]["scores"]["r2"]
            assert len(report["results"][name][task]["values"]) == 1


def test_the_table_shows_scores_and_floors(table):
    folder, result, _ = table
    report = json.loads((folder / "report.json").read_text())
    row = next(line for line in result.out.splitlines() if line.startswith("│ cummax"))
    shown = [float(number) for number in re.findall(r"-?\d+\.\d{4}", row)]
    means = [report["results"][name]["cummax"]["mean"] for name in ("linear_transformer.atomic", "transformer.atomic")]
    assert shown == pytest.approx([*means, *report["floors"]["cummax"].values()], abs=1e-4)


def test_a_grid_goes_on_with_more_values(table):
    folder, _, words = table
    before = (folder / "shift" / "linear_transformer.atomic-seed0" / "model.safetensors").stat().st_mtime_ns
    again = run(*words[:6], "reverse", *SHORT, "--no-match-parameters", "--out", folder, "--resume")
    assert again.code == 0, again.err
    assert (folder / "shift" / "linear_transformer.atomic-seed0" / "model.safetensors").stat().st_mtime_ns == before
    assert (folder / "reverse" / "report.json").is_file()


def test_columns_without_a_floor_stay_empty(capsys):
    score = {"a": {"mean": 0.5}, "b": {"mean": 0.25}}
    report = {"over": "x", "seeds": 1, "headlines": {"a": "r2", "b": "accuracy"}, "results": {"one": score}}
    print_grid(report | {"floors": {"a": {"guess": 0.125}, "b": {}}})
    out = capsys.readouterr().out
    assert re.search(r"a\W+0\.5000\W+0\.1250", out)
    assert re.search(r"b\W+0\.2500\W+$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([], "over is none: give a flag"),
        (["--over", "task"], "over is task: give a flag"),
        (["--over", "task", "shift", "shfit"], "shfit"),
        (["--over", "tusk", "shift"], "did you mean --task"),
    ],
)
def test_what_is_no_flag_or_no_value_is_refused(over, message):
    result = run("grid", "linear_transformer.atomic", *over, *SHORT)
    assert result.code == 2
    assert message in result.complaint


def test_values_that_share_a_folder_are_refused(tmp_path):
    race = {"one": tiny_run()}
    with pytest.raises(BadInput, match="each another"):
        grid("text", {"a/b": race, "a-b": race}, tmp_path)
    with pytest.raises(BadInput, match="none"):
        grid("text", {}, tmp_path)


def test_what_each_cell_cost_and_a_picture_over_numbers(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    words = ["long_text+system=full", "long_text+system=window", "--over", "length", 32, 64, "--text", text, "--window", 8]
    budget = ["--tokens", 256, "--step-tokens", 128, "--d-model", 16, "--n-layer", 1, "--device", "cpu"]
    result = run("grid", *words, *budget, "--out", tmp_path / "grid")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "grid" / "report.json").read_text())
    for name in report["results"]:
        for length in ("32", "64"):
            cost = report["costs"][name][length]
            assert cost["steady_tokens_per_s"] > 0
            assert cost["peak_bytes"] is None
    assert "full" in result.out
    assert "system=" not in result.out
    assert "tokens a second" in result.out
    assert (tmp_path / "grid" / "curves.png").read_bytes()[:4] == b"\x89PNG"
