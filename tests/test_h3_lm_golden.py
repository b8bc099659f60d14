"""A converted language model is the authors': logits, loss, gradients, greedy generation, step logits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hippodrome import generate, load
from hippodrome.convert import convert_h3, our_names
from hippodrome.h3_checkpoint import infer_layout
from hippodrome.model import Model
from hippodrome.sampling import Sampling
from hippodrome.task import IGNORE, Batch

GOLDEN = Path(__file__).parent / "golden"
CASES = ["h3_lm", "h3_lm_rotary"]


def plain(weights: dict[str, Tensor], path: Path) -> Path:
    torch.save(weights, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def old_zip(weights: dict[str, Tensor], path: Path) -> Path:
    torch.save(weights, path.with_suffix(".bin"), _use_new_zipfile_serialization=False)
    return path.with_suffix(".bin")


def lightning(weights: dict[str, Tensor], path: Path) -> Path:
    wrapped = {f"model.{key}": value for key, value in weights.items()}
    data = {
        "epoch": 3,
        "pytorch-lightning_version": "1.8.6",
        "state_dict": {**wrapped, "loss_fn.weight": torch.ones(3)},
        "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.ones(2)}}}],
    }
    torch.save(data, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


def safetensors(weights: dict[str, Tensor], path: Path) -> Path:
    save_file(weights, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def convert(case: str, keys: str, container: Callable[[dict[str, Tensor], Path], Path], folder: Path) -> Model:
    weights = load_file(GOLDEN / f"{case}_{keys}.safetensors")
    report = convert_h3(container(weights, folder / "model"), folder / "run", n_head=4)
    assert report["check"]["difference"] < 1e-5
    return load(folder / "run")


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture
def io(case) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{case}_io.safetensors")


@pytest.fixture
def model(case, tmp_path) -> Model:
    return convert(case, "newkeys", plain, tmp_path)


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    difference = ((got - wanted).abs().max() / wanted.abs().max()).item()
    assert difference <= tolerance, f"relative difference {difference:.2e}"


@pytest.mark.parametrize("container", [plain, old_zip, lightning, safetensors])
@pytest.mark.parametrize("keys", ["newkeys", "oldkeys"])
def test_logits_from_every_container_and_vocabulary(case, io, keys, container, tmp_path):
    model = convert(case, keys, container, tmp_path)
    close(model(io["in/input_ids"]).logits, io["out/logits"], 2e-5)


def test_loss_and_gradients(case, io, model):
    ids = io["in/input_ids"]
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], 1)
    loss = model.loss(Batch(ids, targets)).total
    close(loss.reshape(1), io["out/loss"], 2e-5)
    loss.backward()
    names = our_names(infer_layout(load_file(GOLDEN / f"{case}_newkeys.safetensors"), 4))
    gradients = {theirs: model.get_parameter(ours).grad for theirs, ours in names.items()}
    full = {key.removeprefix("grad/") for key in io if key.startswith("grad/")}
    norms = {key.removeprefix("gradnorm/") for key in io if key.startswith("gradnorm/")}
    assert len(full) == 4
    assert norms == gradients.keys(), "every parameter has a gradient, and no other"
    for key in full:
        close(gradients[key].reshape(io[f"grad/{key}"].shape), io[f"grad/{key}"], 1e-4)
    for key in norms:
        close(gradients[key].norm().reshape(1), io[f"gradnorm/{key}"], 1e-4)


def test_greedy_generation_is_exact(io, model):
    prompts, wanted = io["in/prompt_ids"], io["gen/sequences"]
    length = prompts.shape[1]
    new = generate(model, prompts, wanted.shape[1] - length, sampling=Sampling(temperature=0))
    assert new == wanted[:, length:].tolist()


def test_step_logits(io, model):
    prompts, sequences, wanted = io["in/prompt_ids"], io["gen/sequences"], io["gen/step_logits"]
    length = prompts.shape[1]
    with torch.no_grad():
        logits, state = model.prefill(prompts, model.init_state(2))
        said = [logits]
        for t in range(length, sequences.shape[1] - 1):
            logits, state = model.step(sequences[:, t], state)
            said.append(logits)
    close(torch.stack(said, 1), wanted, 2e-5)


def test_the_config_names_the_attention_layers(model, tmp_path):
    config = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert [block["mixer"]["part"] for block in config["blocks"]] == ["mixers/h3", "mixers/attention", "mixers/h3", "mixers/h3"]
