import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hippodrome
from hippodrome.channels.mlp import Mlp
from hippodrome.checkpoint import Checkpoints
from hippodrome.embeds.tokens import Tokens
from hippodrome.files import write_json
from hippodrome.metrics import read_metrics
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.block_recurrent import BlockRecurrent
from hippodrome.model import BlockConfig, Mixer, ModelConfig
from hippodrome.optim import build_optimizer
from hippodrome.part import BadInput, find, names, to_dict
from hippodrome.patterns import Full
from hippodrome.readouts.lm import Lm
from hippodrome.step import Step, seed_place
from hippodrome.tasks.lm import Lm as LmTask
from hippodrome.train import main, train
from tests.support import variants
from tests.tiny import Double, tiny_model, tiny_run

CPU = torch.device("cpu")
TIMES = {"tokens_per_s", "seconds"}


def losses(folder):
    return [line["loss"] for line in read_metrics(folder)]


def untimed(folder):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(folder)]


class Stop(Exception):
    pass


def stop_at(step):
    def watch(progress):
        if progress.step == step:
            raise Stop

    return watch


def run_until(config, folder, step):
    with pytest.raises(Stop):
        train(config, folder, watch=stop_at(step))


def test_learns_a_task(tmp_path):
    config = tiny_run(Double.Config(), steps=120, batch_size=16, log_every=40, eval_every=60, weight_decay=0.0)
    seen = []
    report = train(config, tmp_path / "run", watch=seen.append)
    assert report["scores"]["valid"]["accuracy"] == report["scores"]["test"]["accuracy"] == 1.0
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [40, 60, 80, 120]
    assert [line["step"] for line in lines if "valid" in line] == [60, 120]
    assert lines[-1]["loss"] < 0.2 < 1 < lines[0]["loss"]
    assert lines[-1]["tokens"] == report["tokens"] == 120 * 16 * 8
    assert [progress.step for progress in seen] == [40, 60, 80, 120]
    assert seen[1].scores is not None
    assert seen[0].scores is None
    assert seen[0].seconds_left > seen[-1].seconds_left == 0


def test_a_run_leaves_its_folder(tmp_path):
    run = tmp_path / "run"
    config = tiny_run(save_every=4, keep=2)
    report = train(config, run)
    kept = ["checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "report.json"]
    assert sorted(path.name for path in run.iterdir()) == kept
    assert [path.name for path in Checkpoints(run).paths()] == ["step-00000008", "step-00000012"]
    assert json.loads((run / "config.json").read_text()) == to_dict(config)
    assert json.loads((run / "report.json").read_text()) == report
    model = hippodrome.load(run)
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["provenance"]["seed"] == 0
    assert set(report["provenance"]["versions"]) == {"hippodrome", "python", "torch"}
    assert report["headline"] == "accuracy"
    line = read_metrics(run)[0]
    assert set(line) == {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds"}


def test_the_logged_loss_is_the_mean_since_the_line_before(tmp_path):
    train(tiny_run(), tmp_path / "each")
    train(tiny_run(log_every=5), tmp_path / "few")
    each = losses(tmp_path / "each")
    expected = [sum(each[:5]) / 5, sum(each[5:10]) / 5, sum(each[10:]) / 2]
    assert losses(tmp_path / "few") == pytest.approx(expected, rel=1e-12)


def test_accumulation_equals_one_big_batch(tmp_path):
    """Rows differ in how many targets they ask for, so a mean of means would not do."""
    config = tiny_run(Double.Config(), steps=6, batch_size=12)
    train(config, tmp_path / "whole")
    train(tiny_run(Double.Config(), steps=6, batch_size=12, micro_batch=3), tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    whole, parts = hippodrome.load(tmp_path / "whole"), hippodrome.load(tmp_path / "parts")
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=2e-5, rtol=0)


def two_processes(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr


def test_two_processes_give_the_losses_of_one(tmp_path):
    """With accumulation and dropout; torchrun, gloo."""
    config = tiny_run(model=tiny_model(dropout=0.1), steps=6, micro_batch=2, save_every=3)
    train(config, tmp_path / "one")
    write_json(tmp_path / "config.json", to_dict(config))
    two_processes("-m", "hippodrome.train", tmp_path / "config.json", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    assert two["tokens"] == one["tokens"]
    assert two["scores"]["valid"]["loss"] == pytest.approx(one["scores"]["valid"]["loss"], abs=1e-5)


def test_two_processes_carry_the_states_of_their_micro_batches_and_resume(tmp_path, monkeypatch):
    """After a resume from step 4, a checkpoint holds the states that it held without, those of both processes."""
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path / "cache"))
    words = [*map("the horses run round and round the track and nobody knows why. ".__mul__, (1, 2, 1, 3) * 10)]
    (tmp_path / "text.txt").write_text("|".join(words))
    where = {"text": str(tmp_path / "text.txt"), "tokenizer": "bytes", "separator": "|", "holdout": 0.1}
    task = LmTask.Config(**where, length=12, order="documents")
    # Its states have a start that is learned, and that no row has in the second step.
    recurrent = BlockConfig(mixer=BlockRecurrent.Config(n_head=2, window=4, n_state=3), channel=Mlp.Config())
    blocks = (*tiny_model().blocks, recurrent)
    model = dataclasses.replace(tiny_model(), blocks=blocks, embed=Tokens.Config(vocab_size=257))
    config = tiny_run(task, model, steps=8, micro_batch=2, carry_state=True, save_every=4)
    write_json(tmp_path / "config.json", to_dict(config))
    run = tmp_path / "two"
    two_processes("-m", "hippodrome.train", tmp_path / "config.json", run)
    train(config, tmp_path / "one")
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    carried = [path / "checkpoints" / "step-00000008" / "carried.safetensors" for path in (run, tmp_path / "one")]
    before = load_file(carried[0])
    assert before.keys() == load_file(carried[1]).keys()

    shutil.rmtree(carried[0].parent)
    (run / "report.json").unlink()
    two_processes("-m", "hippodrome.train", tmp_path / "config.json", run, "--resume")
    after = load_file(carried[0])
    assert len({name.partition("/")[0] for name in after}) == 4
    assert all(torch.allclose(after[name].float(), value.float(), atol=1e-5) for name, value in before.items())
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize(("step", "every"), [(3, 5), (7, 5), (9, 2)])
def test_resume_continues_to_the_same_bits(tmp_path, step, every):
    config = tiny_run(model=tiny_model(dropout=0.2), save_every=every, eval_every=3, micro_batch=4, log_every=1)
    train(config, tmp_path / "alone")
    run_until(config, tmp_path / "stopped", step)
    report = train(config, tmp_path / "stopped", resume=True)
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "alone")
    alone = (tmp_path / "alone" / "model.safetensors").read_bytes()
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == alone
    assert report["tokens"] == 12 * 8 * 9


def test_resume_between_two_logged_steps(tmp_path):
    config = tiny_run(save_every=4, log_every=5)
    train(config, tmp_path / "alone")
    run_until(config, tmp_path / "stopped", 5)
    train(config, tmp_path / "stopped", resume=True)
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "alone")


def test_resume_passes_over_a_checkpoint_cut_short(tmp_path):
    config = tiny_run(save_every=3, keep=3)
    train(config, tmp_path / "alone")
    run = tmp_path / "stopped"
    run_until(config, run, 8)
    weights = run / "checkpoints" / "step-00000006" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    (run / "checkpoints" / ".step-00000009.k3j2" / "step-00000009").mkdir(parents=True)
    (run / ".metrics.jsonl.x1").mkdir()
    with pytest.warns(UserWarning, match=r"step-00000006 is passed over: model.safetensors is truncated"):
        train(config, run, resume=True)
    assert untimed(run) == untimed(tmp_path / "alone")
    assert not list(run.glob(".*"))
    assert not list((run / "checkpoints").glob(".*"))


def test_resume_before_the_first_checkpoint_starts_anew(tmp_path):
    config = tiny_run()
    train(config, tmp_path / "alone")
    run_until(config, tmp_path / "stopped", 4)
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    train(config, tmp_path / "stopped", resume=True)
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "alone")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    config = tiny_run()
    report = train(config, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train(config, tmp_path / "run", resume=True) == report
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_resume_after_the_last_checkpoint_and_before_the_report(tmp_path):
    config = tiny_run()
    report = train(config, tmp_path / "run")
    for name in ("report.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    again = train(config, tmp_path / "run", resume=True)
    assert again["scores"] == report["scores"]
    assert again["tokens"] == report["tokens"]
    assert len(read_metrics(tmp_path / "run")) == 12


def test_a_carried_state_reaches_the_next_batch_and_only_rows_that_go_on(tmp_path):
    """Equal to reading both chunks in one call, for rows that continue, and to the second chunk alone, for those that start."""
    settings = tiny_run(Double.Config(), batch_size=4, lr=1e-30, weight_decay=0.0, carry_state=True).train
    model = tiny_model().build()
    task = Double.Config().build()
    step = Step(settings, task, model, build_optimizer(model, settings, CPU), CPU)
    model.train()
    step(0)
    loss, _ = step(1)
    first, second = task.batch("train", 0, 4), task.batch("train", 1, 4)
    both = model(torch.cat([first.inputs, second.inputs], 1)).logits[:, first.inputs.shape[1] :]
    alone = model(second.inputs).logits
    logits = torch.where(second.starts[:, None, None], alone, both)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), second.targets.flatten())
    assert second.starts.any()
    assert not second.starts.all()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    naive = torch.nn.functional.cross_entropy(alone.flatten(0, 1), second.targets.flatten())
    assert loss.item() != pytest.approx(naive.item(), abs=1e-6)


@pytest.mark.parametrize("name", names("mixers"))
def test_a_document_is_learned_as_if_it_were_alone(tmp_path, monkeypatch, name):
    """Rows that read one document after the other lose nothing of their own, and see nothing of the ones before."""
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path / "cache"))
    words = random.Random(0).choices("abcdefgh", k=800)
    (tmp_path / "text.txt").write_text("|".join("".join(words[40 * n : 41 * n + 3]) for n in range(20)))
    where = {"text": str(tmp_path / "text.txt"), "separator": "|", "tokenizer": "bytes", "holdout": 0.05}
    task = LmTask.Config(**where, order="documents", length=6).build()
    block = BlockConfig(mixer=(*variants("mixers", name), find(Mixer, name).Config())[0], channel=Mlp.Config())
    model = ModelConfig(d_model=16, blocks=(block,), embed=Tokens.Config(vocab_size=257), readout=Lm.Config()).build()
    if not model.causal:
        pytest.skip("not causal: it has no state")
    settings = tiny_run(batch_size=3, lr=1e-30, weight_decay=0.0, carry_state=True).train
    step = Step(settings, task, model.train(), build_optimizer(model, settings, CPU), CPU)
    seen: list[Tensor] = [torch.tensor([])] * 3
    resets = 0
    for number in range(8):
        batch = task.batch("train", number, 3)
        counts = torch.full((3,), 6) if batch.lengths is None else batch.lengths
        nats = []
        for row, count in enumerate(counts.tolist()):
            new = batch.inputs[row, :count]
            seen[row] = new if batch.starts[row] else torch.cat([seen[row], new])
            with torch.no_grad():
                logits = model(seen[row][None]).logits[0, -count:]
            nats.append(torch.nn.functional.cross_entropy(logits, batch.targets[row, :count], reduction="sum"))
        loss, _ = step(number)
        assert loss.item() == pytest.approx(float(sum(nats) / counts.sum()), rel=2e-5)
        resets += int(batch.starts.sum()) if number else 0
    assert resets > 2


def test_what_cannot_be_carried_is_said_before_there_is_a_folder(tmp_path):
    with pytest.raises(BadInput, match="carry_state is on, but no row of Induction goes on from the batch before"):
        train(tiny_run(carry_state=True), tmp_path / "run")
    block = BlockConfig(mixer=Attention.Config(pattern=Full()))
    model = dataclasses.replace(tiny_model(), blocks=(block,))
    with pytest.raises(BadInput, match="sees the future"):
        train(tiny_run(Double.Config(), model, carry_state=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_carried_states_are_cut_like_the_batch_and_resume_to_the_same_bits(tmp_path):
    def run(**settings):
        return tiny_run(Double.Config(), carry_state=True, save_every=5, **settings)

    train(run(), tmp_path / "alone")
    train(run(micro_batch=2), tmp_path / "cut")
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    run_until(run(micro_batch=2), tmp_path / "stopped", 8)
    train(run(micro_batch=2), tmp_path / "stopped", resume=True)
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "cut")


def test_activation_checkpointing_changes_no_loss(tmp_path):
    model = tiny_model(dropout=0.2)
    train(tiny_run(model=model, steps=4), tmp_path / "plain")
    train(tiny_run(model=model, steps=4, activation_checkpointing=True), tmp_path / "saved")
    assert losses(tmp_path / "saved") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_stays_close_to_fp32(tmp_path, precision):
    train(tiny_run(steps=6), tmp_path / "fp32")
    train(tiny_run(steps=6, precision=precision), tmp_path / "half")
    left, right = losses(tmp_path / "fp32"), losses(tmp_path / "half")
    assert left != right
    assert right == pytest.approx(left, abs=0.03)
    weights = hippodrome.load(tmp_path / "half")
    assert {parameter.dtype for parameter in weights.parameters()} == {torch.float32}


def test_clipping_bounds_the_step(tmp_path):
    """AdamW is blind to the scale of a gradient, so what shows is the norm before and the gradient after."""
    settings = tiny_run(clip=1e-3).train
    model = tiny_model().build()
    step = Step(settings, Double.Config().build(), model, build_optimizer(model, settings, CPU), CPU)
    _, norm = step(0)
    after = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert norm > 1e-2
    assert after == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_checkpoints(tmp_path, monkeypatch):
    plain = Step.__call__

    def overflow_at_7(self, step):
        loss, norm = plain(self, step)
        return (loss * float("nan") if step == 6 else loss), norm

    monkeypatch.setattr(Step, "__call__", overflow_at_7)
    with pytest.raises(BadInput, match=r"loss is nan at step 7: lower lr \(it is 0.01\)"):
        train(tiny_run(save_every=3, log_every=5), tmp_path / "run")
    assert [path.name for path in Checkpoints(tmp_path / "run").paths()] == ["step-00000003", "step-00000006"]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [5]


def test_a_learning_rate_beyond_reason_ends_with_one_clear_error(tmp_path):
    with pytest.raises(BadInput, match=r"(loss|gradient norm) is (nan|inf) at step \d+: lower lr"):
        train(tiny_run(lr=1e30, warmup=0.0, clip=None), tmp_path / "run")


def test_a_run_starts_from_the_weights_of_another(tmp_path):
    train(tiny_run(steps=3, save_every=2), tmp_path / "first")
    batch = tiny_run().task.build().batch("train", 0, 8)
    for weights in (tmp_path / "first", Checkpoints(tmp_path / "first").paths()[0]):
        train(tiny_run(weights=str(weights), steps=1, seed=1), tmp_path / f"from-{weights.name}")
        (found,) = losses(tmp_path / f"from-{weights.name}")
        assert found == pytest.approx(hippodrome.load(weights).loss(batch).total.item(), rel=1e-6)


def test_resumed_it_goes_on_from_its_own_checkpoint(tmp_path):
    train(tiny_run(steps=1, seed=1), tmp_path / "first")
    config = tiny_run(weights=str(tmp_path / "first"))
    whole = train(config, tmp_path / "whole")
    run_until(config, tmp_path / "cut", 6)
    assert train(config, tmp_path / "cut", resume=True)["scores"] == whole["scores"]


def test_weights_that_do_not_fit_leave_nothing(tmp_path):
    train(tiny_run(steps=1), tmp_path / "first")
    other = dataclasses.replace(tiny_model(), d_model=32)
    with pytest.raises(BadInput, match=r"does not fit the model to train, .* is \[\d+, 16\] where the model has"):
        train(tiny_run(model=other, weights=str(tmp_path / "first")), tmp_path / "run")
    with pytest.raises(BadInput, match=r"there is no folder .*frist: did you mean 'first'"):
        train(tiny_run(weights=str(tmp_path / "frist")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_tokenizer_are_refused(tmp_path):
    runs = {}
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} is not the other. " * 400)
        task = LmTask.Config(text=str(tmp_path / f"{name}.txt"), tokenizer="bpe", vocab_size=260, length=16)
        model = dataclasses.replace(tiny_model(), embed=Tokens.Config(vocab_size=260))
        runs[name] = tiny_run(task, model, steps=1)
    train(runs["one"], tmp_path / "one")
    again = dataclasses.replace(runs["one"].train, weights=str(tmp_path / "one"))
    train(dataclasses.replace(runs["one"], train=again), tmp_path / "again")
    with pytest.raises(BadInput, match="another tokenizer"):
        train(dataclasses.replace(runs["two"], train=again), tmp_path / "two")


def test_a_folder_with_a_run_is_refused(tmp_path):
    train(tiny_run(steps=1), tmp_path / "run")
    with pytest.raises(BadInput, match=r"run holds a run already: continue it with --resume, or give another --out"):
        train(tiny_run(steps=1), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "field"),
    [({"lr": 2e-2}, r"train.lr = 0.01, not 0.02"), ({"betas": (0.9, 0.95)}, r"train.betas\[1\] = 0.999, not 0.95")],
)
def test_resume_with_another_config_names_the_field(tmp_path, change, field):
    run_until(tiny_run(), tmp_path / "run", 2)
    with pytest.raises(BadInput, match=field):
        train(tiny_run(**change), tmp_path / "run", resume=True)


def test_resume_with_another_model_names_the_field(tmp_path):
    run_until(tiny_run(), tmp_path / "run", 2)
    other = dataclasses.replace(tiny_model(), d_model=32)
    with pytest.raises(BadInput, match=r"model.d_model = 16, not 32"):
        train(tiny_run(model=other), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 8, "micro_batch": 3}, "batch_size 8 cannot be cut evenly for micro_batch 3"),
        ({"device": "cdua"}, r"no device is called 'cdua': did you mean 'cuda'"),
        ({"cuda_graph": True}, "cuda_graph needs a CUDA device, not cpu"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(BadInput, match=message):
        train(tiny_run(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_impossible_requests(tmp_path):
    with pytest.raises(BadInput, match="no run to resume"):
        train(tiny_run(), tmp_path / "nothing", resume=True)
    with pytest.raises(BadInput, match="never ends: set eval_batches"):
        train(tiny_run(Double.Config(endless=True)), tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file: a run needs a folder"):
        train(tiny_run(), tmp_path / "file")
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="device 'cuda' is not here"):
            train(tiny_run(device="cuda"), tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_tensorboard_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(BadInput, match=r"pip install 'hippodrome\[tensorboard\]'"):
        train(tiny_run(tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_run(tensorboard=True, steps=3), tmp_path / "run")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(losses(tmp_path / "run"))
    assert len(board.Scalars("valid/accuracy")) == 1


def test_draws_depend_on_the_place_in_the_run_and_nothing_else():
    draws = []
    for place in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (0, 1, 0)]:
        seed_place(*place)
        draws.append(torch.rand(()).item())
    assert draws[0] == draws[-1]
    assert len(set(draws)) == 4


def test_the_module_runs_a_config_and_speaks_in_one_line(tmp_path, capsys):
    write_json(tmp_path / "config.json", to_dict(tiny_run(steps=2)))
    assert main([str(tmp_path / "config.json"), str(tmp_path / "run")]) == 0
    assert main([str(tmp_path / "config.json"), str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(tmp_path / "missing.json"), str(tmp_path / "run")]) == 2
    assert "missing.json" in capsys.readouterr().err
    Path(tmp_path / "bad.json").write_text("{")
    assert main([str(tmp_path / "bad.json"), str(tmp_path / "run")]) == 2
    assert "bad.json is not JSON" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_losses_equal_plain_ones(tmp_path):
    model = dataclasses.replace(tiny_model(), blocks=tiny_model().blocks[:1])
    train(tiny_run(model=model, steps=3), tmp_path / "plain")
    train(tiny_run(model=model, steps=3, compile=True), tmp_path / "compiled")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cuda_graph_takes_the_steps_of_the_plain_loop(tmp_path, precision):
    common = {"steps": 20, "device": "cuda", "precision": precision, "save_every": 8}
    train(tiny_run(**common), tmp_path / "plain")
    train(tiny_run(**common, cuda_graph=True), tmp_path / "graph")
    close = 1e-5 if precision == "fp32" else 2e-2
    assert losses(tmp_path / "graph") == pytest.approx(losses(tmp_path / "plain"), abs=close)
    assert losses(tmp_path / "graph")[0] == pytest.approx(losses(tmp_path / "plain")[0], abs=1e-6)
    graph = tiny_run(**common, cuda_graph=True)
    run_until(graph, tmp_path / "stopped", 12)
    train(graph, tmp_path / "stopped", resume=True)
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "graph"), abs=close)
