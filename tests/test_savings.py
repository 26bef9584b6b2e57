"""Every exact saving of `benchmarks/savings.py` is the same numbers as the plain form, in float32 at a small size."""

import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from small import SMALL

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import savings

ATOL = 1e-4  # relative RMS


@pytest.fixture(scope="module")
def scene() -> savings.Scene:
    return savings.make_scene(SMALL, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("make", [*savings.MAKERS, savings.no_files], ids=lambda make: make.__name__)
def test_on_is_off(make, scene, tmp_path):
    saving = make(scene, tmp_path) if make is savings.no_files else make(scene)
    error = saving.difference(saving.on(), saving.off())
    assert error <= ATOL, f"{saving.name}: relative RMS {error:.3g}, allowed {ATOL:g}"
