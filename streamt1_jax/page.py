"""One page of a run that needs nothing else: the video, every candidate, scores, sinks and settings in one HTML file.

`page_files/` holds the page, its style and its script; here they are put together with the data. Nothing is fetched
when it is opened: pictures and the video are inside.
"""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from streamt1_jax.config import StreamConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.outputs import SOFTWARE, atomic_write, plain
from streamt1_jax.segments import first_frame
from streamt1_jax.trace import Candidate, Trace

FILES = Path(__file__).parent / "page_files"
QUALITY = 82  # of thumbnails, as WebP


def save_report(path: str | Path, trace: Trace, info: dict[str, Any], video: bytes, fps: float = 16) -> None:
    """Writes the page.

    Args:
        path: replaced when the new page is whole.
        trace: at least one chunk.
        info: `Output.info`; what is not in it is not shown.
        video: an mp4 file.

    Raises:
        BadInputError: an empty trace, or a path that cannot be written.
    """
    if not trace.chunks:
        raise BadInputError("the trace has no chunk, expected at least one: write the page after a chunk is done")
    data = json.dumps(plain(report_data(trace, info, fps)), ensure_ascii=False, separators=(",", ":"))
    parts = {
        "TITLE": _escape(str(info.get("prompt", "a run"))),
        "SOFTWARE": SOFTWARE,
        "STYLE": (FILES / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": (FILES / "page.js").read_text(encoding="utf-8"),
        # "<" could end the script element; in JSON it may as well be spelled out.
        "DATA": data.replace("<", "\\u003c"),
        "VIDEO": base64.b64encode(video).decode(),
    }
    # Split, not replaced one after the other: a prompt may spell the name of another part.
    head, *rest = (FILES / "page.html").read_text(encoding="utf-8").split("{{")
    pieces = [head]
    for piece in rest:
        name, _, text = piece.partition("}}")
        pieces += [parts[name], text]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(pieces), encoding="utf-8")


def _escape(text: str) -> str:
    import html

    return html.escape(text)


def report_data(trace: Trace, info: dict[str, Any], fps: float = 16) -> dict[str, Any]:
    """All that the page shows, as plain data; a place in `candidates` names a candidate."""
    stream = _stream_of(info)
    path = trace.winning_path()
    chunks = []
    for index, chunk in enumerate(trace.chunks):
        parents = trace.chunks[index - 1] if index else None
        chunks.append(
            {
                "index": chunk.index,
                "time": first_frame(chunk.index, stream) / fps,
                "alpha": chunk.alpha,
                "seconds": chunk.seconds,
                "winner": chunk.candidates.index(path[index]),
                "candidates": [_candidate(candidate, parents) for candidate in chunk.candidates],
            }
        )
    return {
        "info": info,
        "fps": fps,
        "chunks": chunks,
        "final_scores": [_finite(score) for score in trace.final_scores],
        "winner": trace.winner,
        "switches": [
            {"chunk": switch.chunk, "prompt": switch.prompt, "sinks": switch.sinks_replaced}
            for switch in trace.switches
        ],
        "lanes": memory_lanes(trace, stream),
    }


def _stream_of(info: dict[str, Any]) -> StreamConfig:
    values = info.get("config", {}).get("stream", {})
    made: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}
    return StreamConfig(**made)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _candidate(candidate: Candidate, parents: Any) -> dict[str, Any]:
    parent = None
    if parents is not None and candidate.parent_beam is not None:
        parent = parents.candidates.index(parents.kept(candidate.parent_beam))
    return {
        "parent": parent,
        "seed": candidate.seed,
        "short": _finite(candidate.short),
        "long": _finite(candidate.long),
        "score": _finite(candidate.score),
        "flag": "append" if candidate.append else "ema" if candidate.ema else "discard",
        "sinks": candidate.sink_frames,
        "kept": candidate.kept,
        "finite": candidate.finite,
        "picture": None if candidate.thumbnail is None else picture_url(candidate.thumbnail),
    }


def picture_url(pixels: np.ndarray) -> str:
    """A picture as a `data:` address."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def memory_lanes(trace: Trace, stream: StreamConfig) -> list[dict[str, Any]]:
    """What the video's own beam remembered of each of its chunks, and when (METHOD sections 3, 6 and 9).

    Returns:
        Per chunk: `spans` of (kind, first, last), the chunks that could attend to it as "sink", "window" or "append";
        and the `fate` it met when it left the window: `kind`, `at` (the first chunk without it) and, where it was
        merged, the chunk `into` which.
    """
    last = len(trace.chunks)
    history = trace.winning_path()
    left: dict[int, tuple[int, str]] = {}  # chunk: (the chunk whose commit evicted it, its route)
    for index, (chunk, candidate) in enumerate(zip(trace.chunks, history, strict=True)):
        entry = chunk.evicted[candidate.kept] if chunk.evicted and candidate.kept is not None else None
        if entry is not None:
            left[entry[0]] = (index, entry[1])
    resets = [switch.chunk for switch in trace.switches if switch.sinks_replaced]
    lanes: list[dict[str, Any]] = [{"chunk": chunk, "spans": [], "fate": None} for chunk in range(last)]

    def span(chunk: int, kind: str, first: int, end: int) -> None:
        if first < min(end, last):
            lanes[chunk]["spans"].append([kind, first, min(end, last) - 1])

    sinks = [list(range(min(stream.sink_chunks, last)))]
    sinks += [list(range(max(s - stream.local_chunks, 0), s))[: stream.sink_chunks] for s in resets]
    for firsts, begin, end in zip(sinks, [0, *resets], [*resets, last], strict=True):
        for chunk in firsts:
            span(chunk, "sink", max(begin, chunk + 1), end)
    newest = [(begin, firsts[-1]) for firsts, begin in zip(sinks, [0, *resets], strict=True)]
    for chunk in range(stream.sink_chunks, last):
        index, route = left.get(chunk, (last, ""))
        span(chunk, "window", chunk + 1, index + 1)
        if not route:
            continue
        lanes[chunk]["fate"] = {"kind": route, "at": index + 1, "into": None}
        if route == "append":
            span(chunk, "append", index + 1, min((s for s in resets if s > index), default=last))
            newest.append((index + 1, chunk))
        elif route == "ema":
            # The newest sink at that moment; a reset at the same chunk comes after the eviction.
            lanes[chunk]["fate"]["into"] = max((n for n in newest if n[0] <= index), key=lambda n: n[0])[1]
    return lanes
