"""The search as a picture: a column per chunk, a cell per candidate, the path that became the video in colour.

Long searches wrap into bands, like text into lines. Lengths are inches, y grows downwards; text sizes are points.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamt1_jax.errors import BadInputError
from streamt1_jax.outputs import SOFTWARE, atomic_write
from streamt1_jax.trace import Candidate, Chunk, Trace

# Okabe and Ito's colours, told apart with any kind of colour vision.
WINNER, KEPT, PRUNED, BROKEN = "#D55E00", "#0072B2", "#B9BEC6", "#000000"
ROUTE_COLORS = {"sink": "#5B4A00", "append": "#00795A", "ema": "#A5457F", "discard": "#7A7F87"}
INK, FAINT = "#1C2530", "#6B7480"

MAX_THUMBNAILS = 200  # more become marks: the picture stays a page, and quick to draw
MAX_PIXELS = 30_000  # a side; the renderer refuses 2^16
DPI = 130


@dataclass(frozen=True)
class _Layout:
    """Sizes and places of everything that repeats."""

    columns: int  # chunks in a band
    rows: int  # candidates in a column, at most
    cell: tuple[float, float]  # width, height of a thumbnail or a mark
    gap: tuple[float, float]  # between cells: room for edges, room for scores
    marks: bool

    margin: float = 0.7  # left and right of a band; edges from the band before start there
    head: float = 0.42  # of a band, for the chunk's name and time
    title: float = 0.55
    legend: float = 0.7

    @property
    def pitch(self) -> tuple[float, float]:
        return self.cell[0] + self.gap[0], self.cell[1] + self.gap[1]

    @property
    def band(self) -> float:
        return self.head + self.rows * self.pitch[1] + 0.2

    def corner(self, column: int, row: int) -> tuple[float, float]:
        """Top left of a cell."""
        band, place = divmod(column, self.columns)
        return self.margin + place * self.pitch[0], self.title + band * self.band + self.head + row * self.pitch[1]

    def size(self, chunks: int) -> tuple[float, float]:
        """Of the whole picture."""
        bands = math.ceil(chunks / self.columns)
        width = 2 * self.margin + min(chunks, self.columns) * self.pitch[0] - self.gap[0]
        return max(width, 7.6), self.title + bands * self.band + self.legend


def _layout(trace: Trace) -> _Layout:
    chunks, candidates = len(trace.chunks), [c for chunk in trace.chunks for c in chunk.candidates]
    rows = max(len(chunk.candidates) for chunk in trace.chunks)
    thumbnail = next((c.thumbnail for c in candidates if c.thumbnail is not None), None)
    if thumbnail is None or len(candidates) > MAX_THUMBNAILS:
        return _Layout(columns=_even(chunks, 20), rows=rows, cell=(0.52, 0.2), gap=(0.26, 0.2), marks=True)
    height, width = thumbnail.shape[:2]
    cell = (1.28, 1.28 * min(max(height / width, 0.3), 1.8))
    return _Layout(columns=_even(chunks, 10), rows=rows, cell=cell, gap=(0.42, 0.4), marks=False)


def _even(chunks: int, most: int) -> int:
    """Chunks to a band of at most `most`, the bands about equally long."""
    return math.ceil(chunks / math.ceil(chunks / most))


def save_search_tree(trace: Trace, path: str | Path) -> None:
    """Draws a trace as a PNG: candidates, scores, what was kept, and what became of each chunk of the video.

    Args:
        trace: at least one chunk. Thumbnails are drawn where there are some and not too many; else marks.
        path: replaced, when the new picture is whole.

    Raises:
        BadInputError: an empty trace, or a path that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not trace.chunks:
        raise BadInputError("the trace has no chunk, expected at least one: draw it after a chunk is done")
    layout = _layout(trace)
    width, height = layout.size(len(trace.chunks))
    figure = Figure(figsize=(width, height), dpi=min(DPI, MAX_PIXELS / height), facecolor="white")
    FigureCanvasAgg(figure)  # renders in memory; no window, no global state
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    path_to_video = trace.winning_path()
    fates: dict[int, str] = {0: "sink", **trace.routes(trace.winner)}
    for column, chunk in enumerate(trace.chunks):
        _draw_head(axes, layout, column, chunk)
        for row, candidate in enumerate(chunk.candidates):
            color = WINNER if candidate is path_to_video[column] else KEPT if candidate.kept is not None else PRUNED
            if candidate.parent_beam is not None and column > 0:
                parent = trace.chunks[column - 1].kept(candidate.parent_beam)
                parent_row = trace.chunks[column - 1].candidates.index(parent)
                _draw_edge(axes, layout, (column - 1, parent_row), (column, row), color)
            _draw_cell(
                axes, layout, (column, row), candidate, color, fates.get(chunk.index) if color == WINNER else None
            )
    _draw_final_scores(axes, layout, trace)
    _draw_title(axes, layout, trace)
    _draw_legend(axes, set(fates.values()), any(not c.finite for chunk in trace.chunks for c in chunk.candidates))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": SOFTWARE})


def _score(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf"
    return (f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}").replace("-", "\N{MINUS SIGN}")


def _draw_head(axes: Any, layout: _Layout, column: int, chunk: Chunk) -> None:
    x, y = layout.corner(column, 0)
    x += layout.cell[0] / 2
    name = str(chunk.index) if layout.marks else f"chunk {chunk.index}"
    axes.text(x, y - 0.2, name, ha="center", va="bottom", fontsize=8.5, weight="bold", color=INK)
    axes.text(x, y - 0.07, f"α {chunk.alpha:.2f}", ha="center", va="bottom", fontsize=6.5, color=FAINT)


def _draw_edge(axes: Any, layout: _Layout, start: tuple[int, int], end: tuple[int, int], color: str) -> None:
    """A curve from a kept candidate to one that continues it; into the left margin where a new band begins."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    width, height = layout.cell
    (x0, y0), (x1, y1) = layout.corner(*start), layout.corner(*end)
    x0, y0, y1 = x0 + width, y0 + height / 2, y1 + height / 2
    weight = {WINNER: 2.6, KEPT: 1.5, PRUNED: 0.8}[color]
    order = {WINNER: 3, KEPT: 2, PRUNED: 1}[color]
    style: dict[str, Any] = {"color": color, "lw": weight, "zorder": order}
    if end[0] % layout.columns == 0:
        axes.plot([x0, x0 + 0.2], [y0, y0], ls=":", **style)
        x0, y0 = x1 - 0.42, layout.corner(end[0], start[1])[1] + height / 2
        axes.plot([x0, x0 - 0.1], [y0, y0], ls=":", **style)
    middle = (x0 + x1) / 2
    curve = Curve([(x0, y0), (middle, y0), (middle, y1), (x1, y1)], [Curve.MOVETO] + [Curve.CURVE4] * 3)
    axes.add_patch(PathPatch(curve, fill=False, capstyle="round", **style))


def _draw_cell(
    axes: Any, layout: _Layout, place: tuple[int, int], candidate: Candidate, color: str, fate: str | None
) -> None:
    from matplotlib.patches import Rectangle

    (x, y), (width, height) = layout.corner(*place), layout.cell
    pruned = color == PRUNED
    if candidate.thumbnail is not None and not layout.marks:
        axes.imshow(candidate.thumbnail, extent=(x, x + width, y + height, y), aspect="auto", zorder=4)
        if pruned:
            axes.add_patch(Rectangle((x, y), width, height, color="white", alpha=0.45, lw=0, zorder=5))
    else:
        axes.add_patch(Rectangle((x, y), width, height, color="#ECEEF1" if pruned else color, lw=0, zorder=4))
    axes.add_patch(Rectangle((x, y), width, height, fill=False, ec=color, lw=1 if pruned else 2.4, zorder=6))
    if not candidate.finite:
        axes.plot([x, x + width], [y, y + height], color=BROKEN, lw=1.2, zorder=7)
        axes.plot([x, x + width], [y + height, y], color=BROKEN, lw=1.2, zorder=7)
    ink = FAINT if pruned else color
    middle = x + width / 2
    size = 6.2 if layout.marks else 8
    axes.text(
        middle,
        y + height + 0.04,
        _score(candidate.score),
        ha="center",
        va="top",
        fontsize=size,
        color=ink,
        weight="normal" if pruned else "bold",
        zorder=8,
    )
    if not layout.marks:
        parts = f"short {_score(candidate.short)}   long {_score(candidate.long)}"
        axes.text(middle, y + height + 0.19, parts, ha="center", va="top", fontsize=5.6, color=FAINT, zorder=8)
    if fate is not None:
        pill = {"boxstyle": "round,pad=0.25", "fc": ROUTE_COLORS[fate], "ec": "white", "lw": 0.6}
        spot: dict[str, Any] = {"x": x + 0.05, "y": y + 0.05, "ha": "left", "va": "top", "fontsize": 6}
        if layout.marks:
            spot = {"x": middle, "y": y + height / 2, "ha": "center", "va": "center_baseline", "fontsize": 5.2}
        axes.text(s=fate.upper(), weight="bold", color="white", bbox=pill, zorder=8, **spot)


def _draw_final_scores(axes: Any, layout: _Layout, trace: Trace) -> None:
    """Beside the kept candidates of the last chunk: the score of the whole video."""
    last = trace.chunks[-1]
    for beam, score in enumerate(trace.final_scores):
        x, y = layout.corner(len(trace.chunks) - 1, last.candidates.index(last.kept(beam)))
        color = WINNER if beam == trace.winner else KEPT
        axes.text(
            x + layout.cell[0] + 0.08,
            y + layout.cell[1] / 2,
            f"video\n{_score(score)}",
            va="center",
            fontsize=7,
            color=color,
            weight="bold" if beam == trace.winner else "normal",
            linespacing=1.25,
        )


def _draw_title(axes: Any, layout: _Layout, trace: Trace) -> None:
    candidates = sum(len(chunk.candidates) for chunk in trace.chunks)
    beams = sum(candidate.kept is not None for candidate in trace.chunks[-1].candidates)
    numbers = {"chunk": len(trace.chunks), "candidate": candidates, "beam": beams}
    words = (f"{number} {name}{'s' * (number != 1)}" for name, number in numbers.items())
    text = f"Stream-T1 search: {', '.join(words)} kept"
    axes.text(layout.margin, 0.3, text, fontsize=12, weight="bold", color=INK, va="center")


def _draw_legend(axes: Any, fates: set[str], broken: bool) -> None:
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = [
        Line2D([], [], color=WINNER, lw=2.6, label="the video's path"),
        Line2D([], [], color=KEPT, lw=1.5, label="kept beam"),
        Line2D([], [], color=PRUNED, lw=0.8, label="pruned"),
    ]
    if broken:
        lines.append(Line2D([], [], color=BROKEN, marker="x", lw=0, label="not finite"))
    words = {
        "sink": "SINK: first chunk, always attended to",
        "append": "APPEND: became a sink when it left the window",
        "ema": "EMA: merged into the newest sink",
        "discard": "DISCARD: dropped when it left the window",
    }
    patches = [Patch(color=ROUTE_COLORS[fate], label=text) for fate, text in words.items() if fate in fates]
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    for handles, above in ((lines, 0.5), (patches, 0.25)):
        legend = Legend(
            axes,
            handles,
            [str(handle.get_label()) for handle in handles],
            ncols=len(handles),
            loc="center",
            bbox_to_anchor=(width / 2, height - above),
            bbox_transform=axes.transData,
            fontsize=7.5,
            frameon=False,
            labelcolor=INK,
            columnspacing=1.6,
        )
        axes.add_artist(legend)
