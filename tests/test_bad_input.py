"""What people get wrong: one line that says what and how to mend it, exit code 2, and nothing half written."""

import errno
import json
import lzma
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.commands import TINY, Result, run, tree, write_text
from tests.golden_files import FOLDER as GOLDEN

PUBLISHED = GOLDEN / "h3_lm_newkeys.safetensors"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Texts, runs and checkpoints, good and bad, and a cache outside of them."""
    folder = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIPPODROME_CACHE", str(tmp_path_factory.mktemp("cache")))
        write_text(folder / "text.txt")
        (folder / "empty.txt").write_text("")
        (folder / "blank.txt").write_text(" \n\n ")
        (folder / "binary.txt").write_bytes(bytes(range(256)) * 20)
        (folder / "short.txt").write_text("too short")
        (folder / "latin.txt").write_bytes("Füße\n".encode("latin-1") * 50)
        (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
        (folder / "other.jsonl").write_text('{"body": "fine"}\n' * 9)
        (folder / "cut.txt.xz").write_bytes(lzma.compress(b"many words " * 900)[:-30])
        (folder / "fake.parquet").write_text("no parquet at all")
        (folder / "no-texts").mkdir()
        (folder / "no-texts" / "image.bin").write_bytes(b"\0")

        assert run("train", "h3", "--text", folder / "text.txt", *TINY, "--out", folder / "good").code == 0
        labels = ["--rows", 40, "--epochs", 1, "--batch-size", 20, "--device", "cpu"]
        assert run("train", "transformer.synthetic", *labels, "--out", folder / "no-text").code == 0
        _damaged_runs(folder)
        _damaged_checkpoints(folder)
        yield folder


def _damaged_runs(folder: Path) -> None:
    def copy(name: str) -> Path:
        shutil.copytree(folder / "good", folder / name)
        shutil.rmtree(folder / name / "checkpoints")
        return folder / name

    def edit(name: str, change) -> None:
        file = copy(name) / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    weights = copy("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-400])
    (copy("pickled") / "model.safetensors").write_bytes(pickle.dumps({"weights": [1, 2, 3]}, protocol=2))
    (copy("not-json") / "config.json").write_text("{")
    (copy("no-config") / "config.json").unlink()
    (copy("no-weights") / "model.safetensors").unlink()
    edit("unknown-field", lambda config: config["model"].update(d_modle=16))
    edit("unknown-part", lambda config: config["model"]["blocks"][0]["mixer"].update(part="mixers/h4"))
    edit("other-width", lambda config: config["model"].update(d_model=32))
    edit("other-vocabulary", lambda config: config["task"].update(tokenizer="gpt2"))
    edit("wrong-type", lambda config: config["train"].update(steps="many"))


def _damaged_checkpoints(folder: Path) -> None:
    (folder / "cut.safetensors").write_bytes(PUBLISHED.read_bytes()[:5000])
    (folder / "words.pt").write_text("these are words")
    torch.save({"layer.weight": torch.zeros(3, 3)}, folder / "foreign.pt")

    class Stranger:
        def __reduce__(self):
            return os.system, ("true",)

    with (folder / "stranger.pt").open("wb") as file:
        pickle.dump({"state_dict": Stranger()}, file, protocol=2)


LM = ["train", "h3", "--text", "{}/text.txt", *TINY, "--out", "{}/new"]
LANGUAGE = ["train", "h3.synthetic", "--out", "{}/new", "--device", "cpu"]


def on(text: str) -> list[str]:
    return ["train", "h3", "--text", "{}/" + text, *TINY, "--out", "{}/new"]


CASES = {
    # words the command does not know
    "verb": (["trian", "h3"], "did you mean 'train'"),
    "flag": ([*LM, "--stesp", "3"], "--stesp: did you mean --steps"),
    "flag of generate": (["generate", "{}/good", "--temprature", "1"], "did you mean --temperature"),
    "flag of no verb": (["list", "--all"], "--all"),
    "recipe": (["train", "hh3"], "did you mean 'h3'"),
    "recipe of a file": (["train", "h3.sinthetic"], "did you mean 'h3.synthetic'"),
    "no recipe": (["train", "--steps", "3"], "needs one recipe"),
    "two recipes to train": (["train", "h3", "s4d"], "needs one recipe"),
    "an extra word": (["doctor", "please"], "'please'"),
    "part": (["show", "atention"], "did you mean 'attention'"),
    "part of a folder": (["show", "mixers/h4"], "did you mean 'mixers/h3'"),
    "pattern": (["show", "pattern:windw"], "did you mean 'window'"),
    "field of a pattern": (["show", "pattern:window(siz=3)"], "did you mean 'size'"),
    "a pattern that is not closed": (["show", "pattern:window(size=3"], "write it as window(size=64)"),
    "a window of nothing": (["show", "pattern:window(size=0)"], "a window of 0 keys"),
    "a pattern over nothing": (["show", "pattern:all", "--length", "0"], "at least 1"),
    "a picture of too many pairs": (["show", "pattern:causal", "--length", "65536", "--out", "{}/new.png"], "4096 or less"),
    "mixer to check": (["parity", "atention"], "did you mean 'attention'"),
    "no run named": (["generate"], "RUN"),
    "system to convert": (["convert", "s4", PUBLISHED, "{}/new"], "h3"),
    "language": ([*LANGUAGE, "--task", "indction"], "induction"),
    # numbers
    "no steps": ([*LM, "--steps", "0"], "steps is 0"),
    "negative steps": ([*LM, "--steps", "-5"], "steps is -5"),
    "half a step": ([*LM, "--steps", "1.5"], "1.5"),
    "no rows a batch": ([*LM, "--batch-size", "0"], "batch_size is 0"),
    "uneven micro-batches": ([*LM, "--micro-batch", "3"], "batch_size 4"),
    "negative learning rate": ([*LM, "--lr", "-1"], "lr is -1"),
    "learning rate in words": ([*LM, "--lr", "fast"], "fast"),
    "negative decay": ([*LM, "--weight-decay", "-0.1"], "weight_decay is -0.1"),
    "decay without end": ([*LM, "--weight-decay", "inf"], "weight_decay is inf"),
    "decay that is no number": ([*LM, "--weight-decay", "nan"], "weight_decay is nan"),
    "warm-up beyond the end": ([*LM, "--warmup", "2"], "warmup 2"),
    "a flag without its value": ([*LM, "--d-model"], "--d-model"),
    "negative width": ([*LM, "--d-model", "-16"], "-16"),
    "no width inside": ([*LM, "--d-ff", "0"], "d_ff is 0"),
    "heads that do not divide": ([*LM, "--n-head", "3"], "3 heads do not divide d_model 16"),
    "H3 heads that do not divide": ([*LM, "--head-dim", "3"], "head_dim 3"),
    "odd states": ([*LM, "--d-state", "7"], "d_state 7"),
    "no blocks": ([*LM, "--n-layer", "0"], "n_layer"),
    "attention in a block that is not": ([*LM, "--attention-layers", "5"], "attention_layers has 5"),
    "no tokens a row": ([*LM, "--length", "0"], "length is 0"),
    "dropout of all": ([*LM, "--dropout", "1.5"], "1.5"),
    "dropout of all where no tokens are": (["train", "lra_images.pathfinder", "--dropout", "1.5", "--out", "{}/new"], "1.5"),
    "dropout that is no number": (["train", "listops_subtrees", "--dropout", "nan", "--out", "{}/new"], "dropout is nan"),
    "no rows of a language": ([*LANGUAGE, "--rows", "0"], "train_rows is 0"),
    "negative epochs": ([*LANGUAGE, "--epochs", "-1"], "steps is"),
    # devices
    "device": ([*LM, "--device", "gpu"], "gpu"),
    "a GPU that is not here": ([*LM, "--device", "cuda:77"], "cuda:77"),
    "precision": ([*LM, "--precision", "bf17"], "bf16"),
    "a CUDA graph on a CPU": ([*LM, "--cuda-graph"], "cuda_graph"),
    # texts
    "text that is not there": (on("txet.txt"), "did you mean 'text.txt'"),
    "folder that is not there": (on("nowhere/text.txt"), "nowhere"),
    "empty text": (on("empty.txt"), "empty"),
    "text of blanks": (on("blank.txt"), "empty"),
    "binary file": (on("binary.txt"), "binary"),
    "not UTF-8": (on("latin.txt"), "UTF-8"),
    "text shorter than a row": ([*LM, "--length", "100000"], "100000"),
    "text too short to split": (on("short.txt"), "short.txt"),
    "broken JSON": (on("broken.jsonl"), "line 2"),
    "JSON without the field": (on("other.jsonl"), "'body'"),
    "truncated archive": (on("cut.txt.xz"), "truncated"),
    "no parquet": (on("fake.parquet"), "parquet"),
    "folder without text": (on("no-texts"), "no-texts"),
    "tokenizer": ([*LM, "--tokenizer", "byte"], "bytes"),
    "no vocabulary": ([*LM, "--tokenizer", "bpe", "--vocab-size", "0"], "vocab_size is 0"),
    "vocabulary below the bytes": ([*LM, "--tokenizer", "bpe", "--vocab-size", "100"], "vocab_size is 100"),
    "nothing held out": ([*LM, "--holdout", "0"], "holdout is 0"),
    "all held out": ([*LM, "--holdout", "0.9"], "holdout is 0.9"),
    # folders
    "run that is there": ([*LM[:-1], "{}/good"], "--resume"),
    "resume without a run": ([*LM, "--resume"], "no run to resume"),
    "resume another run": ([*LM[:-1], "{}/good", "--resume", "--lr", "0.5"], "train.lr"),
    "run in a file": ([*LM[:-1], "{}/text.txt"], "is a file"),
    "run below a file": ([*LM[:-1], "{}/text.txt/run"], "text.txt"),
    # runs
    "run that is not there": (["eval", "{}/goood"], "goood"),
    "sample of a run that is not there": (["generate", "{}/goood"], "goood"),
    "sample of a run without text": (["generate", "{}/no-text"], "no run on text"),
    "truncated weights": (["generate", "{}/truncated"], "truncated"),
    "pickled weights": (["generate", "{}/pickled"], "pickle"),
    "config that is no JSON": (["eval", "{}/not-json"], "JSON"),
    "no config": (["eval", "{}/no-config"], "config.json"),
    "no weights": (["generate", "{}/no-weights"], "no weights yet"),
    "unknown field": (["eval", "{}/unknown-field"], "did you mean 'd_model'"),
    "unknown part": (["eval", "{}/unknown-part"], "did you mean 'h3'"),
    "field of another type": (["eval", "{}/wrong-type"], "'many'"),
    "weights of another width": (["generate", "{}/other-width"], "does not fit"),
    "ids beyond the vocabulary": (["eval", "{}/other-vocabulary", "--device", "cpu"], "vocabulary"),
    "no rows to score": (["eval", "{}/good", "--batch-size", "0"], "batch_size 0"),
    "no batches to score": (["eval", "{}/good", "--max-batches", "0"], "max_batches 0"),
    "split": (["eval", "{}/good", "--split", "tset"], "test"),
    # sampling
    "negative temperature": (["generate", "{}/good", "--temperature", "-1"], "temperature is -1"),
    "no probability": (["generate", "{}/good", "--top-p", "0"], "top_p is 0"),
    "no token to choose from": (["generate", "{}/good", "--top-k", "0"], "top_k is 0"),
    "nothing to write": (["generate", "{}/good", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "empty stop": (["generate", "{}/good", "--stop", ""], "stop"),
    "no prompts": (["generate", "{}/good", "--prompt"], "prompt"),
    "negative seed": (["generate", "{}/good", "--seed", "-1"], "seed is -1"),
    # other verbs
    "parity of one token": (["parity", "h3", "--length", "1"], "length"),
    "checkpoint that is not there": (["convert", "h3", "{}/model.pt", "{}/new"], "model.pt"),
    "truncated checkpoint": (["convert", "h3", "{}/cut.safetensors", "{}/new"], "truncated"),
    "checkpoint of words": (["convert", "h3", "{}/words.pt", "{}/new"], "words.pt"),
    "foreign checkpoint": (["convert", "h3", "{}/foreign.pt", "{}/new"], "layer.weight"),
    "a stranger's pickle": (["convert", "h3", "{}/stranger.pt", "{}/new"], "never loaded"),
    "heads unknown": (["convert", "h3", PUBLISHED, "{}/new"], "--n-head"),
    "heads that cannot be": (["convert", "h3", PUBLISHED, "{}/new", "--n-head", "5"], "--n-head is 5"),
    "converted onto a run": (["convert", "h3", PUBLISHED, "{}/good", "--n-head", "4"], "not empty"),
    "op to time": (["bench", "diagonal_sm", "--out", "{}/new"], "did you mean 'diagonal_ssm'"),
    "device to time on": (["bench", "--device", "gpu", "--out", "{}/new"], "did you mean 'cpu'"),
    "no calls to time": (["bench", "--repeats", "0", "--out", "{}/new"], "repeats is 0"),
    "no lengths to time": (["bench", "--lengths", "--out", "{}/new"], "lengths is empty"),
    "nothing to compare": (["compare", "--seeds", "2"], "names of recipes"),
    "no seeds": (["compare", "h3", "--out", "{}/new", "--seeds", "0"], "seeds is 0"),
    "no jobs": (["compare", "h3", "--out", "{}/new", "--jobs", "0"], "jobs is 0"),
    "no tolerance": (["compare", "h3", "s4d", "--out", "{}/new", "--tolerance", "0"], "tolerance is 0"),
    "different tasks": (["compare", "h3", "h3.synthetic", "--out", "{}/new"], "different tasks"),
    "a flag that only one takes": (
        ["compare", "h3", "s4d", "--head-dim", "2", "--out", "{}/new"],
        "s4d has no flag --head-dim",
    ),
    "comparison that is there": (["compare", "h3", "s4d", "--out", "{}/good"], "--resume"),
    "parameters that cannot agree": (["compare", "s4d", "h3", "--d-ff", "1", "--out", "{}/new"], "h3 cannot have"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_exit_code_2_and_nothing_written(prepared, name):
    words, wanted = CASES[name]
    before = tree(prepared)
    result = run(*[str(word).replace("{}", str(prepared)) for word in words])
    assert result.code == 2, result
    assert result.complaint.startswith("hippodrome: ")
    assert wanted in result.complaint
    assert "Traceback" not in result.err
    assert tree(prepared) == before


def test_a_table_of_more_than_forty():
    assert len(CASES) > 40


def lm(prepared, *more: object) -> Result:
    return run(*[word.replace("{}", str(prepared)) for word in LM], *more)


def unfinished(folder: Path) -> set[str]:
    """What only a finished or half-written run would have: weights, a report, temporary files."""
    return {path.name for path in folder.rglob("*") if path.name in ("model.safetensors", "report.json") or path.name[0] == "."}


def test_a_loss_that_is_not_finite(prepared, tmp_path):
    result = lm(
        prepared, "--lr", "1e30", "--clip", "None", "--log-every", "100", "--eval-every", "None", "--out", tmp_path / "run"
    )
    assert result.code == 2
    assert "nan at step" in result.complaint or "inf at step" in result.complaint
    assert "lower lr" in result.complaint
    assert not unfinished(tmp_path)


@pytest.mark.parametrize(
    ("d_model", "wanted"), [(10**6, r"has [\d,]+ parameters, [\d,.]+ GB in fp32, and is too large"), (10**20, "is too large")]
)
def test_a_model_that_no_memory_holds(prepared, tmp_path, d_model, wanted):
    result = lm(prepared, "--d-model", d_model, "--out", tmp_path / "run")
    assert result.code == 2
    assert re.search(rf"a model of d_model {d_model} {wanted} .*take a smaller d_model", result.complaint)
    assert not tree(tmp_path)


@pytest.mark.parametrize(
    ("failure", "wanted"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "out of memory for 2.00 GiB more",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
)
def test_memory_that_a_step_lacks(prepared, tmp_path, monkeypatch, failure, wanted):
    def lacking(*_: object) -> None:
        raise failure

    monkeypatch.setattr("hippodrome.step.Step.__call__", lacking)
    result = lm(prepared, "--out", tmp_path / "run")
    assert result.code == 1
    assert result.complaint.startswith(f"hippodrome: {wanted}")
    assert "--batch-size, --micro-batch or --length" in result.complaint
    assert not unfinished(tmp_path)


def test_a_full_disk(prepared, tmp_path, monkeypatch):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    monkeypatch.setattr("hippodrome.checkpoint.save_file", no_space)
    result = lm(prepared, "--log-every", "100", "--eval-every", "None", "--out", tmp_path / "run")
    assert result.code == 2
    assert result.err.splitlines()[-1] == "hippodrome: model.safetensors: No space left on device"
    assert "Traceback" not in result.err
    assert not unfinished(tmp_path)


def test_a_folder_that_cannot_be_written(prepared, tmp_path, monkeypatch):
    def refused(self, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    result = lm(prepared, "--out", tmp_path / "run")
    assert result.code == 2
    assert "Permission denied" in result.complaint
    assert not tree(tmp_path)


def test_ctrl_c(prepared, tmp_path, monkeypatch):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hippodrome.train.Step.__call__", pressed)
    result = lm(prepared, "--out", tmp_path / "run")
    assert result.code == 130
    assert result.complaint.startswith("hippodrome: stopped")
    assert not unfinished(tmp_path)


def test_a_bug_shows_its_traceback(prepared, monkeypatch):
    def bug(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("hippodrome.catalog.describe", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        run("show", "h3")
