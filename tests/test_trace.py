"""The host's record of a search: walking back, JSON, and what cannot be read."""

import dataclasses
import json
import math

import pytest
from fake_search import fake_trace

from streamt1_jax.errors import BadInputError
from streamt1_jax.trace import Candidate, Chunk, Trace


def candidate(chunk, parent, kept, score=0.0):
    return Candidate(
        chunk=chunk,
        parent_beam=parent,
        candidate=0,
        seed=1,
        short=score,
        long=score,
        score=score,
        ema=False,
        append=False,
        sink_frames=3,
        sink_starts=(),
        kept=kept,
        finite=math.isfinite(score),
    )


def three_chunks(final_scores=()):
    """Beams cross: beam 0 of the end comes from beam 1, which comes from beam 0."""
    a0, a1 = candidate(0, None, 1), candidate(0, None, 0)
    b0, b1 = candidate(1, 0, 1), candidate(1, 1, 0)
    c0, c1 = candidate(2, 1, 0), candidate(2, 1, 1)
    evicted = ((None, None), ((5, "ema"), (6, "append")), (None, (7, "discard")))
    chunks = tuple(
        Chunk(i, 3 * i, 0.1, pair, gone, 1.0)
        for i, (pair, gone) in enumerate(zip(((a0, a1), (b0, b1), (c0, c1)), evicted, strict=True))
    )
    return Trace(chunks, final_scores), (a0, a1, b0, b1, c0, c1)


def test_history_follows_the_parents():
    trace, (_, a1, b0, _, c0, c1) = three_chunks()
    assert [x is y for x, y in zip(trace.history(0), (a1, b0, c0), strict=True)] == [True] * 3
    assert [x is y for x, y in zip(trace.history(1), (a1, b0, c1), strict=True)] == [True] * 3


def test_routes_are_those_of_the_beams_own_history():
    trace, _ = three_chunks()
    assert trace.routes(0) == {6: "append"}
    assert trace.routes(1) == {6: "append", 7: "discard"}


@pytest.mark.parametrize(
    ("scores", "winner"),
    [((), 0), ((1.0, 2.0), 1), ((2.0, 2.0), 0), ((math.nan, -9.0), 1), ((math.nan, math.nan), 0), ((math.inf, 1.0), 1)],
)
def test_the_winner_is_the_best_finite_score_and_the_earlier_at_a_tie(scores, winner):
    trace, made = three_chunks(scores)
    assert trace.winner == winner
    assert trace.winning_path()[-1] is made[4 + winner]


def test_a_beam_that_was_not_kept_is_refused():
    with pytest.raises(BadInputError, match=r"beam 2 asked of chunk 2, which kept the beams \[0, 1\]"):
        three_chunks()[0].history(2)


def test_json_round_trip_keeps_all_but_thumbnails():
    trace = fake_trace()
    text = json.dumps(trace.to_json(), allow_nan=False)
    assert Trace.from_json(json.loads(text)) == trace
    assert "thumbnail" not in text


def test_json_holds_no_nan():
    trace, _ = three_chunks((math.nan, 1.0))
    bad = dataclasses.replace(
        trace.chunks[0], candidates=(candidate(0, None, 0, math.nan), candidate(0, None, 1, math.inf))
    )
    data = dataclasses.replace(trace, chunks=(bad, *trace.chunks[1:])).to_json()
    assert json.loads(json.dumps(data, allow_nan=False))["final_scores"] == [None, 1.0]
    read = Trace.from_json(data)
    assert all(math.isnan(c.score) and not c.finite for c in read.chunks[0].candidates)
    assert math.isnan(read.final_scores[0])


@pytest.mark.parametrize("damage", ["chunk", "seed", "extra", "route"])
def test_a_damaged_record_is_refused(damage):
    data = fake_trace().to_json()
    match damage:
        case "chunk":
            del data["chunks"]
        case "seed":
            del data["chunks"][0]["candidates"][0]["seed"]
        case "extra":
            data["chunks"][0]["candidates"][0]["thumbnail"] = None
            data["chunks"][0]["candidates"][0]["surprise"] = 1
        case "route":
            data["chunks"][4]["evicted"][0] = [1, "burn"]
    with pytest.raises(BadInputError, match="trace cannot be read"):
        Trace.from_json(data)
