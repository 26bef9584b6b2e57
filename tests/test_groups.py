"""`benchmarks/groups.py`: which captions are of which kind, and what its rows say."""

import sys
from pathlib import Path

import numpy as np
from compare import assert_close
from test_compare import results_of

from streamt1_jax.compare_methods import entries_of
from streamt1_jax.compare_stats import summarize

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import groups

PROMPTS = [
    "a red circle spins",
    "a corgi surfs a wave",
    "a red star spins",
    "a red ring bounces and a blue cross spins",
]


def test_captions_are_of_a_kind_by_their_things():
    assert groups.kinds(PROMPTS) == {"one thing": [0, 2], "two things": [3], "one circle": [0], "one star": [2]}


def test_rows_are_means_over_a_kind_and_what_is_more_than_one_candidate():
    rng = np.random.default_rng(0)
    one, four = rng.random(9), rng.random(9)
    summary = summarize(results_of({"longlive": one, "beam": four}), entries_of(["longlive", "beam"], [4]))
    odd = [0, 2, 4, 6, 8]  # those that `results_of` gives a check
    summary["texts"] = ["a red circle spins" if index in odd else "a corgi surfs a wave" for index in range(9)]
    assert groups.means(summary["entries"][1]["by_prompt"], odd).keys() == {"mean"}
    rows = [line.split(" | ") for line in groups.table(summary)]
    assert [row[:4] for row in rows[2:]] == [
        ["| " + kind, "5", *of] for kind in ("one thing", "one circle") for of in (["longlive", "1"], ["beam", "4"])
    ]
    assert_close("mean", float(rows[3][4]), four[odd].mean(), 1e-3)
    assert_close("more", float(rows[3][5].removesuffix(" |")), (four - one)[odd].mean(), 1e-3)
