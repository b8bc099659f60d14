"""The demo, made small: it leaves what it promises."""

import json

import pytest

from hippodrome.compare import count_parameters
from hippodrome.demo import PROMPT, demo_recipes
from tests.commands import run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIPPODROME_CACHE", str(folder / "cache"))
        result = run("demo", "--quick", "--out", folder / "demo")
        assert result.code == 0, result.err
        yield folder / "demo", result


@pytest.mark.parametrize("quick", [True, False])
def test_the_racers_are_equal(quick):
    hybrid, rival = demo_recipes(quick).values()
    sizes = [count_parameters(config.model) for config in (hybrid, rival)]
    assert max(sizes) <= 1.02 * min(sizes)
    assert (hybrid.task, hybrid.train) == (rival.task, rival.train)


def test_it_leaves_configs_metrics_weights_report_and_picture(demo):
    folder, _ = demo
    report = json.loads((folder / "report.json").read_text())
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    for row in report["results"].values():
        assert {"bits_per_byte", "perplexity"} <= row["scores"].keys()
        assert row["generation"]
        for run_folder in row["runs"]:
            for file in ("config.json", "metrics.jsonl", "model.safetensors", "tokenizer.json"):
                assert (folder / run_folder / file).stat().st_size > 0
    assert set(report["samples"]) == set(report["results"])


def test_it_shows_progress_scores_and_samples(demo):
    folder, result = demo
    for words in ("loss", "bits per byte", "tokens/s", "left"):
        assert words in result.err
    samples = json.loads((folder / "report.json").read_text())["samples"]
    for name, text in samples.items():
        assert text.startswith(PROMPT)
        assert f"{name} writes:\n\n{text}\n" in result.out
    assert "reads held-out text better" in result.out


def test_its_runs_are_runs(demo):
    folder, _ = demo
    result = run("generate", folder / "hybrid-h3-seed0", "--prompt", "We", "--max-new-tokens", 3, "--device", "cpu")
    assert result.code == 0, result.err
    assert result.out.startswith("We")
