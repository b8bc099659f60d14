import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch

import hippodrome
from hippodrome.checkpoint import Checkpoints, _NoDraws, damage, load, save
from hippodrome.optim import build_optimizer
from hippodrome.part import BadInput
from hippodrome.readouts.lm import Lm
from hippodrome.run import TrainConfig, write_config
from tests.tiny import tiny_model, tiny_run

IDS = torch.arange(20)[None]


@pytest.fixture
def model():
    torch.manual_seed(3)
    return tiny_model(dropout=0.5).build()


@pytest.fixture
def optimizer(model):
    """AdamW after one step, so that it remembers something."""
    optimizer = build_optimizer(model, TrainConfig(), torch.device("cpu"))
    model(IDS).logits.square().mean().backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def run(tmp_path, model, optimizer):
    """A run with whole checkpoints at steps 10, 20 and 30, and no final weights."""
    run = tmp_path / "run"
    write_config(run, tiny_run(model=model.config))
    for step in (10, 20, 30):
        Checkpoints(run, keep=3).write(step, model, optimizer, {"tokens": step})
    return run


def at(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def cut(file, share=0.5):
    os.truncate(file, int(file.stat().st_size * share))


def test_a_saved_model_comes_back(tmp_path, model):
    save(model, tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "model.safetensors", "saved"]
    again = hippodrome.load(tmp_path / "saved")
    assert again.config == model.config
    assert not again.training
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_loading_draws_nothing_from_the_global_generator(tmp_path, model):
    save(model, tmp_path / "saved")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load(tmp_path / "saved")
    assert torch.equal(torch.rand(3), expected)


def test_a_truncated_normal_ends_where_nothing_is_drawn():
    with _NoDraws():
        drawn = torch.nn.init.trunc_normal_(torch.full((64, 64), 9.0), a=-2, b=2)
    assert not drawn.any()


def test_files_are_as_readable_as_any_other(tmp_path, model):
    save(model, tmp_path / "saved")
    modes = {path.stat().st_mode for path in (tmp_path / "saved").iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied_and_are_stored_once(tmp_path, tied):
    model = dataclasses.replace(tiny_model(), readout=Lm.Config(tied=tied)).build()
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_precision_is_that_of_the_file_unless_asked_for(tmp_path, model):
    save(model.to(torch.bfloat16), tmp_path / "half")
    assert next(load(tmp_path / "half").parameters()).dtype == torch.bfloat16
    assert next(load(tmp_path / "half", dtype=torch.float32).parameters()).dtype == torch.float32


def test_saving_replaces_a_saved_model_and_nothing_else(tmp_path, model):
    save(model, tmp_path / "saved")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save(model, tmp_path / "saved")
    assert torch.equal(next(load(tmp_path / "saved").parameters()), next(model.parameters()))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(BadInput, match=r"holds more than a saved model \(letters.txt\)"):
        save(model, tmp_path / "home")
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"


def test_a_checkpoint_restores_model_and_optimizer(run, model, optimizer):
    twin = tiny_model().build()
    twins = build_optimizer(twin, TrainConfig(), torch.device("cpu"))
    extra, carried = Checkpoints(run).read(at(run, 30), twin, twins)
    assert extra == {"step": 30, "tokens": 30}
    assert carried == {}
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)
        assert optimizer.state[left].keys() == twins.state[right].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for slot, value in optimizer.state[left].items():
            assert torch.equal(value, twins.state[right][slot])


def test_the_last_k_are_kept(run, model, optimizer):
    Checkpoints(run, keep=2).write(40, model, optimizer, {}, {"0/0": torch.ones(2, dtype=torch.complex64)})
    assert [path.name for path in Checkpoints(run).paths()] == ["step-00000030", "step-00000040"]
    assert sorted(path.name for path in at(run, 40).parent.iterdir()) == ["step-00000030", "step-00000040"]
    _, carried = Checkpoints(run).read(at(run, 40), model, optimizer)
    assert torch.equal(carried["0/0"], torch.ones(2, dtype=torch.complex64))


def test_a_checkpoint_is_written_again_in_its_place(run, model, optimizer):
    Checkpoints(run, keep=3).write(20, model, optimizer, {"tokens": -1})
    assert damage(at(run, 20)) is None
    assert json.loads((at(run, 20) / "state.json").read_text())["tokens"] == -1
    assert Checkpoints(run).latest() == at(run, 30)


def spoil_size(folder):
    cut(folder / "optimizer.safetensors")


def spoil_bytes(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def spoil_missing(folder):
    (folder / "state.json").unlink()


def spoil_longer(folder):
    with (folder / "state.json").open("a") as stream:
        stream.write("\n")


def spoil_manifest(folder):
    cut(folder / "manifest.json")


def spoil_foreign(folder):
    (folder / "manifest.json").write_text('["no", "manifest"]')


def spoil_no_manifest(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_size, r"optimizer.safetensors is truncated: \d+ bytes, \d+ were written"),
        (spoil_bytes, "model.safetensors is not what was written"),
        (spoil_missing, "state.json is missing"),
        (spoil_longer, "state.json is too long"),
        (spoil_manifest, "manifest.json is truncated"),
        (spoil_foreign, "manifest.json is truncated or not of a checkpoint"),
        (spoil_no_manifest, "manifest.json is missing"),
    ],
)
def test_damage_is_named_and_an_older_checkpoint_taken_or_offered(run, spoil, words):
    spoil(at(run, 30))
    with pytest.warns(UserWarning, match=f"step-00000030 is passed over: {words}"):
        assert Checkpoints(run).latest() == at(run, 20)
    with pytest.raises(BadInput, match=f"step-00000030: {words}.*; .*step-00000020 is whole, load that"):
        load(at(run, 30))


def test_a_run_without_final_weights_gives_its_newest_whole_checkpoint(run, model):
    assert torch.equal(load(run)(IDS).logits, model.eval()(IDS).logits)
    assert torch.equal(load(at(run, 10))(IDS).logits, model(IDS).logits)
    for step in (10, 20, 30):
        cut(at(run, step) / "model.safetensors")
    named = r"no whole checkpoint: in step-00000030, model\.safetensors is truncated"
    with pytest.warns(UserWarning, match="is passed over"), pytest.raises(BadInput, match=named):
        load(run)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is truncated: it ends after"),
        (b"", "is truncated: it ends after 0 bytes"),
        (b"hello, this is some text", "is no safetensors file"),
        (b"PK\x03\x04" + bytes(200), "is a pickle, which is never opened"),
    ],
)
def test_final_weights_that_cannot_be_read_are_named_and_a_checkpoint_offered(run, model, content, words):
    shutil.copy(at(run, 30) / "model.safetensors", run / "model.safetensors")
    assert torch.equal(load(run)(IDS).logits, model.eval()(IDS).logits)
    if content is None:
        cut(run / "model.safetensors", 0.9)
    else:
        (run / "model.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match=f"model.safetensors {words}.*step-00000030 is whole, load that"):
        load(run)


def test_weights_of_another_model_are_named_key_by_key(tmp_path, model):
    save(model, tmp_path / "saved")
    data = json.loads((tmp_path / "saved" / "config.json").read_text())
    data["model"]["d_model"] = 32
    (tmp_path / "saved" / "config.json").write_text(json.dumps(data))
    with pytest.raises(
        BadInput, match=r"does not fit its config.json: embed.table.weight is \[24, 16\] where .*\[24, 32\].*more"
    ):
        load(tmp_path / "saved")
    data["model"] |= {"d_model": 16, "blocks": data["model"]["blocks"][:1]}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(data))
    with pytest.raises(BadInput, match=r"blocks.1.\S+ is unknown to the model"):
        load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has a model.safetensors but no config.json"),
        ("{", "no config of a model"),
        ('{"modle": 1}', "no config of a model"),
        ("[]", "no config of a model"),
        ('{"model": {"d_modl": 4}}', "did you mean 'd_model'"),
        ('{"model": {"d_model": 4}}', "config.json"),
    ],
)
def test_a_config_that_is_none_is_named(tmp_path, model, content, words):
    save(model, tmp_path / "saved")
    (tmp_path / "saved" / "config.json").unlink()
    if content is not None:
        (tmp_path / "saved" / "config.json").write_text(content)
    with pytest.raises(BadInput, match=words):
        load(tmp_path / "saved")


def test_paths_that_hold_no_model(tmp_path, model):
    save(model, tmp_path / "demo")
    with pytest.raises(BadInput, match=r"no folder .*demmo: did you mean 'demo'"):
        load(tmp_path / "demmo")
    with pytest.raises(BadInput, match="is a file: give the folder"):
        load(tmp_path / "demo" / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty is no run and no saved model"):
        load(tmp_path / "empty")
    write_config(tmp_path / "young", tiny_run())
    with pytest.raises(BadInput, match=r"young has a config\.json but no weights yet"):
        load(tmp_path / "young")
    with pytest.raises(BadInput, match="no device is called 'gpu'"):
        load(tmp_path / "demo", device="gpu")
    with pytest.raises(BadInput, match="is a file: give the folder to write"):
        save(model, tmp_path / "demo" / "config.json")


def test_leftovers_of_killed_writers_are_cleaned_and_nothing_else(run):
    for name in (".step-00000040.ab12", ".step-00000010.old"):
        (run / "checkpoints" / name / "inside").mkdir(parents=True)
    (run / ".metrics.jsonl.qq").mkdir()
    (run / ".notes").mkdir()
    Checkpoints(run).clean()
    assert [path.name for path in run.glob(".*")] == [".notes"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-000000{step}" for step in (10, 20, 30)]


def test_a_full_disk_is_an_os_error_and_leaves_nothing_half_written(run):
    """The limit on the size of a file stands for the disk; weights take 30 kB and the optimiser's memory 60 kB."""
    code = f"""
import resource
from pathlib import Path
import torch
from hippodrome.checkpoint import Checkpoints, load
from hippodrome.optim import build_optimizer
from hippodrome.run import TrainConfig
run = Path({str(run)!r})
model = load(run)
optimizer = build_optimizer(model, TrainConfig(), torch.device("cpu"))
Checkpoints(run).read(run / "checkpoints" / "step-00000030", model, optimizer)
for room in (100, 10_000, 40_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, {resource.RLIM_INFINITY}))
    try:
        Checkpoints(run).write(40, model, optimizer, {{}})
    except OSError as error:
        print(room, error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = result.stdout.splitlines()
    assert [line.partition(" ")[0] for line in said] == ["100", "10000", "40000"], result.stderr
    assert all("File too large" in line for line in said)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-000000{step}" for step in (10, 20, 30)]
    assert all(damage(at(run, step)) is None for step in (10, 20, 30))


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path, model, optimizer):
    (tmp_path / "run").touch()
    with pytest.raises(OSError, match="run"):
        Checkpoints(tmp_path / "run").write(1, model, optimizer, {})
    with pytest.raises(OSError, match="run"):
        save(model, tmp_path / "run" / "inside")
