"""The command: a verb is a function of this file, its signature its command line, read by `dispatch`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from hippodrome.dispatch import dispatch
from hippodrome.part import BadInput, nearest
from hippodrome.run import RunConfig
from hippodrome.sampling import Sampling
from hippodrome.task import Split

if TYPE_CHECKING:
    from hippodrome.task import Task

Run = Annotated[Positional[Path], arg(metavar="RUN")]
Name = Annotated[Positional[str], arg(metavar="NAME")]
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
    _print_scores(report["scores"], report["headline"], report.get("floors", {}))
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
    _print_scores({split: scores}, task.headline, floors)
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


def bench(
    subject: Annotated[Positional[str], arg(metavar="SUBJECT")] = "diagonal_ssm",
    *,
    lengths: tuple[int, ...] | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    channels: int | None = None,
    layers: int | None = None,
    modes: int | None = None,
    taps: int | None = None,
    head_dim: int | None = None,
    vocabulary: int | None = None,
    new_tokens: int | None = None,
    bidirectional: bool = False,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    state_dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    mode: Literal["eager", "blocks", "whole", "graph"] | None = None,
    checkpointing: bool = False,
    tiles: tuple[int, ...] | None = None,
    longest: bool = False,
    ways: tuple[str, ...] = (),
    repeats: int | None = None,
    device: str = "auto",
    seed: int = 0,
    out: Path = Path("benchmarks"),
    tune: bool = False,
) -> None:
    """Time an op, a training step or generation against its peers: a table, JSON and a picture.

    A flag that is not given is the subject's own choice for the device; one that it does not know is refused.

    Args:
        subject: diagonal_ssm, long_conv, h3, linear_attention, scan, attention, block_sparse, train, attention_train, generate,
            state or lra.
        lengths: Tokens of a row, of a prompt, or before a step.
        tokens: Tokens of a batch, kept at every length.
        batch: Rows, instead of as many as make the tokens.
        channels: Channels, or the width of a model.
        layers: Blocks of a model.
        modes: Complex modes of a channel; of the models of `state`, states.
        taps: Taps of a short or long kernel; of long_conv by default as many as tokens.
        head_dim: Channels of a head of H3, of linear attention or of attention.
        vocabulary: Ids of a language model.
        new_tokens: Tokens generated after a prompt.
        bidirectional: Classifiers of lra, and patterns of block_sparse, that look both ways.
        dtype: fp32, or inputs (of models: autocast) in bf16 or fp16.
        state_dtype: How generation stores H3's states between steps.
        mode: How models run: eager, torch.compile of their blocks or of the whole, or one CUDA graph a step.
        checkpointing: Train with activation checkpointing.
        tiles: Sides of the tiles of block-sparse patterns.
        longest: Of attention_train: double the context until memory is short.
        ways: Time only those with one of these words in their names.
        repeats: Calls that are timed, of which the median counts; by default as many as fit a budget.
        device: auto, cpu, cuda, cuda:1 and so on.
        seed: Of the inputs.
        out: The folder of SUBJECT_DEVICE.json and its picture.
        tune: Instead, measure anew the table by which long_conv chooses its algorithm; with --lengths, --dtype or --ways
            (toeplitz, partitioned, fft, block_fft) only those, beside what the table has.
    """
    from hippodrome import bench as timing
    from hippodrome.devices import choose_device

    where = choose_device(device)
    if tune:
        print(f"{timing.tune(where, lengths=lengths or (), dtype=dtype, paths=ways, progress=_say)} is written")
        return
    settings: dict[str, Any] = {"lengths": lengths, "tokens": tokens, "batch": batch, "channels": channels, "layers": layers}
    settings |= {"modes": modes, "taps": taps, "head_dim": head_dim, "vocabulary": vocabulary, "new_tokens": new_tokens}
    settings |= {"dtype": dtype, "state_dtype": state_dtype, "mode": mode, "tiles": tiles}
    settings |= {"bidirectional": bidirectional or None, "checkpointing": checkpointing or None, "longest": longest or None}
    report = timing.bench(subject, where, out=out, seed=seed, repeats=repeats, ways=ways, progress=_say, **settings)
    _print_table(*timing.table(report))
    for line in timing.ratio_lines(report):
        print(line)
    print(f"{timing.path_of(report, out, where)} and its picture are written")
    wrong = timing.differing(report)
    if wrong:
        raise BadInput(f"{subject} of our own was not timed: {'; '.join(wrong)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def list_() -> None:
    """What there is: recipes, and the parts by the folder of their slot."""
    from hippodrome import catalog

    print(catalog.overview())


def show(name: Name, *, out: Path | None = None, length: int = 256, tile: int = 16) -> None:
    """One part or recipe: its equation, its files, its fields and their defaults, the recipes that use it.

    Args:
        name: A name that `hippodrome list` shows, alone (h3) or with its folder (mixers/h3); or a pattern as
            "pattern:window(size=64) | global(size=16)"; pattern:all is an example of every one.
        out: Where a pattern's picture goes: its mask and its tiles.
        length: Tokens of a pattern.
        tile: Tokens of the tiles that are counted.
    """
    from hippodrome import catalog

    if name.startswith("pattern:"):
        print(catalog.describe_pattern(name.removeprefix("pattern:"), length=length, tile=tile, out=out))
    else:
        print(catalog.describe(name))


def convert(
    kind: Annotated[Positional[Literal["h3", "vit"]], arg(metavar="{h3,vit}")],
    checkpoint: Annotated[Positional[Path], arg(metavar="CKPT")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    *,
    n_head: int | None = None,
    image_size: tuple[int, ...] = (),
    activation: Literal["gelu_tanh", "gelu"] | None = None,
) -> None:
    """Make a run of a checkpoint that the authors of a system published: hippodrome convert h3|vit CKPT OUT.

    Args:
        kind: Whose checkpoint it is; vit: an .npz of the authors' JAX code, or timm's names as .safetensors.
        checkpoint: The file.
        out: The folder of the run that is written.
        n_head: Attention heads, where the file does not hold them; known for the published sizes.
        image_size: Of vit: a side, or height and width, of the pictures to come; positions are resized.
        activation: Of vit; none: that of the code whose names the file has.
    """
    if kind == "vit":
        from hippodrome.convert_vit import convert_vit

        convert_vit(checkpoint, out, image_size=image_size, n_head=n_head, activation=activation)
    else:
        from hippodrome.convert import convert_h3

        if image_size or activation:
            raise BadInput("image-size and activation are of vit: leave them out for h3")
        convert_h3(checkpoint, out, n_head=n_head)
    print(f"converted; the run is in {out}")


def parity(
    subject: Annotated[Positional[str], arg(metavar="NAME|RUN")],
    *,
    length: int = 64,
    batch: int = 3,
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = "fp32",
    d_model: int = 32,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Check that a mixer or a trained model is one function: whole = chunks = steps = padded, in a table.

    Args:
        subject: A mixer's name, or the folder of a run.
        length: Tokens a row.
        batch: Rows.
        precision: The dtype of weights and inputs.
        d_model: Width of a mixer; a run has its own.
        seed: Of a mixer's weights, the inputs and the cuts.
        device: auto, cpu, cuda, cuda:1 and so on.
    """
    from hippodrome.checkpoint import load
    from hippodrome.devices import choose_device
    from hippodrome.model import Mixer
    from hippodrome.parity import parity as check
    from hippodrome.part import find, names

    settings: dict[str, Any] = {"length": length, "batch": batch, "precision": precision, "seed": seed}
    where = choose_device(device)
    if subject in names("mixers"):
        rows = check(find(Mixer, subject).Config(), d_model=d_model, device=where, **settings)
    elif Path(subject).exists():
        rows = check(load(subject, device=where), device=where, **settings)
    else:
        raise BadInput(f"{subject!r} is no mixer and no folder: {nearest(subject, names('mixers'))}")
    cells = [(row.check, f"{row.difference:.1e}", f"{row.tolerance:.0e}", "ok" if row.ok else "FAILS") for row in rows]
    _print_table(("check", "difference", "allowed", ""), cells)
    wrong = [row.check for row in rows if not row.ok]
    if wrong:
        raise BadInput(f"{subject} is not one function: {', '.join(wrong)} differ by more than rounding")


def doctor() -> None:
    """What is installed, and which backend each op takes here and why not the others."""
    from hippodrome.doctor import examine

    report = examine()
    _print_table(("", ""), [*report.versions.items(), *[("device", device) for device in report.devices]])
    _print_table(("", ""), [(name, str(count)) for name, count in report.threads.items()])
    packages = [(package.name, package.version or "absent", package.purpose) for package in report.packages]
    _print_table(("package", "version", "for"), packages)
    reasons = [
        (choice.op, choice.device, choice.backend, "; ".join(f"{name}: {why}" for name, why in choice.reasons.items()))
        for choice in report.choices
    ]
    _print_table(("op", "on", "takes", "backends"), reasons)
    if report.missing:
        raise BadInput(f"needed and not installed: {', '.join(report.missing)}")


def demo(*, out: Path = Path("runs/demo"), quick: bool = False) -> None:
    """Race a hybrid H3 against a Transformer on real text: train, score, time, sample, a picture. Six minutes on two cores.

    Args:
        out: The folder that the race leaves.
        quick: A race of seconds that shows nothing but that it runs.
    """
    from hippodrome.demo import run_demo

    run_demo(out, quick=quick)


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


def _print_scores(scores: dict[str, dict[str, float]], headline: str, floors: Mapping[str, float]) -> None:
    """A row a split, and one for each floor of the headline score."""
    named = scores | {f"({name})": {headline: value} for name, value in floors.items()}
    names = sorted({name for row in named.values() for name in row})
    rows = [(split, *[f"{row[name]:.4f}" if name in row else "" for name in names]) for split, row in named.items()]
    _print_table(("split", *[name.replace("_", " ") for name in names]), rows)


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, show_header=any(heads))
    for row in rows:
        table.add_row(*row)
    Console().print(table)


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
