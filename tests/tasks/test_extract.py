"""Extract: what its rows are."""

import pytest
import torch

from hippodrome.part import BadInput
from hippodrome.task import IGNORE
from hippodrome.tasks.extract import Extract

VARIANTS = (Extract.Config(order="place"),)


def tiny(folder):
    return {"lines": 2, "width": 2}


def rows_of(order, split="train"):
    config = Extract.Config(length=60, min_length=20, lines=4, width=3, symbols=16, order=order)
    batch = config.build().batch(split, 1, 50)
    for ids, targets, length in zip(batch.inputs, batch.targets, batch.lengths, strict=True):
        row = torch.cat([ids[:length], targets[length - 1 : length]]).tolist()
        start = row.index(config.start)
        yield config, row[:start], row[start + 1 :], targets.tolist()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_answer_is_the_lines_in_order(split):
    for order in ("number", "place"):
        lengths = set()
        for config, source, answer, _ in rows_of(order, split):
            marked = [(token, place) for place, token in enumerate(source) if token >= config.symbols]
            assert len(marked) == 4
            if order == "number":
                assert sorted(token for token, _ in marked) == [16, 17, 18, 19]
                marked = sorted(marked)
            wanted = [token for _, place in marked for token in source[place + 1 : place + 4]]
            assert answer == [*wanted, config.start]
            assert max(wanted) < config.symbols
            lengths.add(len(source))
        assert len(lengths) > 20
        assert min(lengths) >= 20
        assert max(lengths) <= 60


def test_asked_are_the_answer_and_its_end_alone():
    for config, source, answer, targets in rows_of("number"):
        assert targets[: len(source)] == [IGNORE] * len(source)
        assert targets[len(source) : len(source) + len(answer)] == answer
        assert set(targets[len(source) + len(answer) :]) <= {IGNORE}
        assert config.start == 20


def test_the_floor_is_what_a_guess_scores():
    assert Extract.Config(lines=2, width=3, symbols=6).build().floors() == {"guess": pytest.approx(2 / 7)}


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="shortest source has 8 tokens: min_length must be from the 16 that 4 lines take"):
        Extract.Config(length=16)
    with pytest.raises(BadInput, match=r"min_length must be from .* to length 20"):
        Extract.Config(length=20, min_length=21)
    with pytest.raises(BadInput, match="symbols is 1"):
        Extract.Config(symbols=1)
