"""The candidates of a chunk over the devices of one machine.

A mesh of beams by candidates; every leaf that has these axes is laid out along them and XLA's partitioner does the
rest. Nothing else in the search knows how many devices there are, and the result does not depend on it.

What has a beams axis alone lies with every candidate of that beam. So the context pass of a kept beam (`recall`) is
repeated by the devices along the candidates axis: each needs its keys and values for the next chunk, and one that did
not make them would only wait for one that does.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from streamt1_jax.config import SearchConfig
from streamt1_jax.errors import BadInputError

BEAMS, CANDIDATES = "beams", "candidates"


def candidate_mesh(search: SearchConfig, devices: int) -> Mesh:
    """A mesh of this many devices of this machine, by which beams and candidates divide evenly.

    Raises:
        BadInputError: fewer devices than asked for, or candidates that cannot be shared evenly.
    """
    local = jax.local_devices()
    if devices > len(local):
        raise BadInputError(f"{devices} devices are asked for and this machine has {len(local)}: lower --devices")
    beams, count = search.grid
    over_beams = math.gcd(beams, devices)
    over_candidates = math.gcd(count, devices // over_beams)
    if over_beams * over_candidates != devices:
        raise BadInputError(
            f"{beams} beams of {count} candidates do not divide evenly over {devices} devices: "
            f"use --devices {over_beams * over_candidates}, or another search.beams or search.candidates_per_beam"
        )
    return Mesh(np.array(local[:devices]).reshape(over_beams, over_candidates), (BEAMS, CANDIDATES))


def along(mesh: Mesh | None, tree: PyTree, *axes: str | None) -> PyTree:
    """Lays the leading axes of every leaf out along the mesh, inside a compiled program; no mesh, no change."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(*axes)))


def place(mesh: Mesh | None, tree: PyTree, *axes: str) -> Any:
    """The same for arrays that exist; without axes every device gets a copy."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))


def of_own_candidates(mesh: Mesh | None, fn: Callable) -> Callable:
    """`fn(videos [n, ...], num_frames [n], prompt_index) -> [n] leaves`, called by every device with its own rows.

    For a reward on the host: the partitioner knows nothing of callbacks and would have every device send all videos
    and score them all.
    """
    if mesh is None:
        return fn
    rows = PartitionSpec((BEAMS, CANDIDATES))
    # Nothing is known of what comes back from the host, so nothing of how it varies over devices can be checked.
    return jax.shard_map(fn, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=rows, check_vma=False)
