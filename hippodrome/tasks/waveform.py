"""Waveform: what is heard in a recording, from its raw samples: a folder of .wav files, a sub-folder a class.

PCM of 8, 16, 24 or 32 bits, brought to [-1, 1); several channels are averaged. A recording longer than `length` loses its
end, a shorter one is padded, and the model is told. Speech Commands' validation_list.txt and testing_list.txt decide the
splits where they lie in the folder; else whole files are held out of every class.
"""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hippodrome.part import BadInput
from hippodrome.task import Split
from hippodrome.tasks._classified import _Classified, hold_out, labelled_folders

LISTS: dict[Split, str] = {"valid": "validation_list.txt", "test": "testing_list.txt"}
"""Files that name the recordings of a split, a line each, as class/file."""


class Waveform(_Classified):
    """Inputs (B, length, 1) float32, labels (B,), lengths where some are shorter. Files are read as they are needed."""

    @dataclass(frozen=True, kw_only=True)
    class Config(_Classified.Config):
        """`data`: the folder; its sub-folders are the classes, those that begin with _ or . are none."""

        data: str = "recordings"
        classes: int = 10
        length: int = 16000
        """Samples a row."""
        holdout: float = 0.1
        """Share of the files of a class in the test split, and again in the valid split, where no list says it."""
        seed: int = 0
        """Draws the files held out and the order in training."""

        def __post_init__(self) -> None:
            for name, least in {"length": 1, "seed": 0}.items():
                if getattr(self, name) < least:
                    raise BadInput(f"{name} is {getattr(self, name)}: it must be at least {least}")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.seed, self.length = config.seed, config.length
        folder = Path(config.data).expanduser()
        folders = labelled_folders(folder, config.classes)
        self.names = [path.name for path in folders]
        self.files: dict[Split, list[Path]] = {"train": [], "valid": [], "test": []}
        labels: dict[Split, list[int]] = {"train": [], "valid": [], "test": []}
        listed = _listed(folder)
        for label, path in enumerate(folders):
            for split, files in _splits(path, config, listed).items():
                self.files[split] += files
                labels[split] += [label] * len(files)
        self._labels = {split: torch.tensor(each, dtype=torch.int64) for split, each in labels.items()}
        for split, files in self.files.items():
            if not files:
                raise BadInput(f"no recording of {folder} is left for {split}")
        self.rate = read_wav(self.files["train"][0], 1)[1]

    def labels(self, split: Split) -> Tensor:
        return self._labels[split]

    def inputs(self, split: Split, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        samples = [self._samples(self.files[split][row]) for row in rows.tolist()]
        lengths = torch.tensor([len(each) for each in samples])
        padded = np.stack([np.pad(each, (0, self.length - len(each))) for each in samples])
        return torch.from_numpy(padded).unsqueeze(-1), None if (lengths == self.length).all() else lengths

    def _samples(self, path: Path) -> np.ndarray:
        samples, rate = read_wav(path, self.length)
        if rate != self.rate:
            raise BadInput(f"{path} has {rate} samples a second, others have {self.rate}: resample them to one rate")
        # A recording of nothing is a moment of silence, for every row needs a sample.
        return samples if len(samples) else np.zeros(1, np.float32)


def _listed(folder: Path) -> dict[Split, set[str]] | None:
    """The recordings that the lists name, if both lie in the folder."""
    if not all((folder / name).is_file() for name in LISTS.values()):
        return None
    return {split: set((folder / name).read_text(encoding="utf-8").split()) for split, name in LISTS.items()}


def _splits(folder: Path, config: Waveform.Config, listed: dict[Split, set[str]] | None) -> dict[Split, list[Path]]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".wav" and path.name[0] != ".")
    if not files:
        raise BadInput(f"the folder {folder} has no .wav files")
    if listed is None:
        return hold_out(files, config.holdout, config.seed, f"the folder {folder} of .wav files")
    found: dict[Split, list[Path]] = {"train": [], "valid": [], "test": []}
    for path in files:
        name = f"{folder.name}/{path.name}"
        found["test" if name in listed["test"] else "valid" if name in listed["valid"] else "train"].append(path)
    return found


def read_wav(path: Path, most: int) -> tuple[np.ndarray, int]:
    """The first `most` samples (n,) float32 in [-1, 1), and how many there are a second."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(most)
    except (wave.Error, EOFError) as error:
        raise BadInput(f"{path} is no WAV file of plain PCM, or a damaged one: {error or 'it ends too early'}") from None
    data = data[: len(data) // (width * channels) * width * channels]
    if width == 1:
        samples = np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
    elif width == 3:
        # Three bytes become the upper ones of four, so that the sign is where it belongs.
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = wide.view("<i4")[:, 0] / np.float32(2**31)
    elif width in (2, 4):
        samples = np.frombuffer(data, f"<i{width}") / np.float32(2 ** (8 * width - 1))
    else:
        raise BadInput(f"{path} has samples of {8 * width} bits: it takes 8, 16, 24 and 32")
    return samples.astype(np.float32).reshape(-1, channels).mean(1, dtype=np.float32), rate
