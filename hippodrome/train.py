"""One training loop, read from top to bottom.

Everything random is a pure function of the run's seed and of a place in the run: the data (`Task.batch`), and what the
model draws (dropout), whose generators are seeded anew for each micro-batch. So resuming needs no generator's state, the
number of processes changes no draw, and scoring in between disturbs nothing.

    python -m hippodrome.train CONFIG.json FOLDER [--resume]          one process, or each of those of torchrun
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hippodrome import devices
from hippodrome.checkpoint import WEIGHTS, Checkpoints, start_from, write_weights
from hippodrome.evaluate import evaluate
from hippodrome.files import write_json
from hippodrome.memory import build_on, shortage
from hippodrome.metrics import MetricsLog
from hippodrome.model import Model
from hippodrome.optim import build_optimizer, schedule, set_rates
from hippodrome.part import BadInput, from_dict, to_dict
from hippodrome.run import RunConfig, TrainConfig, provenance, write_config
from hippodrome.step import Step, micro_batch, seed_place
from hippodrome.task import Split, Task
from hippodrome.tokenizer import Tokenizer


@dataclass(frozen=True)
class Progress:
    """What `watch` is told at every logged step. loss: mean since the last one. scores: of the validation split."""

    step: int
    steps: int
    loss: float
    lr: float
    tokens: int
    tokens_per_s: float
    seconds_left: float
    scores: Mapping[str, float] | None = None
    rows: str = ""
    """How many rows a second, and what they are, where the task has a name for them: "1,200 images/s"."""


def train(
    config: RunConfig, folder: Path, *, resume: bool = False, watch: Callable[[Progress], None] | None = None
) -> dict[str, Any]:
    """Train a run in `folder` and return its report (also written there as report.json).

    A folder that holds a run is refused, or with `resume` continued from its newest whole checkpoint: on a CPU to bitwise
    the same losses as if it had never stopped. Killed at any moment, it leaves a folder that can be resumed. Under
    torchrun the processes share each batch. Raises `BadInput` for what cannot be trained, and for a loss that is not
    finite; the checkpoints before it stay.
    """
    settings, folder = config.train, Path(folder)
    device = devices.choose_device(settings.device)
    with ExitStack() as stack:
        stack.enter_context(devices.joined(device))
        _check_settings(settings, device)
        _check_folder(config, folder, resume)
        devices.barrier()
        leader = devices.rank() == 0
        task = config.task.build()
        _check_splits(task, settings)
        seed_place(settings.seed, 0, 0)
        held = devices.watch_memory(device)
        model = build_on(config.model, device)
        if settings.carry_state:
            _check_carrying(task, model, settings)
        model.activation_checkpointing = settings.activation_checkpointing
        optimizer = build_optimizer(model, settings, device)
        step = Step(settings, task, model, optimizer, device)

        checkpoints = Checkpoints(folder, settings.keep)
        done, tokens, seconds, losses = 0, 0, 0.0, []
        newest = checkpoints.latest() if resume else None
        if newest is not None:
            kept, carried = checkpoints.read(newest, model, optimizer)
            done, tokens, seconds, losses = kept["step"], kept["tokens"], kept["seconds"], kept["losses"]
            step.restore(kept["scaler"], carried)
        elif settings.weights is not None:
            _check_tokenizer(task, Path(settings.weights))
            start_from(model, Path(settings.weights))
        devices.barrier()
        if done == settings.steps and (folder / "report.json").is_file():
            return _read_json(folder / "report.json")
        log: MetricsLog | None = None
        if leader:
            checkpoints.clean()
            log = stack.enter_context(closing(MetricsLog(folder, done, settings.tensorboard)))
            write_config(folder, config)
            task.save(folder)

        valid: dict[str, float] | None = None
        # Weights and moments count, resumed or not; what building and reading a checkpoint took for a while does not.
        devices.watch_memory(device)
        first, clock = done, time.perf_counter()
        unread: list[tuple[Tensor, Tensor]] = []
        model.train()
        while done < settings.steps:
            share = schedule(settings, done)
            set_rates(optimizer, share)
            loss, norm = step(done)
            unread.append((loss, norm))
            done += 1
            last = done == settings.steps
            scores_due = last or bool(settings.eval_every and done % settings.eval_every == 0)
            line_due = scores_due or done % settings.log_every == 0
            save_due = last or bool(settings.save_every and done % settings.save_every == 0)
            if not (line_due or save_due):
                continue

            losses += _read_losses(unread, done, settings)
            unread.clear()
            fresh = int(devices.summed(torch.tensor(step.take_tokens(), device=device)))
            spent = time.perf_counter() - clock
            tokens, seconds = tokens + fresh, seconds + spent
            if line_due:
                valid = _scores(model, task, "valid", settings, whole=last) if scores_due else None
                line = {"step": done, "loss": sum(losses) / len(losses), "lr": settings.lr * share, "grad_norm": float(norm)}
                line |= {"tokens": tokens, "tokens_per_s": fresh / spent, "seconds": seconds}
                losses = []
                if log is not None:
                    log.write(line | ({} if valid is None else {"valid": valid}))
                if watch is not None and leader:
                    left = (settings.steps - done) * spent / max(1, done - first)
                    rows = _rows(task, settings.batch_size * (done - first) / spent)
                    watch(Progress(done, settings.steps, line["loss"], line["lr"], tokens, fresh / spent, left, valid, rows))
            if save_due:
                kept = {"tokens": tokens, "seconds": seconds, "losses": losses, "scaler": step.scaler.state_dict()}
                carried = step.carried()
                if log is not None:
                    log.sync()
                    checkpoints.write(done, model, optimizer, kept, carried)
                devices.barrier()
            first, clock = done, time.perf_counter()

        peak = devices.peak_memory(device)
        scores = {"valid": _scores(model, task, "valid", settings, whole=True) if valid is None else valid}
        scores["test"] = _scores(model, task, "test", settings, whole=True)
        report = {
            "headline": task.headline,
            "floors": dict(task.floors()),
            "scores": scores,
            "steps": done,
            "tokens": tokens,
            "seconds": seconds,
            "peak_bytes": None if peak is None else peak - held,
            "protocol": model.protocol,
            "rows": settings.batch_size * done,
            "row_name": task.row_name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "processes": devices.world(),
            "provenance": provenance(settings.seed, device),
        }
        if leader:
            write_weights(model, folder / WEIGHTS)
            write_json(folder / "report.json", report)
        devices.barrier()
        return report


def _rows(task: Task, a_second: float) -> str:
    return f"{a_second:,.0f} {task.row_name}/s" if task.row_name else ""


def _read_losses(unread: list[tuple[Tensor, Tensor]], done: int, settings: TrainConfig) -> list[float]:
    """The losses of the last steps, fetched from the device. Raises `BadInput` at the first that is not finite."""
    losses, norms = (torch.stack(list(column)).tolist() for column in zip(*unread, strict=True))
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=done - len(losses) + 1):
        # With fp16 the scaler leaves out a step whose gradient overflows, and goes on.
        bad = not math.isfinite(loss) or (settings.precision != "fp16" and not math.isfinite(norm))
        if bad:
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
            remedy = f"lower lr (it is {settings.lr:g}), warm up longer, or clip (it is {settings.clip})"
            raise BadInput(f"{what} at step {step}: {remedy}; earlier checkpoints are kept")
    return losses


def _scores(model: Model, task: Task, split: Split, settings: TrainConfig, *, whole: bool) -> dict[str, float]:
    size = task.size(split)
    if size == 0:
        return {}
    batches = None if whole and size is not None else settings.eval_batches
    return evaluate(model, task, split, batch_size=micro_batch(settings), max_batches=batches, precision=settings.precision)


def _check_settings(settings: TrainConfig, device: torch.device) -> None:
    world, micro = devices.world(), micro_batch(settings)
    if micro < 1 or settings.batch_size % (micro * world):
        raise BadInput(
            f"batch_size {settings.batch_size} cannot be cut evenly for micro_batch {settings.micro_batch} and {world} "
            f"processes: make it a multiple of {max(1, micro) * world}"
        )
    if settings.cuda_graph:
        wanted = {
            f"a CUDA device, not {device}": device.type == "cuda",
            f"one process, not {world}": world == 1,
            f"one micro-batch a step, not {settings.batch_size // micro}": micro == settings.batch_size,
            "carry_state off": not settings.carry_state,
            "precision fp32 or bf16, not fp16": settings.precision != "fp16",
        }
        for need, met in wanted.items():
            if not met:
                raise BadInput(f"cuda_graph needs {need}")


def _check_splits(task: Task, settings: TrainConfig) -> None:
    splits: tuple[Split, ...] = ("valid", "test")
    for split in splits:
        if task.size(split) is None and settings.eval_batches is None:
            raise BadInput(f"the {split} split of {type(task).__name__} never ends: set eval_batches")


def _check_carrying(task: Task, model: Model, settings: TrainConfig) -> None:
    """Refuse rows that have nothing to go on from, and a model that remembers nothing."""
    if task.batch("train", 0, settings.batch_size).starts is None:
        raise BadInput(
            f"carry_state is on, but no row of {type(task).__name__} goes on from the batch before: "
            "those of a text do in order documents or stream"
        )
    model.init_state(1)


def _check_tokenizer(task: Task, weights: Path) -> None:
    """Refuse weights whose run read other ids: of an embedding's rows nobody would see it."""
    run = weights.parent.parent if weights.name.startswith("step-") else weights
    ours: Tokenizer | None = getattr(task, "tokenizer", None)
    if ours is not None and (run / "tokenizer.json").is_file() and Tokenizer.load(run).hash != ours.hash:
        raise BadInput(
            f"the weights of {run} were trained with another tokenizer than this text has: "
            "a BPE is learned from its text, so take --tokenizer bytes or gpt2 for both"
        )


def _check_folder(config: RunConfig, folder: Path, resume: bool) -> None:
    """Refuse a folder that a new run would overwrite, or that holds another run than the one to resume."""
    holds_run = (folder / "config.json").exists() or bool(Checkpoints(folder).paths())
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file: a run needs a folder")
    if holds_run and not resume:
        raise BadInput(f"{folder} holds a run already: continue it with --resume, or give another --out")
    if resume and not folder.exists():
        raise BadInput(f"there is no run to resume in {folder}: leave out --resume to start one")
    if holds_run:
        difference = _difference(_read_json(folder / "config.json"), to_dict(config))
        if difference is not None:
            field, old, new = difference
            raise BadInput(
                f"the run in {folder} has {field} = {old!r}, not {new!r}: resume it as it was, or give another --out"
            )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file} is not JSON: {error}") from None


def _difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two configs as JSON differ, and its two values."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {f"{where}.{key}".lstrip("."): (old.get(key), new.get(key)) for key in {**old, **new}}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = {f"{where}[{i}]": pair for i, pair in enumerate(zip(old, new, strict=True))}
    else:
        return None if old == new else (where, old, new)
    return next((found for name, pair in pairs.items() if (found := _difference(*pair, name)) is not None), None)


def main(arguments: list[str] | None = None) -> int:
    """Train the config in a JSON file: 0, or after one line 2 (what is wrong), 1 (memory is short); 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m hippodrome.train", description="Train the run a config describes.")
    parser.add_argument("config", type=Path, help="a RunConfig as JSON, such as the config.json of a run")
    parser.add_argument("folder", type=Path, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    chosen = parser.parse_args(arguments)
    try:
        config = from_dict(RunConfig, _read_json(chosen.config), where=str(chosen.config))
        train(config, chosen.folder, resume=chosen.resume)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as failure:
        if (lacking := shortage(failure)) is None:
            raise
        print(f"error: {lacking}: take a smaller batch_size or micro_batch", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
