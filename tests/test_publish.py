"""Result files appear together or not at all, whatever happens: failures, signals, kills, a full disk."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamt1_jax.errors import BadInputError
from streamt1_jax.interrupts import Interrupts
from streamt1_jax.publish import sweep_results, write_together

NAMES = ("out.mp4", "out.json", "out.png")


def paths(folder: Path) -> list[Path]:
    return [folder / name for name in NAMES]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() if path.is_file() else "folder" for path in folder.iterdir()}


def write(folder: Path, text: str = "new", *, overwrite: bool = True) -> None:
    with write_together(paths(folder), overwrite=overwrite) as temporaries:
        for temporary in temporaries:
            temporary.write_text(text)


@pytest.fixture
def earlier(tmp_path):
    """Two of the three names are taken."""
    for name in NAMES[:2]:
        (tmp_path / name).write_text("old")
    return contents(tmp_path)


def test_all_appear(tmp_path):
    write(tmp_path)
    assert contents(tmp_path) == dict.fromkeys(NAMES, "new")


def test_all_are_replaced(tmp_path, earlier):
    write(tmp_path)
    assert contents(tmp_path) == dict.fromkeys(NAMES, "new")


def test_an_existing_one_is_refused(tmp_path, earlier):
    with pytest.raises(BadInputError, match="appeared meanwhile"):
        write(tmp_path, overwrite=False)
    assert contents(tmp_path) == earlier


@pytest.mark.parametrize("failing", range(5))
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["disk", "signal"])
def test_a_failed_rename_leaves_none_of_them(tmp_path, earlier, monkeypatch, failing, error):
    """Five renames: two earlier files aside, three new ones in. Whichever fails, all is as before."""
    rename, count = Path.rename, iter(range(100))

    def fails(self, target):
        if next(count) == failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises((BadInputError, KeyboardInterrupt)):
        write(tmp_path)
    assert contents(tmp_path) == earlier


def test_a_failure_while_writing_leaves_none_of_them(tmp_path, earlier):
    def half():
        with write_together(paths(tmp_path), overwrite=True) as (first, *_):
            first.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert contents(tmp_path) == earlier


def test_a_file_that_was_not_written_is_a_failure(tmp_path, earlier):
    def incomplete():
        with write_together(paths(tmp_path), overwrite=True) as (first, *_):
            first.write_text("new")

    with pytest.raises(BadInputError, match="cannot be written"):
        incomplete()
    assert contents(tmp_path) == earlier


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing_leaves_nothing(tmp_path, earlier, number):
    def interrupted():
        with write_together(paths(tmp_path), overwrite=True) as (first, *_):
            first.write_text("half")
            os.kill(os.getpid(), number)

    with Interrupts(), pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == earlier


KILLED = """
import os, signal, sys
from pathlib import Path
from streamt1_jax.publish import write_together
folder, when = Path(sys.argv[1]), int(sys.argv[2])
rename, count = Path.rename, iter(range(100))
def killed(self, target):
    if next(count) == when:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killed
with write_together([folder / name for name in sys.argv[3:]], overwrite=True) as temporaries:
    for temporary in temporaries:
        temporary.write_text("new")
    if when < 0:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", [-1, 0, 1, 3, 4])
def test_row_21_the_next_start_puts_back_what_a_kill_left(tmp_path, earlier, when):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(when), *NAMES], check=False)
    assert done.returncode == -signal.SIGKILL
    for _ in range(2):
        sweep_results(tmp_path)
        assert contents(tmp_path) == earlier


def test_what_is_being_written_is_not_swept(tmp_path):
    with write_together(paths(tmp_path), overwrite=True) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
        sweep_results(tmp_path)
    assert contents(tmp_path) == dict.fromkeys(NAMES, "new")


def test_a_full_disk_leaves_nothing(tmp_path, earlier):
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from streamt1_jax.errors import BadInputError\nfrom streamt1_jax.publish import write_together\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    with write_together([Path(p) for p in sys.argv[1:]], overwrite=True) as temporaries:\n"
        "        for temporary in temporaries:\n            temporary.write_bytes(bytes(5000))\n"
        "except BadInputError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths(tmp_path))], capture_output=True, text=True, check=True
    )
    assert "cannot be written" in done.stdout
    assert contents(tmp_path) == earlier
