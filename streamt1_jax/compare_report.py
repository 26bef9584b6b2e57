"""A comparison for people: tables in Markdown, quality over the budget, and drift over the time of a video."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamt1_jax.compare_methods import METHODS, REFERENCE
from streamt1_jax.outputs import SOFTWARE, atomic_write

# Okabe and Ito's colours, told apart with any kind of colour vision.
COLORS = {
    "longlive": "#5F6670",
    "best_of_n": "#E69F00",
    "beam": "#0072B2",
    "stream_t1": "#D55E00",
    "stream_t1-noise": "#56B4E9",
    "stream_t1-pruning": "#009E73",
    "stream_t1-sinking": "#CC79A7",
}
COLUMNS = 4  # panels side by side
PANEL = (3.1, 2.5)  # inches
DPI = 130

Summary = dict[str, Any]


def comparison_table(summary: Summary) -> str:
    """For every budget: scores by method, what each cost, differences to Stream-T1 and of any two, and drift."""
    lines = [_heading(summary), ""]
    for budget in _budgets(summary):
        entries = _at(summary["entries"], budget)
        lines += [f"### {budget} candidate{'s' * (budget != 1)} a chunk", ""]
        lines += _markdown("mean [95 % interval]", entries, summary["metrics"], score_cell)
        lines += ["", *_cost(entries), ""]
        against = [d for d in summary["differences"] if d["reference_budget"] == budget]
        if against:
            lines += _markdown(f"{REFERENCE} less", against, summary["metrics"], _difference_cell)
            lines += ["", "Prompt by prompt; * where the interval leaves out 0. Above 0, Stream-T1 is better.", ""]
        lines += _pairs(summary, budget)
        drifting = [{"method": e["method"], "scores": e["last_less_first"]} for e in entries if e["last_less_first"]]
        if drifting:
            lines += [*_markdown("last stretch less first", drifting, summary["metrics"], _difference_cell), ""]
    return "\n".join(lines).rstrip()


def _pairs(summary: Summary, budget: int) -> list[str]:
    """The primary metric of every method, less that of every method before it."""
    columns: dict[str, Summary] = {}  # by the method that is subtracted
    for pair in summary["pairs"]:
        if pair["budget"] == budget:
            column = columns.setdefault(pair["less"], {"method": pair["less"], "scores": {}})
            column["scores"][pair["method"]] = pair["score"].get(summary["primary"])
    if not columns:
        return []
    rows = list(dict.fromkeys(method for column in columns.values() for method in column["scores"]))
    corner = f"{summary['primary']}: row less column"
    return [*_markdown(corner, list(columns.values()), rows, _difference_cell), ""]


def _heading(summary: Summary) -> str:
    count, checked = summary["prompts"], summary["checked"]
    if checked == count:
        seen = "all of them checked"
    elif checked:
        seen = f"{checked} of them checked, the others say nothing that can be checked: rewards only"
    else:
        seen = "rewards only: none of these videos can be checked"
    return (
        f"{count} prompts, {seen}. The rewards steered the search and chose the video; the checks did neither. "
        f"Intervals: {summary['interval']}. Each stands alone: of twenty differences that are none, one is expected to "
        f"look like one. What decides is {summary['primary']}; the other rows explain it."
    )


def _budgets(summary: Summary) -> list[int]:
    """Those that were chosen; 1 where every method takes one candidate whatever the budget."""
    return sorted({entry["budget"] for entry in summary["entries"] if not entry["one_candidate"]}) or [1]


def _at(entries: Sequence[Summary], budget: int) -> list[Summary]:
    """The entries of a budget, and those that take one candidate whatever the budget."""
    return [entry for entry in entries if entry["one_candidate"] or entry["budget"] == budget]


def _markdown(corner: str, columns: Sequence[Summary], metrics: Sequence[str], cell: Any) -> list[str]:
    present = [metric for metric in metrics if any(metric in column["scores"] for column in columns)]
    rows = [[corner, *(column["method"] for column in columns)]]
    rows += [[metric, *(cell(column["scores"].get(metric)) for column in columns)] for metric in present]
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = ["| " + " | ".join(text.ljust(n) for text, n in zip(row, widths, strict=True)) + " |" for row in rows]
    return [texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]]


def score_cell(score: Summary | None, sign: str = "") -> str:
    """A mean and its interval, if it has one; `sign` is "+" for differences."""
    if score is None:
        return ""
    interval = "" if score["low"] is None else f" [{score['low']:{sign}.3f}, {score['high']:{sign}.3f}]"
    return f"{score['mean']:{sign}.3f}{interval}"


def _difference_cell(score: Summary | None) -> str:
    clear = score is not None and score["low"] is not None and (score["low"] > 0 or score["high"] < 0)
    return score_cell(score, "+") + " *" * clear


def _cost(entries: Sequence[Summary]) -> list[str]:
    """What each method spent, and what it is."""
    rows = [["method", "what it is", "candidates a chunk", "seconds a result", "measured on"]]
    for entry in entries:
        count = entry["seconds_of"]
        measured = f"{count} result{'s' * (count != 1)}" if count else "all, compilation included"
        rows.append(
            [
                entry["method"],
                entry["about"],
                f"{entry['candidates_per_chunk']:g}",
                f"{entry['seconds']:.2f}",
                measured,
            ]
        )
    return _aligned(rows)


def save_quality_plot(summary: Summary, path: str | Path) -> None:
    """Every score over the budget: a panel a score, a line a method; a method of one candidate is a level line.

    Raises:
        BadInputError: a path that cannot be written.
    """
    figure, panels = _figure(summary["metrics"], "Quality over candidates a chunk")
    budgets = sorted({entry["budget"] for entry in summary["entries"]})
    names = list(dict.fromkeys(entry["method"] for entry in summary["entries"]))
    for metric, axes in panels.items():
        for rank, name in enumerate(names):
            aside = 0.06 * (rank - (len(names) - 1) / 2)  # so that no bar hides another
            points = [
                (budgets.index(entry["budget"]) + aside, entry["scores"][metric])
                for entry in summary["entries"]
                if entry["method"] == name and metric in entry["scores"]
            ]
            _plot_line(axes, name, points, bars=True)
            if points and METHODS[name].one_candidate:
                axes.axhline(points[0][1]["mean"], color=COLORS[name], ls=":", lw=1)
        axes.set_xticks(range(len(budgets)), [str(budget) for budget in budgets])
        axes.set_xlim(-0.5, len(budgets) - 0.5)
    _save(figure, panels, path)


def save_drift_plot(summary: Summary, path: str | Path) -> None:
    """Every score of the stretches of a video over its time, at the largest budget.

    Raises:
        BadInputError: a path that cannot be written.
    """
    largest = max(_budgets(summary))
    entries = _at(summary["entries"], largest)
    figure, panels = _figure(summary["metrics"], f"Over the time of the video, seconds; {largest} candidates a chunk")
    for metric, axes in panels.items():
        for entry in entries:
            stretches = [s for s in entry["drift"] if metric in s["scores"]]
            _plot_line(axes, entry["method"], [((s["start"] + s["end"]) / 2, s["scores"][metric]) for s in stretches])
        axes.set_xlim(0, entries[0]["drift"][-1]["end"])
    _save(figure, panels, path)


def _figure(metrics: Sequence[str], title: str) -> tuple[Any, dict[str, Any]]:
    """A page with a panel for every metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    size = (max(columns * PANEL[0], 7.0), rows * PANEL[1] + 0.9)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # renders in memory; no window, no global state
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in grid[len(metrics) :]:
        spare.set_axis_off()
    panels = dict(zip(metrics, grid, strict=False))
    for metric, axes in panels.items():
        kind, _, name = metric.partition(".")
        axes.set_title(f"{kind}: {name.replace('_', ' ')}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(axis="y", color="#E3E6EA", lw=0.7)
        axes.set_axisbelow(True)
    return figure, panels


def _plot_line(axes: Any, name: str, points: Sequence[tuple[float, Summary]], *, bars: bool = False) -> None:
    """Means as a line with markers; intervals, where there are some, as a band or as bars."""
    if not points:
        return
    xs, means = [x for x, _ in points], [score["mean"] for _, score in points]
    color, dashes = COLORS[name], "--" if "-" in name else "-"  # Stream-T1 without a unit is dashed
    axes.plot(xs, means, marker="o", ms=3, lw=1.4, ls=dashes, color=color, label=name)
    if any(score["low"] is None for _, score in points):
        return
    lows, highs = [score["low"] for _, score in points], [score["high"] for _, score in points]
    if bars or len(points) == 1:
        axes.vlines(xs, lows, highs, color=color, lw=1.1)
    else:
        axes.fill_between(xs, lows, highs, color=color, alpha=0.13, lw=0)


def _save(figure: Any, panels: dict[str, Any], path: str | Path) -> None:
    handles, names = next(iter(panels.values())).get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), fontsize=8, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": SOFTWARE})
