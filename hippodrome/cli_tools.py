"""The verbs around the runs: time, look up, convert, check, and the demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from hippodrome.part import BadInput, nearest
from hippodrome.tables import print_table

Name = Annotated[Positional[str], arg(metavar="NAME")]


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
    print_table(*timing.table(report))
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
    print_table(("check", "difference", "allowed", ""), cells)
    wrong = [row.check for row in rows if not row.ok]
    if wrong:
        raise BadInput(f"{subject} is not one function: {', '.join(wrong)} differ by more than rounding")


def doctor() -> None:
    """What is installed, and which backend each op takes here and why not the others."""
    from hippodrome.doctor import examine

    report = examine()
    print_table(("", ""), [*report.versions.items(), *[("device", device) for device in report.devices]])
    print_table(("", ""), [(name, str(count)) for name, count in report.threads.items()])
    packages = [(package.name, package.version or "absent", package.purpose) for package in report.packages]
    print_table(("package", "version", "for"), packages)
    reasons = [
        (choice.op, choice.device, choice.backend, "; ".join(f"{name}: {why}" for name, why in choice.reasons.items()))
        for choice in report.choices
    ]
    print_table(("op", "on", "takes", "backends"), reasons)
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
