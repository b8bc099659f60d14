import json

import pytest

from hippodrome.files import replacing, write_json


def test_a_file_appears_whole_and_nothing_is_left_beside_it(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"é": 1})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"é": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    for text in ("old", "new"):
        with replacing(tmp_path / "folder") as beside:
            beside.mkdir()
            (beside / text).write_text(text)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def interrupted(path):
    with replacing(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
