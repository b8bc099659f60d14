"""Waveform: samples of every width, lengths that differ, and files held out."""

import wave

import numpy as np
import pytest
import torch

from hippodrome.part import BadInput
from hippodrome.tasks.waveform import Waveform, read_wav

CLASSES = ("no", "yes")


def write_wav(path, samples, width=2, rate=8000):
    """samples (n,) or (n, channels), integers of `width` bytes."""
    samples = np.asarray(samples)
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    if width == 1:
        data = (samples + 128).astype(np.uint8).tobytes()
    else:
        data = samples.astype("<i4").reshape(-1, 1).view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)


def write_words(folder, per_class=10, longest=30):
    """Noise of different lengths; the files of a class differ in all samples."""
    dice = np.random.default_rng(0)
    for name in CLASSES:
        for i in range(per_class):
            write_wav(folder / name / f"{i}.wav", dice.integers(-30000, 30000, dice.integers(8, longest)))
    write_wav(folder / "_background_noise_" / "hum.wav", [0] * 50)


def tiny(folder):
    write_words(folder)
    return {"data": str(folder), "classes": 2, "holdout": 0.2}


def task_of(folder, **values):
    return Waveform.Config(**({"data": str(folder), "classes": 2, "length": 12} | values)).build()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_is_the_same_sound(tmp_path, width):
    top = 2 ** (8 * width - 1)
    samples = np.array([0, top // 2, -top // 2, -top, top - 1, 1])
    write_wav(tmp_path / "a.wav", samples, width)
    found, rate = read_wav(tmp_path / "a.wav", 100)
    assert rate == 8000
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, samples / top, atol=1e-7)


def test_channels_are_averaged(tmp_path):
    write_wav(tmp_path / "a.wav", [[100, 300], [-100, 100], [0, 50]])
    np.testing.assert_allclose(read_wav(tmp_path / "a.wav", 2)[0], np.array([200, 0]) / 32768)


def test_long_recordings_lose_their_end_and_short_ones_are_padded(tmp_path):
    for name in CLASSES:
        for i, count in enumerate((5, 12, 20)):
            write_wav(tmp_path / name / f"{i}.wav", np.arange(count) + 100)
    task = task_of(tmp_path)
    for split in ("train", "valid", "test"):
        batch = task.batch(split, 0, 2)
        assert batch.inputs.shape == (2, 12, 1)
        lengths = [12, 12] if batch.lengths is None else batch.lengths.tolist()
        for row, path in enumerate(task.files[split]) if split != "train" else ():
            real = min(12, (5, 12, 20)[int(path.stem)])
            assert lengths[row] == real
            expected = torch.cat([torch.arange(real) + 100, torch.zeros(12 - real)]) / 32768
            torch.testing.assert_close(batch.inputs[row, :, 0], expected)


def test_whole_files_of_every_class_are_held_out(tmp_path):
    write_words(tmp_path)
    task = task_of(tmp_path, holdout=0.2)
    assert [task.size(split) for split in ("train", "valid", "test")] == [12, 4, 4]
    assert task.names == list(CLASSES)
    paths = [path for split in task.files.values() for path in split]
    assert len(set(paths)) == 20
    for split, files in task.files.items():
        assert [CLASSES[label] for label in task.labels(split).tolist()] == [path.parent.name for path in files]
    assert task_of(tmp_path, holdout=0.2, seed=1).files["test"] != task.files["test"]


def test_the_lists_of_speech_commands_decide(tmp_path):
    write_words(tmp_path)
    (tmp_path / "validation_list.txt").write_text("yes/3.wav\nno/1.wav\n")
    (tmp_path / "testing_list.txt").write_text("yes/0.wav\n")
    files = task_of(tmp_path).files
    named = {split: {f"{path.parent.name}/{path.name}" for path in each} for split, each in files.items()}
    assert named["valid"] == {"yes/3.wav", "no/1.wav"}
    assert named["test"] == {"yes/0.wav"}
    assert len(named["train"]) == 17


def test_a_recording_of_nothing_is_a_moment_of_silence(tmp_path):
    for name in CLASSES:
        for i in range(3):
            write_wav(tmp_path / name / f"{i}.wav", [])
    batch = task_of(tmp_path).batch("test", 0, 2)
    assert batch.lengths.tolist() == [1, 1]
    assert not batch.inputs.any()


def test_another_rate_is_named(tmp_path):
    write_words(tmp_path)
    write_wav(tmp_path / "yes" / "a.wav", [1] * 9, rate=16000)
    task = task_of(tmp_path)
    task.rate = 8000
    split = next(split for split, files in task.files.items() if tmp_path / "yes" / "a.wav" in files)
    with pytest.raises(BadInput, match=r"a\.wav has 16000 samples a second, others have 8000"):
        task.batch(split, 0, task.size(split))


def test_what_cannot_be_read_is_one_clear_line(tmp_path):
    with pytest.raises(BadInput, match="there is no folder"):
        task_of(tmp_path / "none")
    with pytest.raises(BadInput, match="has no sub-folder: it needs one a class"):
        task_of(tmp_path)
    write_words(tmp_path, per_class=2)
    with pytest.raises(BadInput, match="at least 3 are needed"):
        task_of(tmp_path)
    with pytest.raises(BadInput, match=r"classes is 3, but .* has 2"):
        task_of(tmp_path, classes=3)
    (tmp_path / "no" / "0.wav").write_bytes(b"RIFFnothing")
    with pytest.raises(BadInput, match="no WAV file of plain PCM"):
        read_wav(tmp_path / "no" / "0.wav", 9)
    (tmp_path / "maybe").mkdir()
    with pytest.raises(BadInput, match=r"has no \.wav files"):
        task_of(tmp_path, classes=3)
    for wrong in ({"length": 0}, {"seed": -1}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Waveform.Config(**wrong)


@pytest.mark.parametrize("holdout", [0.0, 0.5])
def test_holding_out_nothing_or_everything_is_refused(tmp_path, holdout):
    write_words(tmp_path)
    with pytest.raises(BadInput, match=f"holdout is {holdout}"):
        task_of(tmp_path, holdout=holdout)
