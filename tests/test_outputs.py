"""FAULTS rows 24 and 25: outputs are checked first, written whole, and never at the cost of a stranger's file."""

import errno
import hashlib
import json
import os
import tempfile

import numpy as np
import pytest

from streamt1_jax.errors import BadInputError
from streamt1_jax.outputs import atomic_write, folder_outputs, make_folder, single_output, write_json


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_free_name_is_fine_and_nothing_is_made_by_the_check(tmp_path):
    paths = single_output(tmp_path / "out.mp4")
    assert [p.name for p in (paths.video, paths.record, paths.tree)] == ["out.mp4", "out.json", "out.png"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out", "out.avi", "out.json", "mp4"])
def test_the_name_must_say_mp4(tmp_path, name):
    with pytest.raises(BadInputError, match=r"does not end in \.mp4"):
        single_output(tmp_path / name)


def test_the_folder_must_be_there(tmp_path):
    with pytest.raises(BadInputError, match="does not exist"):
        single_output(tmp_path / "none" / "out.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match="is a file"):
        single_output(tmp_path / "file" / "out.mp4")


def test_a_folder_is_no_video(tmp_path):
    (tmp_path / "out.mp4").mkdir()
    with pytest.raises(BadInputError, match="is a folder"):
        single_output(tmp_path / "out.mp4", overwrite=True)


@pytest.mark.parametrize("name", ["out.mp4", "out.json", "out.png"])
def test_each_of_the_three_files_is_protected(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(BadInputError, match=rf"{name}' exists.*--overwrite"):
        single_output(tmp_path / "out.mp4")
    assert contents(tmp_path) == {name: b"mine"}


def test_overwrite_means_the_named_video_and_neighbours_made_here(tmp_path):
    (tmp_path / "out.mp4").write_text("any")
    (tmp_path / "out.json").write_text('{"software": "streamt1-jax"}')
    assert single_output(tmp_path / "out.mp4", overwrite=True).video == tmp_path / "out.mp4"
    (tmp_path / "out.png").write_text("my holiday")
    with pytest.raises(BadInputError, match="was not made by streamt1-jax"):
        single_output(tmp_path / "out.mp4", overwrite=True)
    assert (tmp_path / "out.png").read_text() == "my holiday"


@pytest.mark.parametrize("target", ["elsewhere.mp4", "nowhere.mp4"])
def test_links_are_refused(tmp_path, target):
    (tmp_path / "elsewhere.mp4").write_text("mine")
    (tmp_path / "out.mp4").symlink_to(tmp_path / target)
    with pytest.raises(BadInputError, match="is a link to"):
        single_output(tmp_path / "out.mp4", overwrite=True)
    assert (tmp_path / "elsewhere.mp4").read_text() == "mine"


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "out.json")
    with pytest.raises(BadInputError, match="is no file"):
        single_output(tmp_path / "out.mp4", overwrite=True)


def test_read_only_places_are_refused_before_the_run(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out.mp4").touch()
    (folder / "out.mp4").chmod(0o444)
    with pytest.raises(BadInputError, match="is read-only"):
        single_output(folder / "out.mp4", overwrite=True)
    folder.chmod(0o555)
    try:
        with pytest.raises(BadInputError, match="is read-only"):
            single_output(folder / "other.mp4")
    finally:
        folder.chmod(0o755)


def test_a_full_disk_is_refused_before_the_run(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(BadInputError, match="No space left"):
        single_output(tmp_path / "out.mp4")


def test_a_name_too_long_for_the_disk_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="cannot be written"):
        single_output(tmp_path / ("x" * 300 + ".mp4"))


def test_names_come_from_an_index_and_a_hash(tmp_path):
    prompts = ["../../etc/passwd", "a/b\\c", "a/b\\c", "кот 🐈", "x" * 5000]
    outputs = folder_outputs(tmp_path / "videos", prompts)
    for index, (prompt, paths) in enumerate(zip(prompts, outputs, strict=True)):
        assert paths.video == tmp_path / "videos" / f"{index:04d}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}.mp4"
    assert len({paths.video for paths in outputs}) == len(prompts)
    assert not (tmp_path / "videos").exists()


def test_a_folder_of_results_is_checked_file_by_file(tmp_path):
    taken = folder_outputs(tmp_path, ["a", "b"])[1].record
    taken.write_text("mine")
    with pytest.raises(BadInputError, match="exists"):
        folder_outputs(tmp_path, ["a", "b"])
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match="is no folder"):
        folder_outputs(tmp_path / "file", ["a"])
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInputError, match="is no folder"):
        folder_outputs(tmp_path / "dangling", ["a"])
    with pytest.raises(BadInputError, match="does not exist"):
        folder_outputs(tmp_path / "none" / "deeper", ["a"])


def test_a_folder_is_made_once(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "videos")
    with pytest.raises(BadInputError, match="cannot be written"):
        make_folder(tmp_path / "none" / "deeper")


def test_atomic_write_replaces_only_at_the_end(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".mp4")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert contents(tmp_path) == {"out.mp4": b"new"}


@pytest.mark.parametrize(
    "failure", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "out.mp4"
    path.write_text("old")
    expected = BadInputError if isinstance(failure, OSError) else type(failure)

    def write_half():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(expected):
        write_half()
    assert contents(tmp_path) == {"out.mp4": b"old"}


def test_a_file_that_appeared_meanwhile_is_kept(tmp_path):
    path = tmp_path / "out.mp4"

    def write():
        with atomic_write(path, overwrite=False) as temporary:
            temporary.write_text("new")
            path.write_text("theirs")

    with pytest.raises(BadInputError, match="appeared meanwhile"):
        write()
    assert contents(tmp_path) == {"out.mp4": b"theirs"}


def test_json_is_plain_strict_and_unicode(tmp_path):
    data = {
        "prompt": "кот 🐈",
        "score": float("nan"),
        "numbers": (np.float32(0.5), np.int64(3), np.bool_(True), -np.inf),
        3: [None, True],
    }
    write_json(tmp_path / "out.json", data)
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert "кот 🐈" in text
    read = json.loads(text, parse_constant=pytest.fail)
    assert read == {"prompt": "кот 🐈", "score": None, "numbers": [0.5, 3, True, "-inf"], "3": [None, True]}
