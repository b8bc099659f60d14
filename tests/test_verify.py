import pytest

from hippodrome.metrics import read_metrics
from hippodrome.part import BadInput
from hippodrome.verify import Resumed, verify_resume
from tests.tiny import tiny_model, tiny_run


def test_kill_9_at_random_moments_changes_no_bit(tmp_path):
    config = tiny_run(model=tiny_model(dropout=0.1), steps=300, batch_size=4, micro_batch=2, save_every=7, eval_every=50)
    result = verify_resume(config, tmp_path / "proof", kill_at=[40, 180], seed=5)
    assert result.equal
    assert len(result.rows) == 300
    assert 40 <= result.kills[0] < 300
    assert 180 <= result.kills[1] < 300
    alone, killed = (read_metrics(tmp_path / "proof" / name) for name in ("alone", "killed"))
    assert [line.get("valid") for line in alone] == [line.get("valid") for line in killed]


def test_what_differs_is_told():
    assert Resumed([(1, 0.5, 0.5), (2, 0.25, 0.25)], [1], True).equal
    assert not Resumed([(1, 0.5, 0.5)], [1], False).equal
    other = Resumed([(1, 0.5, 0.5), (2, 0.25, 0.2500001), (3, 0.1, float("nan"))], [1], True)
    assert not other.equal
    assert other.differing == [2, 3]


def test_a_run_that_fails_by_itself_says_why(tmp_path):
    with pytest.raises(BadInput, match=r"the run failed by itself: .* is (nan|inf) at step \d+: lower lr"):
        verify_resume(tiny_run(lr=1e30, warmup=0.0, clip=None), tmp_path / "proof")


def test_a_folder_in_use_and_steps_outside_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is not empty"):
        verify_resume(tiny_run(), tmp_path)
    with pytest.raises(BadInput, match=r"kills at steps \[12\]: each must lie between 1 and 11"):
        verify_resume(tiny_run(), tmp_path / "proof", kill_at=[12])
