"""Two processes share a prompts file by `--coordinator`, as two machines would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
COMMAND = """
import sys
from small import SmallWeights
from streamt1_jax import cli, pipeline
pipeline.MiniWeights = SmallWeights
sys.exit(cli.main(sys.argv[1:]))
"""
PROMPTS = ["a red circle", "a blue square", "two dots"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def start(folder: Path, out: str, *options: str) -> subprocess.Popen:
    command = ["generate", "--prompts-file", "prompts.txt", "--out", out, "--frames", "9", *options]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def records(folder: Path) -> dict[str, dict]:
    """What each video's record says that does not depend on when and where it was made, by its name."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: {key: record[key] for key in ("prompt", "seed", "history_seeds")} for name, record in found.items()}


@pytest.mark.slow
def test_two_hosts_share_the_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    address = f"localhost:{free_port()}"
    hosts = [
        start(tmp_path, "shared", "--coordinator", address, "--hosts", "2", "--host", str(number)) for number in (0, 1)
    ]
    printed = []
    for number, host in enumerate(hosts):
        out, err = host.communicate(timeout=600)
        assert host.returncode == 0, f"host {number}: {err}"
        printed.append(out)
    alone = start(tmp_path, "alone")
    _, err = alone.communicate(timeout=600)
    assert alone.returncode == 0, err

    # Every other prompt each; together the files of one machine alone, with the same seeds picked.
    assert [out.count("video ") for out in printed] == [2, 1]
    assert {record["prompt"] for record in records(tmp_path / "shared").values()} == set(PROMPTS)
    assert records(tmp_path / "shared") == records(tmp_path / "alone")
    videos = sorted(path.name for path in (tmp_path / "shared").glob("*.mp4"))
    for name in videos:
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert len(videos) == len(PROMPTS)
