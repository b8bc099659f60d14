"""A run: what is trained, on what and how, and the folder that one execution leaves behind.

runs/NAME/config.json        the RunConfig
          metrics.jsonl      one JSON object a logged step
          model.safetensors  the weights at the end
          report.json        scores, with provenance
          checkpoints/       step-00001000/ and so on, the last few
          tokenizer.json     for runs on text
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hippodrome.files import replacing as replacing
from hippodrome.files import write_json as write_json
from hippodrome.model import ModelConfig
from hippodrome.part import BadInput, from_dict, to_dict
from hippodrome.task import Task


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. Batch sizes are rows; learning rates are peaks."""

    steps: int = 1000
    batch_size: int = 32
    """Rows of one optimiser step, over all processes."""
    micro_batch: int | None = None
    """Rows of one forward in one process; None: batch_size shared out over the processes."""
    lr: float = 6e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    lr_final: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.1
    decay: Literal["all", "matrices"] = "matrices"
    """What weight decay applies to: every parameter, or those of two axes and more."""
    betas: tuple[float, ...] = (0.9, 0.999)
    clip: float | None = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    carry_state: bool = False
    """Truncated back-propagation: the state goes from batch to batch, its gradient does not."""
    activation_checkpointing: bool = False
    compile: bool = False
    cuda_graph: bool = False
    """Replay the whole step as one CUDA graph: for models so small that launches bind."""
    weights: str | None = None
    """A run, a checkpoint or a saved or converted model of the same sizes, whose weights are the start; None: fresh ones."""
    seed: int = 0
    device: str = "auto"
    log_every: int = 10
    eval_every: int | None = None
    """Steps between scores on the validation split; None: only at the end."""
    eval_batches: int | None = None
    """Batches of such a score; None: the whole split."""
    save_every: int | None = None
    """Steps between checkpoints; None: only at the end."""
    keep: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("micro_batch", "eval_every", "eval_batches", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} is {value}: it must be at least 1, or none")
        if not 0 < self.lr < float("inf"):
            raise BadInput(f"lr is {self.lr}: it must be above 0")
        if self.clip is not None and not self.clip > 0:
            raise BadInput(f"clip is {self.clip}: it must be above 0, or none")
        if not 0 <= self.weight_decay < float("inf"):
            raise BadInput(f"weight_decay is {self.weight_decay}: it must be 0 or more")
        if not 0 <= self.warmup <= 1 or not 0 <= self.lr_final <= 1:
            raise BadInput(f"warmup {self.warmup} and lr_final {self.lr_final} are shares, between 0 and 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise BadInput(f"betas are {self.betas}: two numbers of at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a recipe returns: a model, a task and how the one learns the other."""

    model: ModelConfig
    task: Task.Config
    train: TrainConfig


def write_config(folder: Path, config: RunConfig) -> None:
    """Leave config.json in a run's folder."""
    write_json(folder / "config.json", to_dict(config))


def read_config(folder: Path) -> RunConfig:
    """The config of a run's folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder} is no run: it has no config.json")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    return from_dict(RunConfig, data, where=str(path))


def provenance(seed: int | None = None, device: torch.device | None = None) -> dict[str, Any]:
    """What every result file carries: commit, versions, device, seed and command."""
    import hippodrome

    on_gpu = device is not None and device.type == "cuda"
    return {
        "command": " ".join(
            ["hippodrome" if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name, *sys.argv[1:]]
        ),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seed": seed,
        "versions": {"hippodrome": hippodrome.__version__, "python": platform.python_version(), "torch": torch.__version__},
    }


def _commit() -> str | None:
    """The commit of the source tree the package runs from, "+" when files differ from it; None when installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    ask = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*ask, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")
