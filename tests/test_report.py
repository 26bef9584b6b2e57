"""The picture of the search: it exists, shows what it should, and leaves nothing behind."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_search import fake_trace
from PIL import Image

from streamt1_jax.errors import BadInputError
from streamt1_jax.report import KEPT, ROUTE_COLORS, WINNER, _layout, save_search_tree
from streamt1_jax.trace import Trace


def colors(path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        return set(map(tuple, np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).tolist()))


def rgb(code: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(code[1:]))


def test_thumbnails_paths_and_routes_are_drawn(tmp_path):
    trace = fake_trace(7)
    save_search_tree(trace, tmp_path / "tree.png")
    shown = colors(tmp_path / "tree.png")
    assert {
        rgb(WINNER),
        rgb(KEPT),
        rgb(ROUTE_COLORS["ema"]),
        rgb(ROUTE_COLORS["append"]),
        rgb(ROUTE_COLORS["sink"]),
    } <= shown
    kept = trace.chunks[2].kept(0).thumbnail
    assert kept is not None
    assert tuple(kept[0, 0].tolist()) in shown
    assert [p.name for p in tmp_path.iterdir()] == ["tree.png"]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 4), (12, 2, 2), (40, 2, 4)], ids=str)
def test_every_shape_of_search_can_be_drawn(tmp_path, shape):
    trace = fake_trace(*shape)
    save_search_tree(trace, tmp_path / "tree.png")
    with Image.open(tmp_path / "tree.png") as image:
        assert image.width > image.height / 2
        assert image.info["Software"] == "streamt1-jax"


def test_many_candidates_become_marks():
    assert not _layout(fake_trace(40, 2, 2)).marks
    assert _layout(fake_trace(40, 2, 4)).marks
    assert _layout(fake_trace(2, thumbnails=False)).marks


def test_bands_are_about_equally_long():
    assert [_layout(fake_trace(n)).columns for n in (1, 10, 11, 12, 25)] == [1, 10, 6, 6, 9]


def test_scores_that_are_not_finite_are_drawn(tmp_path):
    chunk, *rest = fake_trace(3).chunks
    broken = dataclasses.replace(chunk.candidates[0], short=math.nan, score=math.nan, long=math.inf, finite=False)
    trace = Trace((dataclasses.replace(chunk, candidates=(broken, *chunk.candidates[1:])), *rest), (math.nan, 1.0))
    save_search_tree(trace, tmp_path / "tree.png")
    assert (tmp_path / "tree.png").stat().st_size > 1000


def test_an_empty_trace_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="at least one"):
        save_search_tree(Trace(()), tmp_path / "tree.png")
    assert not list(tmp_path.iterdir())


def test_no_global_state_of_matplotlib_is_touched(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from fake_search import fake_trace; "
        "from streamt1_jax.report import save_search_tree; assert 'matplotlib' not in sys.modules; "
        "save_search_tree(fake_trace(2), sys.argv[2]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    tests = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, tests, str(tmp_path / "tree.png")], check=True)
