"""The candidates of a chunk over eight devices, forced on the CPU in a process of its own: the same as on one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from streamt1_jax.config import SearchConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.sharding import along, candidate_mesh, place
from streamt1_jax.sink import Route

TESTS = Path(__file__).parent
# A rounding error of the decoder turns single uint8 levels of what the rewards see.
ATOL = {"latents": 1e-5, "short": 1e-3, "long": 1e-3, "score": 1e-3}


@pytest.fixture(scope="module")
def report() -> dict:
    done = subprocess.run(
        [sys.executable, TESTS / "sharded_run.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["devices"] == 8
    return report


@pytest.mark.slow
def test_picks_and_latents_are_those_of_one_device(report):
    assert report["unequal"] == []
    assert all(report["error"][name] <= atol for name, atol in ATOL.items()), report["error"]
    assert report["routes"] == sorted(Route), "not every route was taken: less is tested than should be"
    assert len({tuple(kept) for kept in report["kept"]}) > 1, "every chunk kept the same: nothing is tested"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["window_decode", "rewards_that_read", "reward_on_the_host"])
def test_other_ways_of_running_are_those_of_one_device(report, way):
    found = report[way]
    assert found["unequal"] == []
    assert all(found["error"][name] <= atol for name, atol in ATOL.items()), found["error"]


@pytest.mark.slow
def test_a_reward_on_the_host_scores_every_candidate_once(report):
    """Not once a device: 2 x 4 candidates of 3 chunks."""
    assert report["reward_on_the_host"]["asked"] == [24, 24]


@pytest.mark.slow
def test_no_device_is_sent_the_winners_of_the_others(report):
    """What is summed over devices holds one winner, not both; the windows are the largest thing that is."""
    shapes, window = report["reduced"]["shapes"], report["reduced"]["window"]
    assert [1, *window] in shapes, "the windows are not among what is summed: nothing is tested"
    assert [2, *window] not in shapes
    assert max(math.prod(shape) for shape in shapes) <= report["reduced"]["largest"]


@pytest.mark.slow
def test_every_device_holds_one_candidate(report):
    assert report["layout"]["candidates"] == [[device, [1, 1]] for device in range(8)]
    # A beam's state lies with its four candidates.
    assert report["layout"]["beams"] == [[1]] * 8


@pytest.mark.slow
def test_nothing_compiles_after_the_second_chunk(report):
    compiled = report["compiled"]
    assert compiled[1] > 0
    assert compiled[1:] == compiled[1:2] * (len(compiled) - 1), compiled


@pytest.mark.slow
def test_grids_that_do_not_divide_are_refused(report):
    said = {(beams, count, devices): message for beams, count, devices, message in report["refusals"]}
    for fits in ((2, 4, 8), (3, 2, 6)):
        assert said.pop(fits) is None
    for (beams, count, devices), message in said.items():
        assert message is not None, f"{beams}x{count} over {devices} devices"
        assert str(devices) in message
    assert "use --devices 4" in said[2, 2, 8]
    assert "use --devices 2" in said[2, 3, 4]
    assert "this machine has 8" in said[2, 4, 16]


def test_more_devices_than_there_are():
    with pytest.raises(BadInputError, match="lower --devices"):
        candidate_mesh(SearchConfig(), 4096)


def test_without_a_mesh_nothing_moves():
    tree = {"a": jnp.ones(3)}
    assert along(None, tree, "beams") is tree
    assert place(None, tree) is tree


def test_a_mesh_of_one_device():
    mesh = candidate_mesh(SearchConfig(), 1)
    assert dict(mesh.shape) == {"beams": 1, "candidates": 1}
