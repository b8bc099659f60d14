"""Race recipes: equal parameters, the same tokens in the same order, several seeds; one table and one picture.

FOLDER/report.json      the table's numbers, with provenance
       curves.png       training loss, validation score and, where timed, the cost of a token
       NAME-seed0/      the run of each recipe and seed
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hippodrome.devices import choose_device
from hippodrome.memory import count_parameters
from hippodrome.metrics import read_metrics
from hippodrome.model import ModelConfig
from hippodrome.part import BadInput, to_dict
from hippodrome.run import RunConfig, provenance, read_config, write_json
from hippodrome.train import Progress, train

if TYPE_CHECKING:
    from hippodrome.plots import Panel
    from hippodrome.task import Task

Display = Callable[[str], AbstractContextManager[Callable[[Progress], None]]]
"""What is shown of one run, by its title."""


def compare(
    recipes: Mapping[str, RunConfig],
    folder: Path,
    *,
    seeds: int = 1,
    match_parameters: bool = True,
    tolerance: float = 0.02,
    contexts: Sequence[int] = (),
    new_tokens: int = 32,
    resume: bool = False,
    jobs: int = 1,
    display: Display | None = None,
) -> dict[str, Any]:
    """Train every recipe with every seed, score all on the test split, and return the report (also report.json).

    The first recipe sets the number of parameters (see `match`). `contexts`: prompt lengths after which generation is timed,
    `new_tokens` steps each. With `resume` an earlier comparison in `folder` goes on, and its finished runs are not trained
    again. With `jobs` above 1 so many runs are trained at once, each in a process of its own. Raises `BadInput` where the
    recipes cannot be compared, before anything is written.
    """
    if not recipes:
        raise BadInput("there is no recipe to compare")
    if seeds < 1:
        raise BadInput(f"seeds is {seeds}: it must be at least 1")
    if jobs < 1:
        raise BadInput(f"jobs is {jobs}: it must be at least 1")
    if min(contexts, default=1) < 1 or new_tokens < 1:
        raise BadInput(f"contexts {list(contexts)} and new_tokens {new_tokens} must be at least 1")
    check_budgets(recipes)
    _check_contexts(recipes, max(contexts) + new_tokens if contexts else 0)
    if match_parameters:
        recipes = match(recipes, tolerance)
    if folder.exists() and not resume and (folder.is_file() or any(folder.iterdir())):
        raise BadInput(f"{folder} is there already: choose another with --out, or continue it with --resume")

    # Seed by seed, so that a comparison that is stopped early still has every competitor.
    order = [(name, seed) for seed in range(seeds) for name in recipes]
    planned = {
        folder / f"{name}-seed{seed}": dataclasses.replace(
            recipes[name], train=dataclasses.replace(recipes[name].train, seed=recipes[name].train.seed + seed)
        )
        for name, seed in order
    }
    if jobs > 1:
        _train_apart(planned, jobs)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
    for (name, seed), (run, config) in zip(order, planned.items(), strict=True):
        report = _train(config, run, f"{name} seed {seed}" if seeds > 1 else name, display)
        runs[name].append({"folder": run.name, **report})
    results = {name: _summary(folder, reports) for name, reports in runs.items()}
    if contexts:
        for name in recipes:
            results[name]["generation"] = time_contexts(folder / runs[name][0]["folder"], contexts, new_tokens)
    first, trained = next(iter(recipes.values())), runs[next(iter(runs))][0]
    report = {
        "task": to_dict(first.task),
        "headline": trained["headline"],
        "loss_unit": cast("type[Task]", first.task.part).loss_unit,
        "row_name": cast("type[Task]", first.task.part).row_name,
        # A run that was finished before floors were written has none.
        "floors": trained.get("floors", {}),
        "seeds": seeds,
        "results": results,
        "provenance": provenance(first.train.seed, choose_device(first.train.device)),
    }
    write_json(folder / "report.json", report)
    _draw(folder, report)
    return report


def check_budgets(recipes: Mapping[str, RunConfig]) -> None:
    """`BadInput` naming the first thing that would give two recipes other tokens or another order of them."""
    (first_name, first), *others = recipes.items()
    wanted = _budget(first)
    for name, config in others:
        budget = _budget(config)
        if budget["part"] != wanted["part"]:
            raise BadInput(f"{first_name} and {name} learn different tasks: {wanted['part']} and {budget['part']}")
        for field in wanted | budget:
            if wanted.get(field) != budget.get(field):
                values = f"{wanted.get(field)!r} and {budget.get(field)!r}"
                raise BadInput(
                    f"{first_name} and {name} would not see the same tokens: their {field} are {values}; "
                    f"give --{field.replace('_', '-')} to both"
                )


def _budget(config: RunConfig) -> dict[str, Any]:
    settings = {name: getattr(config.train, name) for name in ("steps", "batch_size", "carry_state")}
    return {**to_dict(config.task), **settings}


def _check_contexts(recipes: Mapping[str, RunConfig], longest: int) -> None:
    for name, config in recipes.items():
        if longest and not hasattr(config.model.embed, "vocab_size"):
            raise BadInput(f"{name} reads no tokens: generation cannot be timed, leave contexts out")
        positions = getattr(config.model.embed, "positions", 0)
        if 0 < positions < longest:
            raise BadInput(f"{name} has learned {positions} positions: it cannot be timed over {longest} tokens")


def match(recipes: Mapping[str, RunConfig], tolerance: float = 0.02) -> dict[str, RunConfig]:
    """The recipes, all but the first changed where needed until their parameters agree within `tolerance`: in their d_ff, or
    where they have none in their d_model.
    """
    if not 0 < tolerance < 1:
        raise BadInput(f"tolerance is {tolerance}: it is a share, above 0 and below 1")
    (first_name, first), *others = recipes.items()
    target = count_parameters(first.model)
    matched = {first_name: first}
    for name, config in others:
        model = _resized(config.model, target, tolerance)
        found = count_parameters(model)
        if abs(found - target) > tolerance * target:
            changed = "d_ff" if _has_d_ff(config.model) else "d_model"
            raise BadInput(
                f"{name} cannot have {target:,} parameters within {tolerance:.2g} as {first_name} has: by its {changed} it "
                f"comes to {found:,}; change its width or depth, or give --no-match-parameters"
            )
        matched[name] = dataclasses.replace(config, model=model)
    return matched


def _resized(model: ModelConfig, target: int, tolerance: float) -> ModelConfig:
    """The model with the d_ff, or where it has none the d_model, that brings it to `target` parameters or nearest to them."""
    found = count_parameters(model)
    if abs(found - target) <= tolerance * target:
        return model
    if not _has_d_ff(model):
        return _with_another_width(model, target, tolerance)
    # Parameters are linear in d_ff, so two points give the rest; a channel mixer that rounds its width may be off by a bit.
    low, high = count_parameters(_with_d_ff(model, 64)), count_parameters(_with_d_ff(model, 128))
    guess = max(1, round(64 + 64 * (target - low) / (high - low)))
    widths = range(max(1, guess - 8), guess + 9)
    best = min(widths, key=lambda d_ff: (abs(count_parameters(_with_d_ff(model, d_ff)) - target), d_ff))
    return _with_d_ff(model, best)


def _with_another_width(model: ModelConfig, target: int, tolerance: float) -> ModelConfig:
    """A d_model that is a multiple of 8, where that is too coarse of 4, 2 or 1, and of every block's heads; not below 8."""
    heads = math.lcm(*(getattr(block.mixer, name, 1) for block in model.blocks for name in ("n_head", "head_dim")))

    # Parameters grow at least in proportion to the width, but for a few that do not depend on it.
    most = 2 * math.ceil(model.d_model * max(1.0, target / count_parameters(model)))

    def off(d_model: int) -> int:
        return count_parameters(dataclasses.replace(model, d_model=d_model)) - target

    nearest = model
    for multiple in (8, 4, 2, 1):
        step = math.lcm(multiple, heads)
        widths = range(step * -(-8 // step), most + step, step)
        try:
            above = bisect.bisect_left(widths, 0, key=off)
            best = min(widths[max(0, above - 1) : above + 1], key=lambda width: abs(off(width)))
        except BadInput:
            # A part that does not take every such width: the model keeps the one it has.
            break
        nearest = dataclasses.replace(model, d_model=best)
        if abs(off(best)) <= tolerance * target:
            break
    return nearest


def _has_d_ff(model: ModelConfig) -> bool:
    return any(hasattr(block.channel, "d_ff") for block in model.blocks)


def _with_d_ff(model: ModelConfig, d_ff: int) -> ModelConfig:
    blocks = []
    for block in model.blocks:
        if block.channel is not None and hasattr(block.channel, "d_ff"):
            block = dataclasses.replace(block, channel=dataclasses.replace(block.channel, d_ff=d_ff))  # type: ignore[call-arg]
        blocks.append(block)
    return dataclasses.replace(model, blocks=tuple(blocks))


def time_contexts(run: Path, contexts: Sequence[int], new_tokens: int) -> list[dict[str, float]]:
    """Generation of a run's model timed after prompts of each length, on the device it was trained on."""
    from hippodrome.checkpoint import load
    from hippodrome.timing import time_generation

    model = load(run, device=read_config(run).train.device)
    return [time_generation(model, length, new_tokens) for length in contexts]


def print_table(report: Mapping[str, Any]) -> None:
    """The table of a report, on standard output."""
    from rich.console import Console
    from rich.table import Table

    results: dict[str, Any] = report["results"]
    names = list(dict.fromkeys(score for row in results.values() for score in row["scores"]))
    names.sort(key=lambda name: (name != report["headline"], name))
    table = Table("recipe", "parameters", title=f"test scores, {report['seeds']} seed{'s' if report['seeds'] > 1 else ''}")
    measured = any(row.get("peak_bytes") for row in results.values())
    rows = report.get("row_name") or ""
    speeds = [f"{rows or 'tokens'}/s", *(["peak memory"] if measured else [])]
    for name in [*(name.replace("_", " ") for name in names), *speeds]:
        table.add_column(name, justify="right")
    for name, row in results.items():
        scores = [_plus_minus(row["scores"][score]) if score in row["scores"] else "" for score in names]
        speed = row["rows_per_s" if rows else "tokens_per_s"]
        table.add_row(name, f"{row['parameters']:,}", *scores, f"{speed:,.0f}", *_memory(row))
    for name, value in report["floors"].items():
        table.add_row(f"({name})", "", f"{value:.4f}", *[""] * len(names), style="dim")
    console = Console()
    console.print(table)
    if any("generation" in row for row in results.values()):
        console.print(_generation_table(results))


def _memory(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['peak_bytes'] / 1e9:.2f} GB"] if row.get("peak_bytes") else []


def _generation_table(results: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table("context", title="generation: ms a token, KiB of state")
    for name in results:
        table.add_column(name, justify="right")
    for timings in zip(*[row["generation"] for row in results.values()], strict=True):
        cells = [f"{1000 * timing['step_s']:.2f} ms  {timing['state_bytes'] / 1024:,.0f} KiB" for timing in timings]
        table.add_row(f"{timings[0]['prompt_len']}", *cells)
    return table


def _plus_minus(values: Mapping[str, Any]) -> str:
    spread = f" ± {values['spread']:.4f}" if values["spread"] is not None else ""
    return f"{values['mean']:.4f}{spread}"


def _train_apart(planned: Mapping[Path, RunConfig], jobs: int) -> None:
    """Train what is not yet trained, `jobs` processes at a time that share the cores. Stops at the first that fails."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting, running = list(planned.items()), dict[Path, subprocess.Popen[str]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run, config = waiting.pop(0)
                running[run] = _start(config, run, threads)
            time.sleep(0.2)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                process = running.pop(run)
                if process.returncode:
                    raise BadInput(f"{run.name} failed: {process.communicate()[1].strip().rpartition(chr(10))[2]}")
                print(f"{run.name} is trained, {len(waiting) + len(running)} of {len(planned)} to go", flush=True)
    finally:
        for process in running.values():
            process.terminate()


def _start(config: RunConfig, run: Path, threads: int) -> subprocess.Popen[str]:
    plan = run.with_name(f"{run.name}.json")
    write_json(plan, to_dict(config))
    command = [sys.executable, "-m", "hippodrome.train", str(plan), str(run)]
    command += ["--resume"] if (run / "config.json").is_file() else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def _train(config: RunConfig, run: Path, title: str, display: Display | None) -> dict[str, Any]:
    resume = (run / "config.json").is_file()
    if display is None:
        return train(config, run, resume=resume)
    with display(title) as watch:
        return train(config, run, resume=resume, watch=watch)


def _summary(folder: Path, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Test scores over the seeds: mean, sample standard deviation (None for one seed) and each; and what training cost.

    steady_tokens_per_s: the median of the logged steps, which what is compiled first does not weigh on. peak_bytes: of the
    GPU's memory, of the seed that held the most; None on a CPU.
    """
    peaks = [report["peak_bytes"] for report in reports if report.get("peak_bytes") is not None]
    scores = {}
    for name in reports[0]["scores"]["test"]:
        values = [report["scores"]["test"][name] for report in reports]
        spread = statistics.stdev(values) if len(values) > 1 else None
        scores[name] = {"mean": statistics.fmean(values), "spread": spread, "values": values}
    return {
        "parameters": reports[0]["parameters"],
        "tokens": reports[0]["tokens"],
        "seconds": statistics.fmean(report["seconds"] for report in reports),
        "tokens_per_s": statistics.fmean(report["tokens"] / report["seconds"] for report in reports),
        "steady_tokens_per_s": statistics.fmean(_steady(folder / report["folder"]) for report in reports),
        "peak_bytes": max(peaks, default=None),
        # A run that was finished before rows were counted has none.
        "rows_per_s": statistics.fmean(report.get("rows", 0) / report["seconds"] for report in reports),
        "scores": scores,
        "runs": [report["folder"] for report in reports],
    }


def _steady(run: Path) -> float:
    return statistics.median(line["tokens_per_s"] for line in read_metrics(run))


def _draw(folder: Path, report: Mapping[str, Any]) -> None:
    from hippodrome import plots

    names = ", ".join(report["results"])
    plots.draw(folder / "curves.png", panels(folder, report), f"{names}: equal tokens in equal order")


def panels(folder: Path, report: Mapping[str, Any]) -> list[Panel]:
    """Training loss and validation score against tokens; where timed, milliseconds and state a generated token."""
    from hippodrome.plots import Panel

    logs = {name: [read_metrics(folder / run) for run in row["runs"]] for name, row in report["results"].items()}
    headline = report["headline"]
    found = [
        Panel(
            title="training loss",
            x="tokens",
            y=report["loss_unit"],
            curves={name: [_smooth(log, lambda line: line["loss"]) for log in each] for name, each in logs.items()},
        ),
        Panel(
            title="held-out score while training",
            x="tokens",
            y=headline.replace("_", " "),
            curves={name: [_scores(folder / run, headline) for run in row["runs"]] for name, row in report["results"].items()},
            markers=True,
        ),
    ]
    timed = {name: row["generation"] for name, row in report["results"].items() if "generation" in row}
    if timed:

        def curves(value: Callable[[Mapping[str, float]], float]) -> dict[str, list[Any]]:
            return {name: [([t["prompt_len"] for t in each], [value(t) for t in each])] for name, each in timed.items()}

        cost: dict[str, Any] = {"x": "tokens of context", "log_x": True, "markers": True}
        found.append(Panel(title="generation: time", y="ms a token", curves=curves(lambda t: 1000 * t["step_s"]), **cost))
        memory = curves(lambda t: t["state_bytes"] / 1024)
        found.append(Panel(title="generation: memory", y="KiB of state a sequence", curves=memory, log_y=True, **cost))
    return found


def _scores(run: Path, name: str) -> tuple[list[float], list[float]]:
    """A validation score against tokens, all on the same data."""
    lines = [line for line in read_metrics(run) if name in line.get("valid", {})]
    # The last score is of the whole split; those before may be of its first batches, which are easier or harder.
    if read_config(run).train.eval_batches is not None and len(lines) > 1:
        lines = lines[:-1]
    return [line["tokens"] for line in lines], [line["valid"][name] for line in lines]


def _smooth(log: Sequence[Mapping[str, Any]], value: Callable[[Any], float]) -> tuple[list[float], list[float]]:
    """Means over stretches, about a hundred a run: single batches are too noisy to read."""
    width = max(1, math.ceil(len(log) / 100))
    parts = [log[start : start + width] for start in range(0, len(log), width)]
    return [part[-1]["tokens"] for part in parts], [statistics.fmean(map(value, part)) for part in parts]
