"""What the language models of all recipes share: the text, the budget and everything around the mixers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.tokens import Tokens
from hippodrome.model import BlockConfig, Mixer, ModelConfig
from hippodrome.part import BadInput
from hippodrome.patterns import Causal, Chunk, Pattern, Window
from hippodrome.readouts.lm import Lm as LmReadout
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.tasks.lm import Lm, Order
from hippodrome.tokenizer import Kind

BUDGET = TrainConfig(steps=1000, batch_size=16, lr=1e-3, clip=1.0, eval_every=100, eval_batches=8, save_every=500)
"""What a laptop does in minutes. The H3 paper's own is 800,000 steps of 256 rows."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is read and how it becomes tokens."""

    text: str = Lm.Config.text
    """A .txt, .jsonl or .parquet file (.gz, .xz, .zst too), a folder of them, sotu (shipped), or a data set's name."""
    tokenizer: Kind = Lm.Config.tokenizer
    """Bytes, a BPE trained on the text, or GPT-2's vocabulary."""
    vocab_size: int = Lm.Config.vocab_size
    """Ids of a trained BPE."""
    length: int = 256
    """Tokens a row."""
    holdout: float = Lm.Config.holdout
    """Share of the text in the test split, and again in the valid split."""
    separator: str | None = Lm.Config.separator
    """What parts the documents of a .txt file; None: a file is one document."""
    field: str = Lm.Config.field
    """Where .jsonl and .parquet keep a document."""
    order: Order | None = None
    """How rows follow each other. documents: each reads one from start to end, then the next, its carried state reset; stream:
    its own stretch of the text. None: stream where the state is carried, else shuffled, which is for rows on their own."""

    def task(self, train: TrainConfig) -> Lm.Config:
        """Its language modelling by a run. Raises `BadInput` for an order and a carry_state that do not go together."""
        order = self.order or ("stream" if train.carry_state else "shuffled")
        if train.carry_state and order == "shuffled":
            raise BadInput("order is shuffled and carry_state on: rows go on in order documents or stream only, take documents")
        if order != "shuffled" and not train.carry_state:
            raise BadInput(f"order is {order} and carry_state off: rows that go on need it on, others have order shuffled")
        return Lm.Config(**asdict(self) | {"order": order}, seed=train.seed)


SOTU = Text()
"""The shipped corpus: the State of the Union addresses."""


def attention_pattern(window: int | None, chunk: int | None) -> Pattern:
    """Causal attention over everything, over the last `window` tokens, or within chunks of `chunk` tokens."""
    if window is not None and chunk is not None:
        raise BadInput(f"window is {window} and chunk is {chunk}: give one of them")
    if window is not None:
        return Window(size=window)
    return Causal() if chunk is None else Chunk(size=chunk)


def language_model(
    mixers: Sequence[Mixer.Config],
    text: Text,
    train: TrainConfig,
    *,
    d_model: int,
    d_ff: int | None,
    dropout: float,
    learned_positions: bool = False,
) -> RunConfig:
    """Blocks of a mixer and an MLP each, embeddings tied to the readout. A run that carries its state reads a stream."""
    task = text.task(train)
    if task.ids < 1:
        raise BadInput(f"vocab_size is {text.vocab_size}: it must be at least 257, for 256 bytes and the end of a document")
    if not mixers:
        raise BadInput("n_layer is 0: a model needs at least one block")
    embed = Tokens.Config(vocab_size=task.ids, positions=text.length if learned_positions else 0, dropout=dropout)
    blocks = tuple(BlockConfig(mixer=mixer, channel=Mlp.Config(d_ff=d_ff), dropout=dropout) for mixer in mixers)
    model = ModelConfig(d_model=d_model, blocks=blocks, embed=embed, readout=LmReadout.Config(tied=True))
    return RunConfig(model=model, task=task, train=train)
