"""Two processes share a prompts file by `--coordinator`, as two machines would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# The small model, with the published VAE's four pixel frames to a latent one: the command's lengths are made for it.
COMMAND = """
import dataclasses, sys
import small
from streamt1_jax import cli, pipeline
from streamt1_jax.config import VAEConfig
vae = VAEConfig(dim=8, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True))
small.SMALL = small.SmallWeights.config = dataclasses.replace(small.SMALL, vae=vae)
pipeline.MiniWeights = small.SmallWeights
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
    processes = [*hosts, start(tmp_path, "alone")]
    try:
        printed = [process.communicate(timeout=600) for process in processes]
    finally:  # a host whose partner failed would wait for it
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], [err for _, err in printed]

    # Every other prompt each; together the files of one machine alone, with the same seeds picked.
    assert [out.count("video ") for out, _ in printed] == [2, 1, 3]
    assert {record["prompt"] for record in records(tmp_path / "shared").values()} == set(PROMPTS)
    assert records(tmp_path / "shared") == records(tmp_path / "alone")
    videos = sorted(path.name for path in (tmp_path / "shared").glob("*.mp4"))
    for name in videos:
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert len(videos) == len(PROMPTS)
