"""ListOps: the law of the trees, what they come to, the published files, and the floor of the root operator."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hippodrome.part import BadInput
from hippodrome.tasks import _listops
from hippodrome.tasks._listops import CLOSE, DIGIT, OPERATOR, Shape, draw, encode, evaluate, tree_set
from hippodrome.tasks.listops import ListOps
from tests.golden_files import FOLDER, load

GOLDEN = ("lra_listops_short", "lra_listops_official_lengths")
SMALL = {"min_length": 20, "max_length": 60, "train_rows": 40, "test_rows": 20}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path / "cache"))


def sources(name):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["json"])["source"]


def some(shape, count, seed=0):
    """The first trees of a stream, as arrays of ids."""
    found, stream = [], draw(shape, np.random.default_rng(seed))
    while len(found) < count:
        trees = next(stream)
        found += [trees.tokens[trees.ends[n] : trees.ends[n + 1]] for n in range(len(trees))]
    return found[:count]


def length_law(shape):
    """P(length = n) of a kept tree, exactly: a node's length is 1, or 2 and those of its arguments."""
    below = np.zeros(shape.max_length)
    below[1] = 1.0
    for depth in reversed(range(1, shape.max_depth)):
        sums, operator = below, np.zeros_like(below)
        for _ in range(2, shape.max_args + 1):
            sums = np.convolve(sums, below)[: shape.max_length]
            operator[2:] += sums[:-2] / (shape.max_args - 1)
        below = operator if depth == 1 else 0.25 * operator
        below[1] += 0.0 if depth == 1 else 0.75
    below[: shape.min_length + 1] = 0.0
    return below / below.sum()


# What trees come to


@pytest.mark.parametrize("name", GOLDEN)
def test_the_authors_trees_are_read_and_computed_as_they_do(name):
    golden = load(name)
    for source, ids, length, label in zip(sources(name), golden["token_ids"], golden["lengths"], golden["labels"], strict=True):
        tree = encode(source)
        assert tree.tolist() == ids[:length].tolist()
        assert evaluate(tree)[-1][:2] == (int(length) - 1, int(label))


def test_the_median_of_an_even_number_is_rounded_down():
    assert evaluate(encode("[MED 1 4 ]")) == [(3, 2, 1)]
    assert evaluate(encode("[SM 9 [MED 9 8 0 1 ] [MAX 7 ] ]")) == [(7, 4, 1), (10, 7, 1), (11, 0, 2)]


@pytest.mark.parametrize("shape", [(4, 3, 5, 40), (10, 10, 500, 2000), (6, 9, 20, 260)])
def test_values_drawn_are_those_of_the_tree(shape):
    shape = Shape(**dict(zip(("max_depth", "max_args", "min_length", "max_length"), shape, strict=True)))
    trees = next(draw(shape, np.random.default_rng(3))).first(60)
    for n in range(len(trees)):
        tree = trees.tokens[trees.ends[n] : trees.ends[n + 1]]
        computed = evaluate(tree)
        assert shape.min_length < len(tree) < shape.max_length
        assert [value for _, value, _ in computed] == trees.values[trees.closed[n] : trees.closed[n + 1]].tolist()
        assert computed[-1] == (len(tree) - 1, trees.roots[n], max(height for _, _, height in computed))
        assert computed[-1][2] < shape.max_depth


# The law


def test_lengths_follow_the_law():
    shape = Shape(max_depth=5, max_args=4, min_length=9, max_length=40)
    lengths = Counter(len(tree) for tree in some(shape, 8000))
    expected = 8000 * length_law(shape)[10:]
    found = np.array([lengths[n] for n in range(10, 40)])
    # 30 cells: chi-square has mean 29 and passes 59 once in a thousand seeds.
    assert ((found - expected) ** 2 / expected).sum() < 59


def test_the_published_lengths_follow_the_law():
    shape = Shape(max_depth=10, max_args=10, min_length=500, max_length=2000)
    law = length_law(shape)
    mean = (law * np.arange(2000)).sum()
    assert mean == pytest.approx(1035, abs=1)
    lengths = np.array([len(tree) for tree in some(shape, 2000)])
    assert lengths.mean() == pytest.approx(mean, abs=4 * lengths.std() / 2000**0.5)


def test_shapes_of_equal_length_are_equally_likely_where_the_law_says_so():
    """With two arguments, and depth to spare, every binary tree of 3 operators has the same chance: 5 of them."""
    shape = Shape(max_depth=5, max_args=2, min_length=9, max_length=11)
    trees = some(shape, 5000)
    shapes = Counter(tuple(np.where(tree == CLOSE, 2, (tree >= OPERATOR).astype(int)).tolist()) for tree in trees)
    assert len(shapes) == 5
    assert min(shapes.values()) > 880
    assert max(shapes.values()) < 1120


def test_operators_arguments_and_digits_are_uniform():
    trees = np.concatenate(some(Shape(max_depth=2, max_args=6, min_length=3, max_length=99), 6000))
    operators, digits = trees[(trees >= OPERATOR) & (trees < CLOSE)], trees[trees < OPERATOR]
    assert np.bincount(operators - OPERATOR).tolist() == pytest.approx([1500] * 4, rel=0.1)
    assert np.bincount(digits - DIGIT).tolist() == pytest.approx([len(digits) / 10] * 10, rel=0.1)
    sizes = np.diff(np.flatnonzero(trees == CLOSE), prepend=-1) - 2
    assert np.bincount(sizes)[2:].tolist() == pytest.approx([1200] * 5, rel=0.12)


# Sets of trees


def test_a_smaller_set_is_the_beginning_of_a_larger_one():
    shape = Shape(max_depth=6, max_args=5, min_length=20, max_length=60)
    few, many = (tree_set(shape, rows, 5, "train") for rows in (30, 2000))
    assert np.array_equal(few.tokens, many.first(30).tokens)
    assert np.array_equal(few.values, many.first(30).values)
    assert len(many) == 2000
    for other in (tree_set(shape, 30, 6, "train"), tree_set(shape, 30, 5, "test")):
        assert not np.array_equal(few.tokens[:20], other.tokens[:20])


def test_a_set_is_drawn_once(monkeypatch, tmp_path):
    first = ListOps.Config(**SMALL).build().batch("test", 0, 20)
    monkeypatch.setattr(_listops, "draw", None)
    again = ListOps.Config(**SMALL).build().batch("test", 0, 20)
    assert torch.equal(first.inputs, again.inputs)
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == []


def test_a_drawing_that_is_cut_short_leaves_nothing_to_be_taken_for_a_set(monkeypatch, tmp_path):
    whole = _listops.write_json
    monkeypatch.setattr(_listops, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ListOps.Config(**SMALL).build().batch("test", 0, 20)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    monkeypatch.setattr(_listops, "write_json", whole)
    assert len(ListOps.Config(**SMALL).build().batch("test", 0, 20).inputs) == 20


def test_a_batch_is_padded_trees_and_their_values():
    batch = ListOps.Config(**SMALL).build().batch("valid", 0, 20)
    assert batch.inputs.shape == (20, 60)
    for ids, length, answer in zip(batch.inputs, batch.lengths, batch.targets, strict=True):
        assert not ids[length:].any()
        assert evaluate(ids[:length].numpy())[-1][1] == answer


# Floors


def test_the_root_operator_alone_scores_what_most_transformers_score():
    """The exact generator: 36.5 % from the root, 16.9 % from the majority class."""
    floors = ListOps.Config(test_rows=2500).build().floors()
    assert floors["root operator alone"] == pytest.approx(0.365, abs=0.03)
    assert floors["majority class"] == pytest.approx(0.169, abs=0.025)


def test_floors_count_the_commonest_answers(tmp_path):
    rows = ["[MAX 9 1 ]\t9", "[MAX 9 2 ]\t9", "[MAX 8 2 ]\t8", "[MIN 1 9 ]\t1", "[MIN 0 9 ]\t0"]
    for part in ("train", "val", "test"):
        (tmp_path / f"basic_{part}.tsv").write_text("\n".join(["Source\tTarget", *rows]) + "\n")
    floors = ListOps.Config(folder=str(tmp_path)).build().floors()
    assert floors == {"majority class": 2 / 5, "root operator alone": 3 / 5}


# The published files


@pytest.fixture
def published(tmp_path):
    """A folder as the authors' generator leaves it, of the short golden trees."""
    rows = [f"{source}\t{int(label)}" for source, label in zip(sources(GOLDEN[0]), load(GOLDEN[0])["labels"], strict=True)]
    for part, lines in {"train": rows[:16], "val": rows[16:20], "test": rows[20:]}.items():
        (tmp_path / f"basic_{part}.tsv").write_text("\n".join(["Source\tTarget", *lines]) + "\n")
    return tmp_path


def test_published_files_are_read(published):
    task = ListOps.Config(folder=str(published), max_length=80).build()
    assert [task.size(split) for split in ("train", "valid", "test")] == [16, 4, 10]
    golden, batch = load(GOLDEN[0]), task.batch("test", 0, 10)
    assert torch.equal(batch.inputs[:, :73], golden["token_ids"][20:].long())
    assert torch.equal(batch.lengths, golden["lengths"][20:].long())
    assert torch.equal(batch.targets, golden["labels"][20:].long())
    assert len(task.batch("train", 1, 8).inputs) == 8


def test_longer_rows_of_files_are_cut(published):
    batch = ListOps.Config(folder=str(published), min_length=1, max_length=24).build().batch("test", 0, 10)
    assert batch.inputs.shape == (10, 24)
    assert int(batch.lengths.max()) == 24


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[MAX 1 2 ]\t12", "line 2 .* value '12'"),
        ("[MAX 1 2 ]", "line 2 .* value ''"),
        ("[MAXX 1 2 ]\t1", "line 2 .*'\\[MAXX' is no token"),
        ("\t1", "line 2 .*no tree"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, line, complaint):
    (tmp_path / "basic_test.tsv").write_text(f"Source\tTarget\n{line}\n")
    with pytest.raises(BadInput, match=complaint):
        ListOps.Config(folder=str(tmp_path)).build().batch("test", 0, 1)


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"basic_test\.tsv"):
        ListOps.Config(folder=str(tmp_path)).build().batch("test", 0, 1)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_depth": 1},
        {"max_args": 1},
        {"min_length": 0},
        {"min_length": 30, "max_length": 31},
        {"test_rows": 0},
        {"seed": -1},
    ],
)
def test_what_no_tree_fits_is_refused(bad):
    with pytest.raises(BadInput, match=next(iter(bad))):
        ListOps.Config(**bad)


def test_lengths_that_never_occur_are_refused(monkeypatch):
    monkeypatch.setattr(_listops, "_CHUNKS_WITHOUT_A_TREE", 3)
    with pytest.raises(BadInput, match="between 500 and 600"):
        ListOps.Config(max_depth=2, min_length=500, max_length=600).build().batch("test", 0, 1)
