"""Every verb from end to end on tiny inputs."""

import json
import re
import subprocess
import sys

import pytest

from hippodrome.cli import VERBS
from hippodrome.patterns import kinds
from hippodrome.recipes import recipes
from hippodrome.tasks.lm import Lm
from tests.commands import TINY, run, write_text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIPPODROME_CACHE", str(folder / "cache"))
        write_text(folder / "text.txt")
        yield folder


@pytest.fixture(scope="module")
def trained(place):
    """A language model trained by command."""
    result = run("train", "h3", "--text", place / "text.txt", *TINY, "--out", place / "run")
    assert result.code == 0, result.err
    return place / "run"


def test_train_leaves_a_whole_run(trained):
    assert {"config.json", "metrics.jsonl", "model.safetensors", "report.json", "tokenizer.json"} <= {
        path.name for path in trained.iterdir()
    }
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_train_shows_progress_and_scores(place):
    result = run(
        "train", "transformer", "--text", place / "text.txt", *TINY, "--positions", "learned", "--out", place / "learned"
    )
    assert result.code == 0, result.err
    assert re.search(r"transformer  4/4  loss \d.*bits per byte \d.*tokens/s.*left", result.err)
    assert re.search(r"test\W+\d\.\d{4}", result.out)


def test_train_resumes(place):
    words = ("train", "s4d", "--text", place / "text.txt", *TINY, "--out", place / "again")
    assert run(*words).code == 0
    report = (place / "again" / "report.json").read_text()
    again = run(*words, "--resume")
    assert again.code == 0, again.err
    assert (place / "again" / "report.json").read_text() == report


def test_generate_is_the_same_for_the_same_seed(trained):
    words = ("generate", trained, "--prompt", "document", "--max-new-tokens", 12, "--temperature", 1, "--device", "cpu")
    first, again, other = run(*words, "--seed", 3), run(*words, "--seed", 3), run(*words, "--seed", 4)
    assert first.code == 0, first.err
    assert first.out == again.out != other.out
    assert first.out.startswith("document")


def test_generate_a_batch_in_order(trained):
    result = run("generate", trained, "--prompt", "first one", "and a second", "--max-new-tokens", 5, "--temperature", 0)
    assert result.code == 0, result.err
    assert result.out.index("first one") < result.out.index("and a second")


def test_generate_a_batch_equals_each_alone(trained):
    words = ("--max-new-tokens", 8, "--temperature", 0, "--device", "cpu")
    both = run("generate", trained, "--prompt", "first one", "2", *words).out
    alone = [run("generate", trained, "--prompt", prompt, *words).out for prompt in ("first one", "2")]
    assert both == "".join(f"{text}\n" for text in alone)


def test_eval_prints_and_writes(trained):
    result = run("eval", trained, "--split", "valid", "--device", "cpu")
    assert result.code == 0, result.err
    written = json.loads((trained / "eval.json").read_text())
    assert written["split"] == "valid"
    assert f"{written['scores']['bits_per_byte']:.4f}" in result.out
    reported = json.loads((trained / "report.json").read_text())["scores"]["valid"]
    assert written["scores"] == pytest.approx(reported)


def test_eval_prints_and_writes_the_floors(trained, monkeypatch):
    monkeypatch.setattr(Lm, "floors", lambda self: {"every byte alike": 8.0})
    result = run("eval", trained, "--split", "valid", "--device", "cpu")
    assert re.search(r"\(every byte alike\)\W+8\.0000", result.out)
    assert json.loads((trained / "eval.json").read_text())["floors"] == {"every byte alike": 8.0}


def test_compare_leaves_a_table_and_a_picture(place):
    folder = place / "race"
    words = ["--text", place / "text.txt", *TINY, "--seeds", 2, "--contexts", 8, 16, "--out", folder]
    result = run("compare", "h3", "transformer", *words)
    assert result.code == 0, result.err
    assert "±" in result.out
    assert "h3" in result.out
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads((folder / "report.json").read_text())
    assert [timing["prompt_len"] for timing in report["results"]["h3"]["generation"]] == [8, 16]


def test_list_names_every_recipe():
    result = run("list")
    assert result.code == 0
    for name in [*recipes(), "induction", "attention", "diagonal_ssm", "window"]:
        assert f"  {name} " in result.out


@pytest.mark.parametrize("name", ["h3", "mixers/attention", "s4d", "window", "diagonal_ssm", "recall", "h3.pure", "tokens"])
def test_show_says_what_and_where(name):
    result = run("show", name)
    assert result.code == 0, result.err
    assert re.search(r"files:\n +hippodrome/", result.out)


def test_show_a_mixer_gives_equation_defaults_and_recipes():
    out = run("show", "mixers/h3").out
    assert "shift(k)" in out
    assert "d_state: int = 64" in out
    assert "recipes that use it: h3, h3.pure" in out


def test_show_a_pattern_gives_facts_and_a_picture(tmp_path):
    picture = tmp_path / "window.png"
    result = run("show", "pattern:window(size=8) | Global(size=4) & causal", "--length", 32, "--tile", 8, "--out", picture)
    assert result.code == 0, result.err
    assert "causal: True\nreach: unbounded\nover 32 tokens: 9 of 16 tiles of 8 (56.2%)" in result.out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "reach: 8 keys" in run("show", "pattern:window(size=8)").out


def test_show_all_patterns_draws_each(tmp_path):
    picture = tmp_path / "patterns.png"
    result = run("show", "pattern:all", "--length", 64, "--tile", 8, "--out", picture)
    assert result.code == 0, result.err
    # Other tests derive patterns of their own, which the command's process does not know.
    for name in (name for name, kind in kinds().items() if kind.__module__.startswith("hippodrome.")):
        assert re.search(rf"^{name}\b.* of 64 tiles of 8", result.out, re.MULTILINE)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_parity_of_a_mixer_and_of_a_run(trained):
    for subject in ("attention", trained):
        result = run("parity", subject, "--length", 16, "--device", "cpu")
        assert result.code == 0, result.err
        assert "token by token" in result.out
        assert "FAILS" not in result.out


def test_doctor_names_every_op():
    result = run("doctor")
    assert result.code == 0, result.err
    assert "diagonal_ssm" in result.out
    assert "reference" in result.out


def test_bench_leaves_numbers_and_a_picture(place):
    sizes = ["--lengths", 16, 32, "--batch", 1, "--channels", 2, "--taps", 2, "--repeats", 1, "--device", "cpu"]
    result = run("bench", "long_conv", *sizes, "--out", place / "bench")
    assert result.code == 0, result.err
    written = json.loads((place / "bench" / "long_conv_cpu.json").read_text())
    assert {row["length"] for row in written["rows"]} == {16, 32}
    assert (place / "bench" / "long_conv_cpu.png").is_file()


def test_convert_then_parity(place):
    from tests.golden_files import FOLDER

    result = run("convert", "h3", FOLDER / "h3_lm_newkeys.safetensors", place / "converted", "--n-head", 4)
    assert result.code == 0, result.err
    assert run("parity", place / "converted", "--length", 16, "--device", "cpu").code == 0


def test_verify_resume(place):
    words = ["--text", place / "text.txt", *TINY, "--steps", 8, "--kills", 1]
    result = run("verify-resume", "transformer", *words)
    assert result.code == 0, result.err
    assert "agree in every bit" in result.out


@pytest.mark.parametrize("verb", VERBS)
def test_help_on_every_verb(verb):
    result = run(verb, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: hippodrome {verb}")


@pytest.mark.parametrize("recipe", recipes())
def test_help_on_every_recipe(recipe):
    result = run("train", recipe, "--help")
    assert result.code == 0
    for flag in ("--out", "--seed", "--lr"):
        assert flag in result.out


def test_overview_names_every_verb():
    for words in ([], ["--help"], ["-h"]):
        out = run(*words).out
        assert all(f"  {verb} " in out for verb in VERBS)
    assert run("--version").out.startswith("hippodrome ")


def command(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "hippodrome", *map(str, words)], capture_output=True, text=True, timeout=60, **options
    )


def test_as_a_command():
    result = command("show", "h33")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("hippodrome: nothing is called 'h33': did you mean 'h3'?")
    assert result.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_error():
    program = f"{sys.executable} -m hippodrome list | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    assert result.returncode in (0, 141)


def test_list_imports_neither_plots_nor_tokenizers():
    program = "import sys; from hippodrome.cli import main; main(['list']); print(*sorted(sys.modules), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    modules = result.stderr.split()
    assert "torch" in modules
    assert not {"matplotlib", "tokenizers", "hippodrome.train", "hippodrome.mixers.h3"} & set(modules)
