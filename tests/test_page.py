"""The page of a run: what it says of the memory, that it needs nothing else, and that a browser can show it."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fake_search import fake_trace

from streamt1_jax.config import StreamConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.page import memory_lanes, report_data, save_report
from streamt1_jax.trace import Switch, Trace
from streamt1_jax.video import write_mp4

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
CHUNKS = 6
NASTY = "a <b>red</b> circle </script><script>document.title='broken'</script> {{VIDEO}} & кот 🐈"


def with_evictions(chunks: int, routes: dict[int, str], switches=()) -> Trace:
    """A search of one candidate a chunk where chunk c leaves, by its route, when chunk c + 2 is committed."""
    trace = fake_trace(chunks, 1, 1)
    made = []
    for chunk in trace.chunks:
        gone = chunk.index - 2
        made.append(dataclasses.replace(chunk, evicted=((gone, routes[gone]) if gone in routes else None,)))
    return Trace(tuple(made), trace.final_scores, tuple(switches))


def lanes(trace: Trace) -> dict[int, tuple]:
    """By chunk: spans, and (kind, at, into) of its fate."""
    return {
        lane["chunk"]: ([tuple(span) for span in lane["spans"]], lane["fate"] and tuple(lane["fate"].values()))
        for lane in memory_lanes(trace, StreamConfig())
    }


def test_lanes_show_where_every_chunk_went():
    found = lanes(with_evictions(7, {1: "append", 2: "ema", 3: "discard", 4: "ema"}))
    assert found == {
        0: ([("sink", 1, 6)], None),
        1: ([("window", 2, 3), ("append", 4, 6)], ("append", 4, None)),
        2: ([("window", 3, 4)], ("ema", 5, 1)),
        3: ([("window", 4, 5)], ("discard", 6, None)),
        4: ([("window", 5, 6)], ("ema", 7, 1)),
        5: ([("window", 6, 6)], None),
        6: ([], None),
    }


def test_a_merge_before_any_sink_was_appended_goes_into_the_first():
    assert lanes(with_evictions(5, {1: "ema"}))[1][1] == ("ema", 4, 0)


def test_a_switch_that_replaces_sinks_ends_them():
    found = lanes(with_evictions(9, {1: "append", 2: "ema", 3: "append", 5: "ema"}, [Switch(6, "x", True)]))
    assert found[0][0] == [("sink", 1, 5)]
    assert found[1][0] == [("window", 2, 3), ("append", 4, 5)]
    assert found[2] == ([("sink", 6, 8), ("window", 3, 4)], ("ema", 5, 1))
    assert found[3][0] == [("window", 4, 5)]  # appended by the last commit before the switch: gone at once
    assert found[5][1] == ("ema", 8, 2)


def test_a_switch_that_keeps_sinks_changes_no_lane():
    routes = {1: "append", 2: "ema", 3: "append"}
    plain, switched = (lanes(with_evictions(8, routes, switches)) for switches in ((), [Switch(6, "x", False)]))
    assert plain == switched


def test_the_data_names_every_candidate_by_its_place():
    trace = fake_trace(4)
    data = report_data(trace, {"prompt": "x"})
    assert [len(chunk["candidates"]) for chunk in data["chunks"]] == [4] * 4
    assert [chunk["time"] for chunk in data["chunks"]] == [0, 9 / 16, 21 / 16, 33 / 16]
    for index, (chunk, won) in enumerate(zip(data["chunks"], trace.winning_path(), strict=True)):
        assert trace.chunks[index].candidates[chunk["winner"]] is won
    parents = [candidate["parent"] for candidate in data["chunks"][1]["candidates"]]
    assert parents == [1, 1, 2, 2]  # candidates 1 and 2 of chunk 0 were kept, in this order


def test_an_empty_trace_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="at least one"):
        save_report(tmp_path / "a.html", Trace(()), {}, b"")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Of a made-up search whose prompt tries to break the page, and whose scores are not all finite."""
    folder = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(0)
    write_mp4(folder / "a.mp4", rng.integers(0, 256, (12 * CHUNKS - 3, 32, 48, 3), dtype=np.uint8))
    trace = fake_trace(CHUNKS)
    head, *rest = trace.chunks
    broken = dataclasses.replace(head.candidates[0], score=float("nan"), short=float("inf"), finite=False)
    small = dataclasses.replace(head.candidates[3], score=-0.000523)
    head = dataclasses.replace(head, candidates=(broken, *head.candidates[1:3], small))
    trace = Trace((head, *rest), trace.final_scores, (Switch(3, NASTY, False),))
    info = {
        "prompt": NASTY,
        "seed": 42,
        "config": {
            "stream": dataclasses.asdict(StreamConfig()),
            "search": {"beams": 2, "long_threshold": float("inf")},
        },
        "size": {"height": 32, "width": 48},
        "rewards": {"short": "native", "long": "native"},
        "weights": {"name": "mini", "summary": "untrained", "trained": False},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "dtype": "float32",
        "seconds": {"total": 1.5, "chunks": [0.25] * CHUNKS},
        "saving": {"seconds_per_chunk": 0.01, "state_bytes": 1000, "chunks": CHUNKS},
        "complete": False,
    }
    save_report(folder / "a.html", trace, info, (folder / "a.mp4").read_bytes())
    return folder / "a.html"


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert "streamt1-jax" in text[:4096], "the mark by which it is known as ours"
    markup = re.sub(r'<script id="(data|mp4)".*?</script>', "", text, flags=re.DOTALL)
    assert not re.findall(
        r"""(?:src|href)\s*=\s*["'](?!data:)|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", markup
    )
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import)\s*\(", markup)


def test_what_a_user_wrote_is_no_markup(page):
    text = page.read_text()
    assert html.escape(NASTY) in text
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, flags=re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["info"]["prompt"] == NASTY


@pytest.fixture(scope="module")
def shown(page) -> str:
    """The page's elements after its script has run in a headless browser, without any network."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium (.ci/run does)")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    # Every name leads nowhere: a page that asks for something does not get it.
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", f"--user-data-dir={page.parent}/user"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=240, check=True)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line]
    assert not errors, errors
    return done.stdout


@pytest.mark.slow
def test_a_browser_shows_all_of_it(shown):
    assert 'data-ready="yes"' in shown, "the script did not run to its end"
    assert 'data-video="48x32"' in shown, "the video cannot be played"
    assert shown.count('class="cell ') == 4 * CHUNKS
    assert shown.count('src="data:image/webp') == 4 * CHUNKS, "a thumbnail of every candidate"
    assert shown.count('class="cell kept winner') == CHUNKS
    assert shown.count('class="cell pruned broken') == 1
    assert shown.count("<polyline") == 3, "a line each for short, long and fused scores"
    assert shown.count('data-span="sink"') == 1
    assert "<title>" + html.escape(NASTY, quote=False) + "</title>" in shown
    for words in (
        "sinks kept",
        "interrupted",
        "untrained",
        "long_threshold",
        "not finite",
        "0.010 s a chunk",
        "\u22120.000523",
    ):
        assert words in shown, f"{words!r} is not on the page"
