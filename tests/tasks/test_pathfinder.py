"""The generator keeps to the published geometry, images follow from their numbers, and the published folders are read."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from hippodrome.part import BadInput
from hippodrome.tasks import _dashes, _images, _pathfinder
from hippodrome.tasks.pathfinder import Pathfinder, main
from tests.commands import run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def drawings():
    """Some drawings of each set that is quick to draw."""
    return {size: [_pathfinder.draw(_pathfinder.LRA[size], 0, number) for number in range(40)] for size in (32, 256)}


# Stamps


@pytest.mark.parametrize(("length", "thickness", "margin", "fine"), [(2, 0.5, 1, 2), (5, 1.5, 3, 2), (22, 6.0, 7, 3)])
@pytest.mark.parametrize("degrees", [0, 90, -135, 17, 100, -161])
def test_a_dash_is_what_an_image_program_draws(length, thickness, margin, fine, degrees):
    angle, radius = np.deg2rad(degrees), _dashes.reach(length, thickness, margin)
    half = radius * fine
    tip = np.ceil(np.round(half + length * fine * np.array([np.cos(angle), np.sin(angle)]), 9))
    drawn = Image.new("L", (2 * half + 1, 2 * half + 1))
    ImageDraw.Draw(drawn).line([(half, half), tuple(tip)], fill=255, width=round(thickness * fine))
    side = 2 * radius + 1
    expected = np.asarray(drawn.resize((side, side), Image.Resampling.LANCZOS)).astype(int)
    found = _dashes.dash(angle, length, thickness, margin, fine).ink.astype(int)
    # At an angle where a corner falls between two pixels it may be rounded to the other one.
    assert np.abs(found - expected).sum() <= 0.02 * expected.sum()


def test_shrinking_is_the_lanczos_filter_of_an_image_program():
    shape = np.random.default_rng(0).random((41, 41)) < 0.3
    expected = np.asarray(Image.fromarray((255 * shape).astype(np.uint8)).resize((21, 21), Image.Resampling.LANCZOS))
    assert np.abs(_dashes._shrunk(shape, 21).astype(int) - expected).max() <= 1
    np.testing.assert_allclose(_dashes.lanczos(41, 21).sum(1), 1)


def test_a_mask_is_every_pixel_within_the_margin():
    line = _dashes._line(0.7, 20, 3, 40)
    rows, columns = np.nonzero(line)
    y, x = np.mgrid[:81, :81]
    near = ((y[..., None] - rows) ** 2 + (x[..., None] - columns) ** 2).min(-1) <= 6**2
    assert (_dashes._grown(line, 6) == near).all()


# Images


def test_an_image_follows_from_its_seed_and_number():
    made = _pathfinder.LRA[32]
    one = _pathfinder.draw(made, 3, 5)
    _pathfinder.draw(made, 3, 6)
    again = _pathfinder.draw(made, 3, 5)
    assert (one.image == again.image).all()
    assert (one.paths == again.paths).all()
    assert all((one.image != _pathfinder.draw(made, *other).image).any() for other in [(3, 6), (4, 5)])


@pytest.mark.parametrize(("size", "digest"), [(32, "ec9c21613332"), (256, "cb26007a9bcd")])
def test_images_that_change_are_another_version(drawings, size, digest):
    """What lies in caches is told from what would be drawn now by `VERSION`: raise it with every new digest."""
    assert _pathfinder.VERSION == 2
    assert hashlib.sha256(b"".join(drawing.image.tobytes() for drawing in drawings[size][:3])).hexdigest()[:12] == digest


def test_images_do_not_depend_on_the_last_bits_of_a_sine(drawings, monkeypatch):
    """In which processors differ."""
    dice = np.random.default_rng(0)

    def off_by_a_bit(function):
        def inexact(*given):
            exact = np.asarray(function(*given))
            return np.nextafter(exact, np.where(dice.random(exact.shape) < 0.5, -np.inf, np.inf))

        return inexact

    for name in ("sin", "cos", "sinc", "arctan2", "hypot"):
        monkeypatch.setattr(np, name, off_by_a_bit(getattr(np, name)))
    _pathfinder._table.cache_clear()
    for size, found in drawings.items():
        for number, drawing in enumerate(found[:10]):
            assert (_pathfinder.draw(_pathfinder.LRA[size], 0, number).image == drawing.image).all()
    _pathfinder._table.cache_clear()


def test_two_paths_begin_at_the_seed_distance(drawings):
    """The marks of label 0 and 1 begin alike: some path's first dash lies in the square that the edge leaves."""
    for size, found in drawings.items():
        made = _pathfinder.LRA[size]
        edge = 2 * made.seed_distance - made.paddle_length - made.seed_distance - 2
        for drawing in found:
            begin = drawing.marks[0]
            assert (begin >= edge).all()
            assert (begin < size - edge).all()


def test_a_path_has_the_published_number_of_dashes_in_turns_that_continuity_allows():
    made, margin = _pathfinder.LRA[128], 2
    table, rng = _pathfinder._table(made, margin), np.random.default_rng(0)
    field, paths = _pathfinder._two_paths(table, rng)
    assert paths.shape == (2, 14, 2)
    places = np.stack(divmod(paths[..., 0], table.stride), -1) - table.rim
    assert (places >= made.padding).all()
    assert (places < made.size - made.padding).all()
    begin = np.hypot(*(places[0, 0] - places[1, 0]))
    assert begin == pytest.approx(made.seed_distance, abs=1)
    # From tip to tip it is a dash and two margins, a little more or less where pixels are rounded or the path bends.
    gaps = np.hypot(*np.moveaxis(np.diff(places[:, 1:], axis=1), -1, 0))
    assert (np.abs(gaps - (made.paddle_length + 2 * margin)) < 3).all()
    turns = np.diff(np.unwrap(table.angles[paths[..., 1]], axis=1), axis=1)
    assert np.abs(turns).max() < np.pi / 2 / made.continuity
    assert (field.reshape(-1)[paths[:, :-1, 0]] > _pathfinder._TAKEN).all(), "a dash that claimed nothing"


def test_paths_keep_apart(drawings):
    """But for two newest dashes, which do not know of each other."""
    shared = [drawing.paths.all(0).sum() / drawing.paths.any(0).sum() for drawing in drawings[256]]
    assert np.mean(shared) < 0.02
    assert np.median(shared) < 0.005


def test_the_label_says_whether_the_discs_mark_one_path(drawings):
    for size, found in drawings.items():
        reach = _pathfinder.LRA[size].marker_radius + 2
        for drawing in found:
            for mark, path in zip(drawing.marks, drawing.marked, strict=True):
                inked = np.argwhere(drawing.paths[path])
                assert np.hypot(*(inked - mark).T).min() <= reach
                assert drawing.image[tuple(mark)] > 200
            assert drawing.label == (drawing.marked[0] == drawing.marked[1])


@pytest.mark.parametrize(("size", "ink", "mean", "distractors"), [(32, 0.454, 27.8, 4.63), (256, 0.0391, 2.97, 7.0)])
def test_statistics_are_those_of_the_public_procedure(drawings, size, ink, mean, distractors):
    """Means over 100 and 20 images of the published procedure followed word for word; see docs/pathfinder.md."""
    images = np.stack([drawing.image for drawing in drawings[size]])
    assert (images > 0).mean() == pytest.approx(ink, rel=0.05)
    assert images.mean() == pytest.approx(mean, rel=0.04)
    assert np.mean([drawing.distractors for drawing in drawings[size]]) == pytest.approx(distractors, abs=0.4)
    assert images.max(axis=(1, 2)).min() == 255


def test_the_easier_sets_have_shorter_paths_and_more_that_are_shorter_still():
    for size, geometry in _pathfinder.LRA.items():
        assert _pathfinder.easier(size, 14) == geometry
    ink = []
    for dashes, short, count in ((6, 2, 10), (9, 3, 6), (14, 4, 5)):
        made = _pathfinder.easier(32, dashes)
        assert (made.contour_length, made.distractor_length, made.distractors) == (dashes, short, count)
        drawings = [_pathfinder.draw(made, 0, number) for number in range(20)]
        assert max(drawing.distractors for drawing in drawings) <= count
        ink.append(np.mean([drawing.paths.any(0).sum() for drawing in drawings]) / dashes)
    assert max(ink) < 1.3 * min(ink), "paths are as long as they have dashes"


def test_half_of_the_labels_are_joined():
    labels = [_pathfinder.draw(_pathfinder.LRA[256], 0, number).label for number in range(100)]
    assert 30 < sum(labels) < 70


@pytest.mark.parametrize("made", [_pathfinder.LRA[32], _pathfinder.LRA[64], _pathfinder.SEGMENTATION[128]])
def test_tables_have_room_for_every_heading(made):
    for margin in made.margins:
        table = _pathfinder._table(made, margin)
        table.make(np.arange(len(table.angles)))
        assert (table.masks > 0).all(), "a spot that is no part of a dash"
        assert (table.chances[:, 0] > 0.5).all(), "a heading that has none straight ahead"


@pytest.mark.parametrize("size", _pathfinder.LRA)
def test_every_size_of_long_range_arena(size):
    drawing = _pathfinder.draw(_pathfinder.LRA[size], 0, 1)
    assert drawing.image.shape == (size, size)
    assert drawing.image.dtype == np.uint8
    assert drawing.paths.any(axis=(1, 2)).all()


# The task


def small(**values):
    return Pathfinder.Config(**{"train_rows": 30, "test_rows": 10} | values)


def test_pixels_are_a_signal_or_tokens():
    signal, tokens = small().build().batch("train", 0, 4), small(pixels="tokens").build().batch("train", 0, 4)
    assert signal.inputs.shape == (4, 1024, 1)
    assert tokens.inputs.shape == (4, 1024)
    assert torch.equal(signal.targets, tokens.targets)
    torch.testing.assert_close(signal.inputs[..., 0], tokens.inputs / 127.5 - 1)
    assert tokens.inputs.max() == 255


def test_images_are_drawn_once_and_kept(cache, monkeypatch):
    first = small().build().batch("test", 0, 10)
    monkeypatch.setattr(_pathfinder, "draw", None)
    again = small().build().batch("test", 0, 10)
    assert torch.equal(first.inputs, again.inputs)
    assert [folder.name.rpartition("-")[0] for folder in cache.iterdir() if folder.is_dir()] == ["pathfinder32-test"]
    with pytest.raises(TypeError):
        small().build().batch("train", 0, 10)


def test_a_larger_training_split_leaves_the_test_split_as_it_is():
    few, many = small().build(), small(train_rows=40).build()
    assert torch.equal(few.batch("test", 0, 10).inputs, many.batch("test", 0, 10).inputs)
    assert (few.arrays("train")["images"] == many.arrays("train")["images"][:30]).all()
    assert not torch.equal(few.batch("test", 0, 10).inputs, few.batch("valid", 0, 10).inputs)


def test_many_processes_draw_what_one_draws(monkeypatch, tmp_path):
    monkeypatch.setattr(_images, "_SOON", -1.0)
    monkeypatch.setattr(_images, "_CHUNK", 8)
    found = []
    for workers in ("1", "2"):
        monkeypatch.setenv("HIPPODROME_WORKERS", workers)
        monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path / workers))
        found.append(np.array(small().build().arrays("train")["images"]))
    assert (found[0] == found[1]).all()


def test_a_set_that_is_interrupted_is_not_there(cache, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_pathfinder, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small().build().batch("test", 0, 10)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_the_floor_is_the_commoner_class():
    task = small().build()
    joined = int(task.batch("test", 0, 10).targets.sum())
    assert task.floors() == {"commoner class": max(joined, 10 - joined) / 10}


def test_the_published_setting_by_default():
    config = Pathfinder.Config()
    task = config.build()
    assert config.length == 1024
    assert [task.size(split) for split in ("train", "valid", "test")] == [160_000, 20_000, 20_000]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"size": 100}, "size is 100: did you mean 128"),
        ({"contour_length": 10}, "contour_length is 10: did you mean 9"),
        ({"train_rows": 0}, "train_rows is 0"),
        ({"test_rows": -1}, "test_rows is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_numbers_are_named(values, said):
    with pytest.raises(BadInput, match=said):
        small(**values)


def test_workers_are_a_number(monkeypatch):
    monkeypatch.setenv("HIPPODROME_WORKERS", "many")
    with pytest.raises(BadInput, match="HIPPODROME_WORKERS is 'many'"):
        _images._workers()


def test_trains_by_command(tmp_path):
    words = ["--train-rows", 16, "--test-rows", 8, "--n-layer", 1, "--d-model", 8, "--steps", 2, "--batch-size", 4]
    result = run("train", "lra_images.pathfinder", *words, "--device", "cpu", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert "(commoner class)" in result.out
    refused = run("train", "lra_images.pathfinder", "--folder", tmp_path, "--device", "cpu", "--out", tmp_path / "other")
    assert refused.code == 2
    assert "no folder of Pathfinder images" in refused.complaint


def test_a_picture_of_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(_pathfinder, "SEGMENTATION", {256: _pathfinder.LRA[256]})
    monkeypatch.setattr(_pathfinder, "LRA", {32: _pathfinder.LRA[32]})
    main([str(tmp_path / "samples.png")])
    assert (tmp_path / "samples.png").read_bytes()[:4] == b"\x89PNG"


# The published folders


@pytest.fixture
def folder(tmp_path):
    """Twenty images as Long Range Arena keeps them, grey n and label n mod 2 for image n; number 3 has no byte."""
    root = tmp_path / "pathfinder32" / "curv_contour_length_14"
    (root / "metadata").mkdir(parents=True)
    for batch in range(2):
        images = root / "imgs" / str(batch)
        images.mkdir(parents=True)
        lines = []
        for number in range(10):
            grey = 10 * batch + number
            Image.new("L", (32, 32), grey).save(images / f"sample_{number}.png")
            lines.append(f"imgs/{batch} sample_{number}.png {number} {grey % 2} 1.0 14 4 2 0.5 1 1")
        (root / "metadata" / f"{batch}.npy").write_text("\n".join(lines) + "\n")
    (root / "imgs" / "0" / "sample_3.png").write_bytes(b"")
    return root


def read(folder):
    return Pathfinder.Config(folder=str(folder), pixels="tokens").build()


def test_a_published_folder_is_split_as_s4_splits_it(folder):
    task = read(folder.parent)
    assert [task.size(split) for split in ("train", "valid", "test")] == [17, 1, 1]
    order = torch.randperm(19, generator=torch.Generator().manual_seed(42))
    greys = [grey for grey in range(20) if grey != 3]
    kept = {split: task.arrays(split) for split in ("train", "valid", "test")}
    found = np.concatenate([kept[split]["images"][:, 0] for split in kept])
    assert found.tolist() == [greys[row] for row in order]
    assert (np.concatenate([kept[split]["targets"] for split in kept]) == found % 2).all()
    assert torch.equal(read(folder).batch("test", 0, 1).inputs, task.batch("test", 0, 1).inputs)


def test_the_easy_set_of_a_published_folder_is_read_by_its_name(folder):
    shutil.copytree(folder, folder.parent / "curv_baseline")
    Image.new("L", (32, 32), 200).save(folder.parent / "curv_baseline" / "imgs" / "0" / "sample_3.png")
    config = Pathfinder.Config(folder=str(folder.parent), pixels="tokens", contour_length=6)
    assert config.build().size("train") == 16
    assert read(folder.parent).size("train") == 17


def test_metadata_may_be_an_array_of_strings(folder):
    before = read(folder).batch("train", 0, 17)
    for file in (folder / "metadata").iterdir():
        rows = np.array([line.split() for line in file.read_text().splitlines()])
        with file.open("wb") as stream:
            np.save(stream, rows)
    after = read(folder).batch("train", 0, 17)
    assert torch.equal(before.inputs, after.inputs)
    assert torch.equal(before.targets, after.targets)


def test_pickled_metadata_are_never_loaded(folder):
    file = folder / "metadata" / "0.npy"
    with file.open("wb") as stream:
        np.save(stream, np.array([["imgs/0", 1, None]], dtype=object), allow_pickle=True)
    with pytest.raises(BadInput, match=r"0\.npy holds pickled objects, which are never loaded"):
        read(folder).batch("train", 0, 1)
    file.write_bytes(b"\x80\x04\x95\xff")
    with pytest.raises(BadInput, match="neither text nor an array of strings"):
        read(folder).batch("train", 0, 1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "imgs/1/sample_5.png").unlink(), r"row 6 of .*1\.npy names .*sample_5.png, which is not there"),
        (lambda root: (root / "metadata/0.npy").write_text("imgs/0 sample_0.png 0 7\n"), "row 1 of .* wanted are folder, file"),
        (lambda root: (root / "imgs/1/sample_5.png").write_bytes(b"no image"), "sample_5.png is no image that can be read"),
        (lambda root: Image.new("L", (64, 64)).save(root / "imgs/1/sample_5.png"), "has 64 x 64 pixels, size is 32"),
        (lambda root: [file.unlink() for file in (root / "metadata").iterdir()], "no folder of Pathfinder images"),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(folder, damage, said):
    damage(folder)
    task = read(folder)
    with pytest.raises(BadInput, match=said):
        task.batch("train", 0, 1)
