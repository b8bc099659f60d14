"""A race is fair: equal parameters, equal tokens in equal order, every seed counted, finished runs kept."""

import dataclasses
import json
import re
import statistics

import pytest

from hippodrome import plots
from hippodrome.channels.glu import Glu
from hippodrome.channels.mlp import Mlp
from hippodrome.compare import check_budgets, compare, count_parameters, match, print_table
from hippodrome.lti.s4 import S4
from hippodrome.lti.s4d import S4D
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.h3 import H3
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig
from hippodrome.part import BadInput
from hippodrome.tasks.induction import Induction
from tests.tiny import tiny_model, tiny_run


def with_mixer(mixer, channel=None, **settings):
    block = BlockConfig(mixer=mixer, channel=channel or Mlp.Config())
    return tiny_run(model=dataclasses.replace(tiny_model(), blocks=(block, block)), **settings)


def racers(**settings):
    return {
        "h3": with_mixer(H3.Config(d_state=8), **settings),
        "attention": with_mixer(Attention.Config(n_head=2), **settings),
        "s4d": with_mixer(SSM.Config(system=S4D.Config(d_state=8)), **settings),
        "glu": with_mixer(Attention.Config(n_head=2), Glu.Config(), **settings),
    }


def test_parameters_are_counted_as_they_are():
    for config in racers().values():
        assert count_parameters(config.model) == sum(parameter.numel() for parameter in config.model.build().parameters())


@pytest.mark.parametrize("first", racers())
def test_any_racer_can_set_the_size(first):
    recipes = {first: racers()[first]} | racers()
    matched = match(recipes, tolerance=0.02)
    assert matched[first] == recipes[first]
    target = count_parameters(recipes[first].model)
    for name, config in matched.items():
        assert abs(count_parameters(config.model) - target) <= 0.02 * target, name
        assert config.task == recipes[name].task


def test_a_racer_that_fits_is_left_alone():
    two = {"a": racers()["attention"], "b": racers()["attention"]}
    assert match(two) == two


def bare(mixer, **settings):
    """A racer without MLPs."""
    return tiny_run(model=dataclasses.replace(tiny_model(), blocks=(BlockConfig(mixer=mixer),), **settings))


@pytest.mark.parametrize(
    "mixer", [Attention.Config(n_head=6), SSM.Config(system=S4D.Config(d_state=8)), SSM.Config(system=S4.Config(d_state=8))]
)
def test_a_racer_without_d_ff_is_made_wider(mixer):
    first = racers()["h3"]
    found = match({"h3": first, "bare": bare(mixer, d_model=24)})["bare"]
    target = count_parameters(first.model)
    assert abs(count_parameters(found.model) - target) <= 0.02 * target
    assert found.model.d_model > 24
    assert found.model.d_model % getattr(mixer, "n_head", 1) == 0
    assert found.model.blocks == bare(mixer).model.blocks


def test_the_new_width_is_as_round_as_the_tolerance_lets_it_be():
    mixer = SSM.Config(system=S4D.Config(d_state=8))
    large = {"large": bare(mixer, d_model=512), "bare": bare(mixer)}
    assert match(large)["bare"].model.d_model == 512
    assert match({**large, "large": bare(mixer, d_model=498)}, 0.03)["bare"].model.d_model == 496
    assert match({**large, "large": bare(mixer, d_model=501)}, 1e-4)["bare"].model.d_model == 501


def test_a_racer_without_room_is_refused():
    with pytest.raises(BadInput, match=r"bare cannot have .* within 0.0001 as h3 has: by its d_model it comes to"):
        match({"h3": racers()["h3"], "bare": bare(Attention.Config(n_head=4))}, 1e-4)


def other_task(**changes):
    return tiny_run(dataclasses.replace(tiny_run().task, **changes))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (tiny_run(steps=13), "steps are 12 and 13"),
        (tiny_run(batch_size=4), "batch_size are 8 and 4"),
        (other_task(length=9), "length are 8 and 9"),
        (other_task(seed=1), "seed are 0 and 1"),
    ],
)
def test_other_tokens_are_named(other, named):
    with pytest.raises(BadInput, match=named):
        check_budgets({"one": tiny_run(), "other": other})


def test_learning_rates_may_differ():
    check_budgets({"one": tiny_run(), "other": tiny_run(lr=0.5, weight_decay=0.0)})


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    folder = tmp_path_factory.mktemp("races") / "race"
    recipes = {name: config for name, config in racers(steps=4, eval_every=2).items() if name in ("h3", "attention")}
    return folder, recipes, compare(recipes, folder, seeds=2, contexts=(4, 8), new_tokens=2)


def test_the_report_holds_means_and_spreads(race):
    folder, _, report = race
    assert json.loads((folder / "report.json").read_text()) == report
    for row in report["results"].values():
        scores = row["scores"]["accuracy"]
        each = [json.loads((folder / run / "report.json").read_text())["scores"]["test"]["accuracy"] for run in row["runs"]]
        assert scores["values"] == each
        assert scores["mean"] == pytest.approx(statistics.fmean(each))
        assert scores["spread"] == pytest.approx(statistics.stdev(each))
    sizes = [row["parameters"] for row in report["results"].values()]
    assert max(sizes) <= 1.02 * min(sizes)
    assert len({row["tokens"] for row in report["results"].values()}) == 1


def test_seeds_differ_and_the_task_does_not(race):
    folder, _, _ = race
    configs = [json.loads((folder / f"h3-seed{seed}" / "config.json").read_text()) for seed in (0, 1)]
    assert [config["train"]["seed"] for config in configs] == [0, 1]
    assert configs[0]["task"] == configs[1]["task"]


def test_generation_is_timed_after_each_context(race):
    for row in race[2]["results"].values():
        assert [timing["prompt_len"] for timing in row["generation"]] == [4, 8]
        assert all(timing["step_s"] > 0 and timing["state_bytes"] > 0 for timing in row["generation"])


def test_the_table_shows_every_racer(race, capsys):
    print_table(race[2])
    out = capsys.readouterr().out
    assert "h3" in out
    assert "attention" in out
    assert "±" in out


def test_floors_stand_beside_the_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Induction, "floors", lambda self: {"always the same token": 0.125})
    report = compare({"attention": with_mixer(Attention.Config(n_head=2), steps=1)}, tmp_path / "race")
    run = json.loads((tmp_path / "race" / "attention-seed0" / "report.json").read_text())
    assert report["floors"] == run["floors"] == {"always the same token": 0.125}
    print_table(report)
    assert re.search(r"\(always the same token\)\W+0\.1250", capsys.readouterr().out)


def test_the_picture_is_a_picture(race):
    assert (race[0] / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_finished_runs_are_kept(race):
    folder, recipes, report = race
    weights = [folder / run / "model.safetensors" for run in report["results"]["h3"]["runs"]]
    written = [file.stat().st_mtime_ns for file in weights]
    again = compare(recipes, folder, seeds=2, resume=True)
    assert again["results"]["h3"]["scores"] == report["results"]["h3"]["scores"]
    assert [file.stat().st_mtime_ns for file in weights] == written


def test_runs_trained_at_once_are_the_same_runs(race, tmp_path):
    _, recipes, report = race
    at_once = compare(recipes, tmp_path / "race", seeds=1, jobs=2)
    for name, row in at_once["results"].items():
        assert row["scores"]["loss"]["values"] == report["results"][name]["scores"]["loss"]["values"][:1]


def test_a_folder_in_use_is_refused(race):
    with pytest.raises(BadInput, match="--resume"):
        compare(race[1], race[0])


def test_a_context_beyond_learned_positions_is_refused_before_training(tmp_path):
    embed = dataclasses.replace(tiny_model().embed, positions=16)
    config = tiny_run(Induction.Config(length=8), dataclasses.replace(tiny_model(), embed=embed))
    with pytest.raises(BadInput, match="16 positions"):
        compare({"learned": config}, tmp_path / "race", contexts=(16,))
    assert not (tmp_path / "race").exists()


def test_panels_of_one_and_of_many(tmp_path):
    curve = ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    lines = {f"racer {i}": [curve] * (1 + i % 2) for i in range(9)}
    one = plots.Panel(title="one", x="tokens", y="loss", curves=lines)
    log = plots.Panel(title="log", x="context", y="ms", curves=lines, log_x=True, log_y=True, markers=True)
    sizes = []
    for panels in ([one], [one, log, one]):
        plots.draw(tmp_path / "picture.png", panels, "many racers")
        sizes.append((tmp_path / "picture.png").stat().st_size)
    assert sizes[0] < sizes[1]
