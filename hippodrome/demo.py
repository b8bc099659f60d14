"""The demo: a hybrid H3 and a Transformer of equal size learn to write from the same tokens, and show what that costs.

Everything the race leaves is what `compare` leaves (configs, metrics, weights, report.json, curves.png), and the samples in
the report.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hippodrome.compare import compare, match, print_table
from hippodrome.memory import count_parameters
from hippodrome.progress import ProgressDisplay
from hippodrome.recipes._lm import Text
from hippodrome.recipes.h3 import h3
from hippodrome.recipes.transformer import transformer
from hippodrome.run import RunConfig, TrainConfig, write_json
from hippodrome.tasks.lm import Lm

PROMPT = "Fellow-Citizens of the Senate and House of Representatives:"
CONTEXTS = (256, 1024, 4096, 16384)
_TEXT = Text(text="sotu", vocab_size=2048, length=256, holdout=0.01)
# Steps are fixed, not seconds: both see the same tokens on any machine.
_TRAIN = TrainConfig(steps=800, batch_size=8, lr=3e-3, clip=1.0, log_every=5, eval_every=100)


def demo_recipes(quick: bool = False) -> dict[str, RunConfig]:
    """The two competitors. `quick`: much too small to learn anything, for trying out the machinery."""
    text, train, n_layer, d_model = _TEXT, _TRAIN, 4, 128
    if quick:
        text, n_layer, d_model = replace(text, vocab_size=300, length=32, holdout=0.001), 2, 16
        train = replace(train, steps=6, batch_size=4, log_every=2, eval_every=3, eval_batches=1)
    hybrid = h3(n_layer=n_layer, d_model=d_model, n_head=2, text=text, train=train)
    rival = transformer(n_layer=n_layer, d_model=d_model, n_head=2, text=text, train=train)
    return match({"hybrid-h3": hybrid, "transformer": rival})


def run_demo(folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Train both, score both, time both, let both write; return the report. A demo in `folder` is taken up where it stands."""
    recipes = demo_recipes(quick)
    sizes = {name: count_parameters(config.model) for name, config in recipes.items()}
    first = next(iter(recipes.values()))
    assert isinstance(first.task, Lm.Config)
    tokens = first.train.steps * first.train.batch_size * first.task.length
    print(
        "A race on the State of the Union addresses: " + " against ".join(f"{n} ({s:,} parameters)" for n, s in sizes.items())
    )
    print(f"Both see the same {tokens:,} tokens in the same order; afterwards held-out text decides.\n", flush=True)
    if (folder / "report.json").is_file():
        print(f"{folder} holds this race already: its runs are used, not trained again.\n", flush=True)
    contexts = CONTEXTS[:2] if quick else CONTEXTS
    steps = 2 if quick else 32
    report = compare(recipes, folder, contexts=contexts, new_tokens=steps, resume=True, display=ProgressDisplay)
    print_table(report)
    report["samples"] = {
        name: _sample(name, folder / row["runs"][0], 8 if quick else 120) for name, row in report["results"].items()
    }
    write_json(folder / "report.json", report)
    print(f"\n{_verdict(report)}")
    print(f"The runs, report.json and the picture curves.png are in {folder}")
    return report


def _sample(name: str, run: Path, tokens: int) -> str:
    """Let a run continue the prompt, character by character as it comes; return the text."""
    from hippodrome.checkpoint import load
    from hippodrome.generation import stream_text
    from hippodrome.sampling import Sampling
    from hippodrome.tokenizer import Tokenizer

    print(f"\n{name} writes:\n\n{PROMPT}", end="")
    written = []
    sampling = Sampling(temperature=0.8, top_p=0.95)
    for piece in stream_text(load(run, device="auto"), Tokenizer.load(run), PROMPT, tokens, sampling=sampling):
        written.append(piece)
        print(piece, end="")
        sys.stdout.flush()
    print()
    return PROMPT + "".join(written)


def _verdict(report: Mapping[str, Any]) -> str:
    """Who reads better, and what a token costs after the longest context."""
    results = report["results"]
    scores = {name: row["scores"]["bits_per_byte"]["mean"] for name, row in results.items()}
    best, worst = sorted(scores, key=lambda name: scores[name])
    last = {name: row["generation"][-1] for name, row in results.items()}
    light, heavy = sorted(last, key=lambda name: last[name]["state_bytes"])
    share = last[heavy]["state_bytes"] / last[light]["state_bytes"]
    times = " and ".join(f"{name} {1000 * timing['step_s']:.1f} ms" for name, timing in last.items())
    return (
        f"{best} reads held-out text better: {scores[best]:.3f} against {scores[worst]:.3f} bits a byte. "
        f"After {last[light]['prompt_len']:,} tokens a token takes {times}; {heavy} needs {share:.1f} times the memory."
    )
