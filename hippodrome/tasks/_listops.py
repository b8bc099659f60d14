"""ListOps trees: how they are drawn, written and computed, the sets of them that are kept on disk, and tasks over these.

    tree = digit | "[OP" tree tree ... "]"      OP: MIN, MAX, MED (the median, rounded down), SM (the sum modulo 10)

A node is an operator with probability 1/4, and at `max_depth` never; operators, numbers of arguments (2 to `max_args`) and
digits are uniform. A tree is kept if its tokens, brackets included, are strictly between `min_length` and `max_length`. This
is the law of the generators of Long Range Arena and of DLR, not their stream of random numbers.

Drawing is by levels of many trees at once. Whether a tree is kept depends on how many nodes each of its levels has, and those
numbers can be drawn without the tree: only the few trees that are kept are then laid out. Row n of a set follows from seed,
split and n alone, so that a smaller set is the beginning of a larger one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from hippodrome.data import alone, cache_root
from hippodrome.files import replacing, write_json
from hippodrome.part import BadInput
from hippodrome.task import Split, Task, ordered_rows, shuffled_rows

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
VOCABULARY = ("<pad>", *"0123456789", *OPERATORS, "]")
DIGIT, OPERATOR, CLOSE = 1, 11, 15
"""Ids of "0", of the first operator and of the bracket; 0 is padding."""

_FORMAT = 1
_CODES = {"train": 0, "valid": 1, "test": 2}
_DRAWS = 8192
_CHUNKS_WITHOUT_A_TREE = 200


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Which trees are kept. A digit alone is none."""

    max_depth: int
    max_args: int
    min_length: int
    max_length: int

    def __post_init__(self) -> None:
        for name, least in {"max_depth": 2, "max_args": 2, "min_length": 1}.items():
            if getattr(self, name) < least:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.max_length < self.min_length + 2:
            raise BadInput(
                f"no length lies strictly between min_length {self.min_length} and max_length {self.max_length}: "
                f"make max_length at least {self.min_length + 2}"
            )


@dataclass(frozen=True)
class Trees:
    """Trees one after the other. ends, closed (n + 1,) int64: tokens and closing brackets before each tree.

    tokens: ids, uint8. values: what each closing bracket closes comes to, 0 to 9, uint8, in order.
    """

    tokens: np.ndarray
    ends: np.ndarray
    values: np.ndarray
    closed: np.ndarray

    def __len__(self) -> int:
        return len(self.ends) - 1

    def first(self, count: int) -> Trees:
        """The first trees."""
        ends, closed = self.ends[: count + 1], self.closed[: count + 1]
        return Trees(self.tokens[: ends[-1]], ends, self.values[: closed[-1]], closed)

    @property
    def roots(self) -> np.ndarray:
        """The value of every tree (n,) uint8."""
        return self.values[self.closed[1:] - 1]


# Drawing


@dataclass(frozen=True)
class _Level:
    """The nodes of one depth of many trees: `trees` those that have any, `nodes` how many, `operators` among them, and the
    arguments of each operator, tree after tree.
    """

    trees: np.ndarray
    nodes: np.ndarray
    operators: np.ndarray
    arguments: np.ndarray

    def of(self, chosen: np.ndarray) -> _Level:
        """The level of some trees, numbered anew from 0. `chosen` is ascending."""
        inside = np.isin(self.trees, chosen, assume_unique=True)
        kept = np.repeat(inside, self.operators)
        trees = np.searchsorted(chosen, self.trees[inside])
        return _Level(trees, self.nodes[inside], self.operators[inside], self.arguments[kept])


def draw(shape: Shape, rng: np.random.Generator) -> Iterator[Trees]:
    """Endless trees, some at a time. Raises `BadInput` where none of so long a kind turns up."""
    fruitless = 0
    while True:
        levels, count = _grow(shape, rng)
        fruitless = 0 if count else fruitless + 1
        if fruitless == _CHUNKS_WITHOUT_A_TREE:
            raise BadInput(
                f"of {fruitless * _DRAWS:,} trees of depth {shape.max_depth} with {shape.max_args} arguments at most none has "
                f"between {shape.min_length} and {shape.max_length} tokens: change the lengths, the depth or the arguments"
            )
        if count:
            yield _lay_out(levels, count, rng)


def _grow(shape: Shape, rng: np.random.Generator) -> tuple[list[_Level], int]:
    """The levels of those trees that are kept, of some that begin with an operator, and how many they are."""
    levels, kept = [], []
    trees, nodes, length = np.arange(_DRAWS), np.ones(_DRAWS, np.int64), np.zeros(_DRAWS, np.int64)
    for depth in range(1, shape.max_depth + 1):
        operators = rng.binomial(nodes, 0.25 if depth < shape.max_depth else 0.0) if depth > 1 else nodes
        arguments = rng.integers(2, shape.max_args, operators.sum(), np.uint8, endpoint=True)
        levels.append(_Level(trees, nodes, operators, arguments))
        last = np.cumsum(operators)
        running = np.concatenate([[0], np.cumsum(arguments, dtype=np.int64)])
        children = running[last] - running[last - operators]
        length = length + nodes + operators
        whole = (children == 0) & (length > shape.min_length) & (length < shape.max_length)
        kept.append(trees[whole])
        # A child is a token at least, so that some trees are too long already.
        growing = (children > 0) & (length + children < shape.max_length)
        trees, nodes, length = trees[growing], children[growing], length[growing]
    chosen = np.sort(np.concatenate(kept))
    return [level for each in levels if len((level := each.of(chosen)).trees)], len(chosen)


def _lay_out(levels: list[_Level], count: int, rng: np.random.Generator) -> Trees:
    """The trees of these levels, with operators and digits drawn."""
    children = [_arranged(level, rng) for level in levels]
    kinds = [rng.integers(4, size=int((each > 0).sum()), dtype=np.uint8) for each in children]
    size, value = [np.empty(0, np.int64)] * len(levels), [np.empty(0, np.uint8)] * len(levels)
    for depth in reversed(range(len(levels))):
        counts = children[depth]
        inner = counts > 0
        size[depth] = np.ones(len(counts), np.int64)
        value[depth] = rng.integers(10, size=len(counts), dtype=np.uint8)
        if inner.any():
            size[depth][inner] = 2 + np.add.reduceat(size[depth + 1], _starts(counts[inner]))
            value[depth][inner] = _compute(kinds[depth], value[depth + 1], counts[inner])

    ends = np.concatenate([[0], np.cumsum(size[0])])
    tokens, values = np.empty(ends[-1], np.uint8), np.empty(ends[-1], np.uint8)
    start = ends[:-1]
    for depth, counts in enumerate(children):
        inner = counts > 0
        tokens[start] = DIGIT + value[depth]
        tokens[start[inner]] = OPERATOR + kinds[depth]
        stop = start[inner] + size[depth][inner] - 1
        tokens[stop], values[stop] = CLOSE, value[depth][inner]
        if inner.any():
            counts = counts[inner]
            before = np.cumsum(size[depth + 1]) - size[depth + 1]
            start = before + np.repeat(start[inner] + 1 - before[_starts(counts)], counts)
    closes = tokens == CLOSE
    closed = np.concatenate([[0], np.add.reduceat(closes, ends[:-1], dtype=np.int64).cumsum()])
    assert len(ends) == count + 1
    return Trees(tokens, ends, values[closes], closed)


def _arranged(level: _Level, rng: np.random.Generator) -> np.ndarray:
    """Arguments of every node of a level, 0 for digits. Which nodes of a tree are the operators is drawn here."""
    ends = np.cumsum(level.nodes)
    within = np.arange(level.operators.sum()) - np.repeat(np.cumsum(level.operators) - level.operators, level.operators)
    counts = np.zeros(ends[-1], np.uint8)
    counts[np.repeat(ends - level.nodes, level.operators) + within] = level.arguments
    for start, stop in zip((ends - level.nodes).tolist(), ends.tolist(), strict=True):
        rng.shuffle(counts[start:stop])
    return counts.astype(np.int64)


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts


def _compute(kinds: np.ndarray, arguments: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The value of each operator, whose arguments lie one after the other."""
    starts = _starts(counts)
    least, most = np.minimum.reduceat(arguments, starts), np.maximum.reduceat(arguments, starts)
    total = np.add.reduceat(arguments, starts, dtype=np.int64) % 10
    value = np.choose(kinds, [least, most, 0, total]).astype(np.uint8)
    medians = kinds == 2
    if medians.any():
        wanted = counts[medians]
        owner = np.repeat(np.arange(len(wanted)), wanted)
        # Sorted by operator, then by value.
        order = np.sort(owner * 16 + arguments[np.repeat(medians, counts)])
        first = _starts(wanted)
        value[medians] = (order[first + (wanted - 1) // 2] % 16 + order[first + wanted // 2] % 16) // 2
    return value


# Reading


def evaluate(tokens: np.ndarray) -> list[tuple[int, int, int]]:
    """(position, value, height) of each closing bracket of one tree's ids, by a stack. A digit has height 0."""
    found, stack = [], list[tuple[int, list[int], int]]()
    for at, token in enumerate(tokens.tolist()):
        if OPERATOR <= token < CLOSE:
            stack.append((token - OPERATOR, [], 0))
            continue
        value, height = token - DIGIT, 0
        if token == CLOSE:
            kind, given, below = stack.pop()
            value, height = _value(kind, given), below + 1
            found.append((at, value, height))
        if stack:
            kind, given, below = stack[-1]
            given.append(value)
            stack[-1] = (kind, given, max(below, height))
    return found


def _value(kind: int, given: list[int]) -> int:
    if kind == 2:
        ordered = sorted(given)
        return (ordered[(len(given) - 1) // 2] + ordered[len(given) // 2]) // 2
    return (min(given), max(given), 0, sum(given) % 10)[kind]


_LETTERS = dict(zip((*OPERATORS, "X"), "\1\2\3\4]", strict=True))
_SKIP, _UNKNOWN = 254, 255
_IDS = np.full(256, _UNKNOWN, np.uint8)
_IDS[list(b"( )")] = _SKIP
_IDS[list(b"0123456789\1\2\3\4]")] = range(DIGIT, CLOSE + 1)


def encode(source: str) -> np.ndarray:
    """Ids (uint8) of a tree as Long Range Arena writes it, "( ( ( [MAX 5 ) 4 ) ] )", whose parentheses mean nothing."""
    text = source
    for word, letter in _LETTERS.items():
        text = text.replace(word, letter)
    letters = np.frombuffer(text.encode(), np.uint8)
    ids, solid = _IDS[letters], letters != ord(" ")
    if (ids == _UNKNOWN).any() or (solid[1:] & solid[:-1]).any():
        wrong = next((word for word in source.split() if word not in (*VOCABULARY[1:], *"()X")), source)
        raise BadInput(f"{wrong[:20]!r} is no token of ListOps: known are {', '.join(VOCABULARY[1:])}")
    return ids[ids != _SKIP]


# Keeping


def tree_set(shape: Shape, rows: int, seed: int, split: Split) -> Trees:
    """The first `rows` trees of a split, memory-mapped from the cache; drawn and written there if this is the first call."""
    settings = {"format": _FORMAT, **asdict(shape), "rows": rows, "seed": seed, "split": split}
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    folder = cache_root() / f"listops-{split}-{key}"
    if not folder.is_dir():
        with alone(folder):
            # Another process may have drawn it while this one waited.
            if not folder.is_dir():
                _write(folder, shape, rows, np.random.default_rng([seed, _CODES[split]]), settings)
    ends, closed = np.load(folder / "ends.npy"), np.load(folder / "closed.npy")
    tokens, values = (np.memmap(folder / f"{name}.bin", np.uint8, "r") for name in ("tokens", "values"))
    return Trees(tokens, ends, values, closed)


def _write(folder: Path, shape: Shape, rows: int, rng: np.random.Generator, settings: dict[str, object]) -> None:
    done, ends, closed = 0, [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    with replacing(folder) as beside:
        beside.mkdir()
        with (beside / "tokens.bin").open("wb") as tokens, (beside / "values.bin").open("wb") as values:
            for trees in draw(shape, rng):
                trees = trees.first(rows - done)
                tokens.write(trees.tokens.tobytes())
                values.write(trees.values.tobytes())
                ends.append(ends[-1][-1] + trees.ends[1:])
                closed.append(closed[-1][-1] + trees.closed[1:])
                done += len(trees)
                if done == rows:
                    break
        np.save(beside / "ends.npy", np.concatenate(ends))
        np.save(beside / "closed.npy", np.concatenate(closed))
        write_json(beside / "manifest.json", settings)


# Asking


class _TreeTask(Task):
    """A task over drawn trees. A subclass says what is asked."""

    vocab_size = len(VOCABULARY)
    classes = 10

    @dataclass(frozen=True, kw_only=True)
    class Config(Task.Config):
        """Tokens of a row, brackets included, lie strictly between min_length and max_length."""

        max_depth: int = 10
        max_args: int = 10
        min_length: int = 500
        max_length: int = 2000
        """Also how wide batches are."""
        train_rows: int = 96_000
        test_rows: int = 2000
        """Rows of the test split, and of the valid split."""
        seed: int = 0
        """Draws the trees and their order in training."""

        def __post_init__(self) -> None:
            for name, least in {"train_rows": 1, "test_rows": 1, "seed": 0}.items():
                if getattr(self, name) < least:
                    raise BadInput(f"{name} is {getattr(self, name)}: it must be at least {least}")
            if self.drawn:
                self.shape()

        @property
        def drawn(self) -> bool:
            """Whether the trees are drawn, not read."""
            return True

        def shape(self) -> Shape:
            """Which trees are drawn. Raises for what is no shape."""
            return Shape(**{field.name: getattr(self, field.name) for field in fields(Shape)})

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self._drawn: dict[Split, Trees] = {}

    def trees(self, split: Split) -> Trees:
        """All trees of a split, drawn at the first call unless the cache has them."""
        if split not in self._drawn:
            rows = self.config.train_rows if split == "train" else self.config.test_rows
            self._drawn[split] = tree_set(self.config.shape(), rows, self.config.seed, split)
        return self._drawn[split]

    def size(self, split: Split) -> int:
        return self.config.train_rows if split == "train" else self.config.test_rows

    def rows(self, split: Split, index: int, size: int) -> list[int]:
        """Which rows a batch has."""
        count = self.size(split)
        drawn = shuffled_rows(count, index, size, self.config.seed) if split == "train" else ordered_rows(count, index, size)
        return drawn.tolist()
