"""The command: a verb is a function of this file or of `cli_tools`, its signature its command line, read by `dispatch`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from hippodrome.cli_tools import bench, convert, demo, doctor, list_, parity, show
from hippodrome.dispatch import dispatch
from hippodrome.part import BadInput
from hippodrome.run import RunConfig
from hippodrome.sampling import Sampling
from hippodrome.tables import print_scores
from hippodrome.task import Split

if TYPE_CHECKING:
    from hippodrome.task import Task

Run = Annotated[Positional[Path], arg(metavar="RUN")]
_SAMPLING = Sampling(temperature=0.8, top_p=0.95)


def train(recipe: tuple[str, RunConfig], *, out: Path | None = None, resume: bool = False) -> None:
    """Train a model: hippodrome train RECIPE [flags]. Recipes are shown by `hippodrome list`.

    Args:
        out: The folder of the run; by default runs/RECIPE.
        resume: Continue the run in that folder from its newest whole checkpoint.
    """
    from hippodrome.progress import ProgressDisplay
    from hippodrome.train import train as train_run

    name, config = recipe
    folder = out or Path("runs") / name
    with ProgressDisplay(name) as watch:
        report = train_run(config, folder, resume=resume, watch=watch)
    if os.environ.get("RANK", "0") != "0":
        return
    print_scores(report["scores"], report["headline"], report.get("floors", {}))
    rows = report.get("row_name")
    speed = f", {report['rows'] / report['seconds']:,.0f} {rows}/s" if rows else ""
    took = f"{report['parameters']:,} parameters, {report['tokens']:,} tokens in {report['seconds']:.0f} s{speed}"
    print(f"{took}; the run is in {folder}")


def generate(
    run: Run,
    *,
    prompt: tuple[str, ...] = ("",),
    max_new_tokens: int = 200,
    sampling: Sampling = _SAMPLING,
    stop: tuple[str, ...] = (),
    device: str = "auto",
) -> None:
    """Continue prompts with a trained language model: one is streamed, several are a batch, printed in order.

    An encoder-decoder answers them instead: a prompt is its source, and the answer stands on the line below.

    Args:
        run: The run's folder.
        prompt: One text or several; an empty one starts a document.
        max_new_tokens: Tokens to write at most.
        stop: Texts that end the writing.
        device: auto, cpu, cuda, cuda:1 and so on.
    """
    from hippodrome import generation
    from hippodrome.checkpoint import load

    model = load(run, device=device)
    tokenizer = _tokenizer(run)
    between = "" if model.prompt_end is None else "\n"
    if len(prompt) == 1:
        sys.stdout.write(prompt[0] + between)
        for piece in generation.stream_text(model, tokenizer, prompt[0], max_new_tokens, sampling=sampling, stop=stop):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        return
    rows = generation.generate(model, prompt, max_new_tokens, sampling=sampling, stop=stop, tokenizer=tokenizer)
    for text, row in zip(prompt, rows, strict=True):
        print(f"{text}{between}{tokenizer.decode(row)}\n")


def eval_(
    run: Run,
    *,
    split: Split = "test",
    batch_size: int | None = None,
    max_batches: int | None = None,
    latents: int | None = None,
    stride: int | None = None,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    by_position: bool = False,
) -> None:
    """Score a trained model on held-out data; the scores are printed and written to RUN/eval.json.

    Args:
        run: The run's folder.
        split: Which data to score on.
        batch_size: Rows scored at once; by default as in training.
        max_batches: Score only so many batches; by default all.
        latents: Of Perceiver AR: latents a pass; by default as configured.
        stride: Of Perceiver AR: new tokens scored a pass; by default as configured, or half of the latents given.
        device: auto, cpu, cuda, cuda:1 and so on.
        precision: fp32, or autocast to bf16 or fp16.
        by_position: Of a text, also bits per byte by position in the document, in fp32: positions.json and positions.png.
    """
    from hippodrome.checkpoint import load
    from hippodrome.evaluate import evaluate
    from hippodrome.run import provenance, read_config, write_json

    model = load(run, device=device)
    if latents is not None or stride is not None:
        model.score_with(latents, stride)
    config = read_config(run)
    task: Task = config.task.build()
    size = config.train.batch_size if batch_size is None else batch_size
    scores = evaluate(model, task, split, batch_size=size, max_batches=max_batches, precision=precision)
    where = next(model.parameters()).device
    floors = dict(task.floors())
    facts = {"split": split, "scores": scores, "headline": task.headline, "floors": floors, "max_batches": max_batches}
    if model.protocol is not None:
        print(f"protocol: {model.protocol}")
        facts["protocol"] = model.protocol
    write_json(run / "eval.json", facts | {"provenance": provenance(None, where)})
    print_scores({split: scores}, task.headline, floors)
    if by_position:
        from hippodrome import by_position as positions

        entries = positions.by_position(model, task, split)
        whole = positions.overall(entries)
        found = {"split": split, "bits_per_byte": whole, "positions": entries, "provenance": provenance(None, where)}
        write_json(run / "positions.json", found)
        positions.draw_positions(run / "positions.png", entries, run.name)
        for entry in entries:
            span = f"{entry['first']:>9,} to {entry['stop']:>9,}"
            print(f"{span}: {entry['bits_per_byte']} bits per byte, {entry['tokens']:,} tokens")
        print(f"whole documents, state carried: {whole} bits per byte")


def compare(
    recipes: dict[str, RunConfig],
    *,
    out: Path | None = None,
    seeds: int = 1,
    match_parameters: bool = True,
    tolerance: float = 0.02,
    contexts: tuple[int, ...] = (),
    resume: bool = False,
    jobs: int = 1,
) -> None:
    """Race recipes: equal parameters, tokens and data order; a table and a picture. hippodrome compare RECIPE... [flags].

    The first recipe sets the number of parameters; the width of the others' channel mixers is changed until they agree, or
    of those that have none their own. A flag of recipes goes to all of them.

    Args:
        out: The folder of the comparison; by default runs/compare-RECIPE-RECIPE.
        seeds: Runs of each recipe, with seeds that follow its own.
        match_parameters: Make the numbers of parameters equal.
        tolerance: Largest relative difference in parameters.
        contexts: Time generation after prompts of so many tokens.
        resume: Continue a comparison; finished runs in it are not trained again.
        jobs: Runs trained at once, each in a process of its own.
    """
    from hippodrome.compare import compare as compare_runs
    from hippodrome.compare import print_table
    from hippodrome.progress import ProgressDisplay

    folder = out or Path("runs") / "-".join(["compare", *recipes])
    report = compare_runs(
        recipes,
        folder,
        seeds=seeds,
        match_parameters=match_parameters,
        tolerance=tolerance,
        contexts=contexts,
        resume=resume,
        jobs=jobs,
        display=ProgressDisplay,
    )
    print_table(report)
    print(f"report.json and curves.png are in {folder}")


def grid(
    races: dict[str, dict[str, RunConfig]],
    *,
    over: tuple[str, ...] = (),
    out: Path | None = None,
    seeds: int = 1,
    match_parameters: bool = True,
    tolerance: float = 0.02,
    resume: bool = False,
    jobs: int = 1,
) -> None:
    """Compare recipes once for every value of a flag: a table. hippodrome grid RECIPE... --over FLAG VALUE... [flags].

    Each value is a comparison of its own, in a folder of its name.

    Args:
        over: A flag of the recipes and its values, such as task shift cumsum.
        out: The folder of it all; by default runs/grid-RECIPE-RECIPE.
        seeds: Runs of each recipe, with seeds that follow its own.
        match_parameters: Make the numbers of parameters equal.
        tolerance: Largest relative difference in parameters.
        resume: Continue; finished runs are not trained again.
        jobs: Runs trained at once, each in a process of its own.
    """
    from hippodrome.grid import grid as run_grid
    from hippodrome.grid import print_grid
    from hippodrome.progress import ProgressDisplay

    folder = out or Path("runs") / "-".join(["grid", *next(iter(races.values()))])
    settings: dict[str, Any] = {"seeds": seeds, "match_parameters": match_parameters, "tolerance": tolerance}
    report = run_grid(over[0], races, folder, resume=resume, jobs=jobs, display=ProgressDisplay, **settings)
    print_grid(report)
    print(f"report.json and a folder a value are in {folder}")


def verify_resume(recipe: tuple[str, RunConfig], *, out: Path | None = None, kills: int = 3, kill_seed: int = 0) -> None:
    """Prove that a run survives kill -9: train it whole, train it killed and resumed, compare every loss bit by bit.

    Args:
        out: The folder of the two runs; by default a temporary one.
        kills: How often the second run is killed.
        kill_seed: Draws the moments.
    """
    import tempfile

    from hippodrome.verify import verify_resume as verify

    with tempfile.TemporaryDirectory() as temporary:
        found = verify(recipe[1], out or Path(temporary) / "runs", kills=kills, seed=kill_seed)
    steps, killed = len(found.rows), ", ".join(map(str, found.kills))
    if not found.equal:
        differing = f"the first of {len(found.differing)} losses that differ is at step {found.differing[0]}"
        raise BadInput(
            f"killed after steps {killed} and resumed, the run is not the same: "
            f"{differing if found.differing else 'the losses agree, the final weights do not'}"
        )
    print(f"killed after steps {killed} and resumed: all {steps} losses and the final weights agree in every bit")


def _tokenizer(run: Path) -> Any:
    from hippodrome.tokenizer import Tokenizer

    if not (run / "tokenizer.json").is_file():
        raise BadInput(f"{run} has no tokenizer.json: it is no run on text")
    return Tokenizer.load(run)


VERBS: dict[str, Callable[..., None]] = {
    "train": train,
    "generate": generate,
    "eval": eval_,
    "compare": compare,
    "grid": grid,
    "list": list_,
    "show": show,
    "convert": convert,
    "bench": bench,
    "parity": parity,
    "doctor": doctor,
    "demo": demo,
    "verify-resume": verify_resume,
}
"""Verb -> function."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (by default this process's) and return its exit code."""
    return dispatch(VERBS, sys.argv[1:] if argv is None else argv)
