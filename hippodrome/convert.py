"""Convert the published checkpoints of H3 language models (`h3_checkpoint.py`) into runs.

Nothing is written until the converted model says, on a fixed prompt, what `reference_logits` computes from the file's own
tensors in float64.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hippodrome.channels.mlp import Mlp
from hippodrome.checkpoint import save
from hippodrome.embeds.tokens import Tokens
from hippodrome.files import replacing, write_json
from hippodrome.h3_checkpoint import EMBEDDING, HEAD, INV_FREQ, Layout, Weights, expected_shapes, infer_layout, read_weights
from hippodrome.h3_reference import reference_logits
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.h3 import H3
from hippodrome.model import BlockConfig, Model, ModelConfig
from hippodrome.part import BadInput
from hippodrome.positions import Rotary
from hippodrome.readouts.lm import Lm
from hippodrome.run import RunConfig, TrainConfig, provenance, write_config
from hippodrome.tasks import lm as tasks_lm
from hippodrome.tokenizer import Tokenizer

TOLERANCE = 1e-4
"""Largest difference of the logit check, relative to the largest logit: fp32 against float64 through up to 32 blocks."""

CHECK_TOKENS = 80
"""Length of the fixed prompt: more than the shift's 64 taps."""


def model_config(layout: Layout) -> ModelConfig:
    """Our model of this layout."""
    mixer = H3.Config(head_dim=layout.d_head, d_state=layout.d_state)
    position = Rotary(layout.rotary_dim) if layout.rotary_dim else None
    attention = Attention.Config(n_head=layout.n_head or 1, position=position)
    channel = Mlp.Config(d_ff=layout.d_inner, activation="gelu_tanh")
    return ModelConfig(
        d_model=layout.d_model,
        blocks=tuple(
            BlockConfig(mixer=attention if i in layout.attention_layers else mixer, channel=channel)
            for i in range(layout.n_layer)
        ),
        embed=Tokens.Config(vocab_size=layout.vocab_size, pad_to_multiple=1),
        readout=Lm.Config(tied=layout.tied),
    )


def our_names(layout: Layout) -> dict[str, str]:
    """Name in a checkpoint -> name in our model, for every parameter."""
    parts = {
        "mixer.ssm_k_kernel.kernel.B": "mixer.shift.B",
        "mixer.ssm_k_kernel.kernel.C": "mixer.shift.C",
        "mixer.ssm_k_D": "mixer.shift.D",
        "mixer.kernel.kernel.log_dt": "mixer.diagonal.log_dt",
        "mixer.kernel.kernel.inv_A_real": "mixer.diagonal.log_A_real",
        "mixer.kernel.kernel.A_imag": "mixer.diagonal.A_imag",
        "mixer.kernel.kernel.B": "mixer.diagonal.B",
        "mixer.kernel.kernel.C": "mixer.diagonal.C",
        "mixer.D": "mixer.diagonal.D",
    }
    modules = {"norm1": "mixer_norm", "norm2": "channel_norm", "mlp.fc1": "channel.fc1", "mlp.fc2": "channel.fc2"}
    named = {EMBEDDING: "embed.table.weight"}
    for key in expected_shapes(layout):
        if found := re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", key):
            name = found[2]
            module, _, kind = name.rpartition(".")
            if name != INV_FREQ:
                named[key] = f"blocks.{found[1]}." + parts.get(name, f"{modules.get(module, module)}.{kind}")
        elif key.startswith("backbone.ln_f."):
            named[key] = key.replace("backbone.ln_f", "final_norm")
    return named if layout.tied else {**named, HEAD: "readout.linear.weight"}


def convert_h3(checkpoint: str | Path, out: str | Path, *, n_head: int | None = None) -> dict[str, Any]:
    """Write the checkpoint of an H3 language model as the folder `out` and return what converted.json in it says.

    n_head: attention heads, which no checkpoint holds; None takes them from the table of the published sizes. The folder
    holds model.safetensors (fp32), config.json and, where the vocabulary is GPT-2's, its tokenizer.json. Raises `BadInput`
    when the file is no such checkpoint, is damaged, or when the converted model fails the logit check; `out` is then untouched.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise BadInput(f"{out} is {'a file' if out.is_file() else 'not empty'}: give a new folder to write")
    weights = read_weights(checkpoint)
    layout = infer_layout(weights, n_head)
    model = _model(weights, layout)
    tokenizer = Tokenizer.gpt2() if 50257 <= layout.vocab_size <= 50264 else None
    report = {
        "source": {"file": checkpoint.name, "bytes": checkpoint.stat().st_size},
        "layout": {**asdict(layout), "attention_layers": list(layout.attention_layers)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokenizer": "gpt2" if tokenizer else None,
        "check": logit_check(model, weights, layout),
        "provenance": provenance(),
    }
    with replacing(out) as beside:
        save(model, beside)
        if tokenizer:
            tokenizer.save(beside)
            task = tasks_lm.Lm.Config(tokenizer="gpt2", length=1024)
            write_config(beside, RunConfig(model=model.config, task=task, train=TrainConfig()))
        write_json(beside / "converted.json", report)
    return report


def logit_check(model: Model, weights: Weights, layout: Layout) -> dict[str, float]:
    """How far the model's logits on a fixed prompt are from `reference_logits`; raises `BadInput` if too far."""
    ids = torch.arange(CHECK_TOKENS) * 7919 % min(layout.vocab_size, 50257)
    wanted = reference_logits(weights, layout, ids)
    with torch.no_grad():
        said = model.eval()(ids[None]).logits[0].double()
    difference = ((said - wanted).abs().max() / wanted.abs().max()).item()
    # Written so that NaN fails as well.
    if not difference <= TOLERANCE:
        raise BadInput(
            f"the logit check failed: on {CHECK_TOKENS} tokens the converted model differs from the checkpoint's own formulas "
            f"by {difference:.1e} of the largest logit, {TOLERANCE:.0e} is allowed; nothing was written"
        )
    return {"tokens": CHECK_TOKENS, "difference": difference, "tolerance": TOLERANCE}


def _model(weights: Weights, layout: Layout) -> Model:
    with torch.device("meta"):
        model = model_config(layout).build()
    model.load_state_dict(_renamed(weights, layout), assign=True)
    return model


def _renamed(weights: Weights, layout: Layout) -> dict[str, Tensor]:
    """The tensors under our names, fp32, without the leading axis of one that the authors give C."""
    named = {ours: weights[theirs].float() for theirs, ours in our_names(layout).items()}
    return {name: tensor[0] if name.endswith((".shift.C", ".diagonal.C")) else tensor for name, tensor in named.items()}
