"""Weights and checkpoints on disk: safetensors and JSON only, never a pickle, whole or not there.

A saved model       config.json, model.safetensors
A checkpoint        the same, optimizer.safetensors, carried.safetensors (states carried from batch to batch),
                    state.json (step and counters), manifest.json (size and sha256 of all the others, written last)

A checkpoint needs no state of random generators: training draws them anew for every micro-batch (see train.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hippodrome.devices import choose_device
from hippodrome.files import replacing
from hippodrome.model import Model, ModelConfig
from hippodrome.part import BadInput, from_dict, nearest, to_dict

WEIGHTS = "model.safetensors"
_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
_LEFTOVER = re.compile(r"\.(config\.json|report\.json|metrics\.jsonl|model\.safetensors|step-\d+)\..+")


def save(model: Model, path: str | Path) -> None:
    """Write a model as the folder `path`: config.json and model.safetensors. A model saved there before is replaced."""
    path = Path(path)
    if path.is_dir() and (others := {file.name for file in path.iterdir()} - {"config.json", WEIGHTS}):
        raise BadInput(f"{path} holds more than a saved model ({min(others)}): give a new folder")
    if path.is_file():
        raise BadInput(f"{path} is a file: give the folder to write")
    with replacing(path) as beside:
        beside.mkdir()
        _write_model(model, beside)
    _sync(path.parent)


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Model:
    """The model of a run's folder, of one of its checkpoints, or of a folder written by `save`; in evaluation mode.

    A run gives its final weights, or while it has none those of its newest whole checkpoint. `dtype` None keeps the
    precision the weights were saved in. Raises `BadInput` that names what is missing, damaged or does not fit.
    """
    path, target = Path(path), choose_device(device)
    folder = _find_weights(path)
    file = folder / WEIGHTS
    with safe_open(file, "pt") as weights:
        halves = {weights.get_slice(name).get_dtype() for name in weights.keys()} & _HALVES.keys()  # noqa: SIM118
    if dtype is None and len(halves) == 1:
        dtype = _HALVES[halves.pop()]
    with torch.random.fork_rng(devices=[]), target, _NoDraws():
        model = _read_model_config(folder).build()
    if dtype is not None:
        model.to(dtype)
    fill(model, file)
    return model.eval()


def write_weights(model: Model, file: Path) -> None:
    """Write a model's tensors beside `file`, then rename. A tensor that two modules share is written once."""
    with replacing(file) as beside:
        _write_tensors(_tensors(model), beside)
    _sync(file.parent)


def start_from(model: Model, path: Path) -> None:
    """Give a model the weights that `load` finds in `path`. Raises `BadInput`, before it copies any, where they do not fit."""
    fill(model, _find_weights(path) / WEIGHTS, what="the model to train, which must have its sizes")


def fill(model: Model, file: Path, what: str = "its config.json") -> None:
    """Copy a file's tensors into a model. Raises `BadInput` with the first names that differ, before anything is copied.

    what: the message tells what the file does not fit.
    """
    if unreadable := tensor_damage(file):
        raise BadInput(f"{file} {unreadable}")
    wanted = _tensors(model)
    with safe_open(file, "pt") as weights:
        found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        wrong = [f"{name} is missing" for name in wanted if name not in found]
        wrong += [f"{name} is unknown to the model" for name in found if name not in wanted]
        wrong += [
            f"{name} is {list(found[name])} where the model has {list(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in found and found[name] != tuple(tensor.shape)
        ]
        if wrong:
            rest = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise BadInput(f"{file} does not fit {what}: {'; '.join(wrong[:3])}{rest}")
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(weights.get_tensor(name))
    # Nothing more is copied; modules that keep a number of what was, as S4 its length, are told to look again.
    model.load_state_dict({}, strict=False)


class Checkpoints:
    """The checkpoints of one run: folder/checkpoints/step-00001000 and so on, the last `keep` of them."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.run = folder
        self.folder = folder / "checkpoints"
        self.keep = keep

    def paths(self) -> list[Path]:
        """All checkpoints by rising step, damaged ones included."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit())

    def clean(self) -> None:
        """Remove what writers left that were killed: temporary folders in the run and beside its checkpoints."""
        for folder in (self.run, self.folder):
            for path in folder.glob(".*") if folder.is_dir() else ():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path)

    def write(
        self,
        step: int,
        model: Model,
        optimizer: torch.optim.Optimizer,
        extra: Mapping[str, Any],
        carried: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write a checkpoint and drop those before the last `keep`. It appears whole, or not at all and `OSError` is raised.

        `extra` is JSON (counters); `carried` are tensors of states that go on after the checkpoint.
        """
        path = self.folder / f"step-{step:08d}"
        with replacing(path) as beside:
            beside.mkdir()
            _write_model(model, beside)
            _write_tensors(_optimizer_tensors(model, optimizer), beside / "optimizer.safetensors")
            _write_tensors(dict(carried or {}), beside / "carried.safetensors")
            _write_text({"step": step, **extra}, beside / "state.json")
            facts = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(beside.iterdir())}
            _write_text({"files": facts}, beside / "manifest.json")
            _sync(beside)
        _sync(self.folder)
        for old in [other for other in self.paths() if other <= path][: -self.keep]:
            # Renamed first: a writer killed while deleting must leave no half of a checkpoint behind.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))
        return path

    def latest(self) -> Path | None:
        """The newest whole checkpoint, None when there is none. Warns of every damaged one that it passes over."""
        for path in reversed(self.paths()):
            wrong = damage(path)
            if wrong is None:
                return path
            warnings.warn(f"checkpoint {path} is passed over: {wrong}", stacklevel=2)
        return None

    @staticmethod
    def read(path: Path, model: Model, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Put a whole checkpoint into a model and its optimiser; return what `write` was given as extra and carried."""
        fill(model, path / WEIGHTS)
        _restore_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"))
        return json.loads((path / "state.json").read_text()), load_file(path / "carried.safetensors")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file is as it was written."""
    try:
        facts = json.loads((checkpoint / "manifest.json").read_text())["files"]
        wanted = {str(name): (int(fact["bytes"]), str(fact["sha256"])) for name, fact in facts.items()}
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is truncated or not of a checkpoint"
    for name, (size, digest) in wanted.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            kind = "truncated" if file.stat().st_size < size else "too long"
            return f"{name} is {kind}: {file.stat().st_size} bytes, {size} were written"
        if _sha256(file) != digest:
            return f"{name} is not what was written: its sha256 differs from the manifest's"
    return None


def tensor_damage(file: Path) -> str | None:
    """Why a file cannot be read as safetensors, in words; None when it can."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(9)
    try:
        with safe_open(file, "pt"):
            return None
    except SafetensorError as error:
        if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
            return "is a pickle, which is never opened, and no safetensors file"
        if size >= 9 and start[8:] != b"{":
            return "is no safetensors file"
        return f"is truncated: it ends after {size} bytes ({error})"


def _find_weights(path: Path) -> Path:
    """The folder that holds the weights `path` speaks of."""
    if path.is_file():
        raise BadInput(f"{path} is a file: give the folder of a run, a checkpoint or a saved model")
    if not path.is_dir():
        beside = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
        raise BadInput(f"there is no folder {path}: {nearest(path.name, beside)}")
    file = path / WEIGHTS
    if file.exists() or path.name.startswith("step-"):
        wrong = damage(path) if path.name.startswith("step-") else tensor_damage(file)
        if wrong is None:
            return path
        raise BadInput(f"{path}: {wrong}{_offer(path)}" if path.name.startswith("step-") else f"{file} {wrong}{_offer(path)}")
    newest = Checkpoints(path).latest()
    if newest is not None:
        return newest
    damaged = Checkpoints(path).paths()
    if damaged:
        raise BadInput(f"{path} has no whole checkpoint: in {damaged[-1].name}, {damage(damaged[-1])}")
    if (path / "config.json").is_file():
        raise BadInput(f"{path} has a config.json but no weights yet: no {WEIGHTS} and no checkpoint")
    raise BadInput(f"{path} is no run and no saved model: it has no {WEIGHTS} and no checkpoints")


def _offer(path: Path) -> str:
    """The end of a message on damaged weights: a whole checkpoint to load instead, where there is one."""
    run = path.parent.parent if path.name.startswith("step-") else path
    for other in reversed(Checkpoints(run).paths()):
        if other != path and damage(other) is None:
            return f"; {other} is whole, load that"
    return ""


def _read_model_config(folder: Path) -> ModelConfig:
    file = folder / "config.json"
    try:
        return from_dict(ModelConfig, json.loads(file.read_text())["model"], where=f"{file}: model")
    except FileNotFoundError:
        raise BadInput(f"{folder} has a {WEIGHTS} but no config.json, which says what model it is of") from None
    except BadInput:
        raise
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{file} is no config of a model: JSON with a field 'model' is wanted") from None


class _NoDraws(TorchFunctionMode):
    """Leaves out random draws in place while a model is built whose every tensor is about to be read from a file.

    It leaves zeros: a truncated normal draws until all lies within bounds, which what memory happens to hold may never do.
    """

    _draws = frozenset({Tensor.normal_, Tensor.uniform_, torch.Tensor.exponential_, torch.Tensor.bernoulli_})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].zero_() if func in self._draws else func(*args, **(kwargs or {}))


def _tensors(model: Model) -> dict[str, Tensor]:
    """A model's tensors by name; one that modules share appears under its first name only."""
    first: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: tensors[name] for name in first.values()}


def _optimizer_tensors(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's memory by "parameter/slot"."""
    slots = {name: optimizer.state[parameter] for name, parameter in model.named_parameters() if parameter in optimizer.state}
    return {f"{name}/{slot}": value for name, held in slots.items() for slot, value in held.items()}


def _restore_optimizer(model: Model, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    held: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        # A copy: tensors just read lie in the mapped file.
        held.setdefault(name, {})[slot] = tensor.clone()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {id(parameter): i for i, parameter in enumerate(order)}
    state = {number[id(model.get_parameter(name))]: slots for name, slots in held.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _write_model(model: Model, folder: Path) -> None:
    _write_text({"model": to_dict(model.config)}, folder / "config.json")
    _write_tensors(_tensors(model), folder / WEIGHTS)


def _write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    # safetensors makes files that only their owner may read; they shall be as readable as any other.
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(file)) from None
    file.chmod(mode)
    _sync(file)


def _write_text(data: Any, file: Path) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    _sync(file)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
