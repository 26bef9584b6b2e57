"""A benchmark's report for people: one table, and the ratio of two reports."""

from typing import Any

from streamt1_jax.bench import MEANING, STAGES


def bench_table(report: dict[str, Any]) -> str:
    """Milliseconds of a steady chunk by stage, a column for each number of candidates, and what follows from them."""
    runs = report["runs"]
    machine, size = report["machine"], report["size"]
    lines = [
        f"{machine['device']} x{machine['devices']} ({machine['processor']}, {machine['cpus']} cores, load "
        f"{machine['load']:.1f}), jax {machine['jax']}, {report['dtype']}, attention "
        f"{report['attention']}, {size['width']}x{size['height']}, random weights, {report['repeats']} warm runs of "
        f"{report['chunks']} chunks: median (lowest to highest)",
        f"rewards: {' and '.join(report['rewards'])}; no text encoder and no file in a chunk",
        f"matrix products reach {report['matmul_peak_flop_per_second'] / 1e12:.3g} TFLOP/s; "
        f"text: {_ms(report['text_seconds'])} ms, {MEANING['text']}",
        "",
        _row("milliseconds a chunk", [f"{run['grid'][0]}x{run['grid'][1]} candidates" for run in runs]),
    ]
    for stage in STAGES:
        lines.append(_row(f"{stage}: {MEANING[stage]}", [_ms(run["stage_seconds"][stage]) for run in runs]))
    lines += [
        _row("stages, summed", [f"{1e3 * _stage_sum(run):.1f}" for run in runs]),
        _row("the whole chunk, one program", [_ms(run["chunk_seconds"]) for run in runs]),
        _row("stages over the whole", [f"{run['stages_over_chunk']:.3f}" for run in runs]),
        _row("the first chunk", [_ms(run["first_chunk_seconds"]) for run in runs]),
        _row("last 3 chunks over the first 3 full ones", [f"{run['late_over_early']:.3f}" for run in runs]),
        "",
    ]
    for name in runs[0]["frames_per_second"]:
        lines.append(_row(f"frames/s, {name}", [f"{run['frames_per_second'][name]:.1f}" for run in runs]))
    peak = report["matmul_peak_flop_per_second"]
    for name in runs[0]["flop"]:
        shares = [f"{run['flop'][name] / 1e12:.3g} / {100 * run['flop_per_second'][name] / peak:.0f} %" for run in runs]
        lines.append(_row(f"TFLOP by formula / utilisation, {name}", shares))
    lines += [
        "",
        _row("seconds to compile, cold", [f"{run['compile_seconds']['cold']:.1f}" for run in runs]),
        _row("seconds to compile, from the cache", [f"{run['compile_seconds']['warm']:.1f}" for run in runs]),
        _row("programs compiled while timing", [str(run["compiled_while_timing"]) for run in runs]),
        _row("MB to the host a chunk", [f"{run['host_bytes'] / 1e6:.2f}" for run in runs]),
        _row("GB at most so far", [_memory(run["peak_bytes"]) for run in runs]),
    ]
    return "\n".join(lines)


def compare_table(report: dict[str, Any], earlier: dict[str, Any]) -> str:
    """How much longer each stage takes than in an earlier report, for the numbers of candidates that both have."""
    before = {run["candidates"]: run for run in earlier["runs"]}
    pairs = [(run, before[run["candidates"]]) for run in report["runs"] if run["candidates"] in before]
    lines = [
        f"against {earlier['machine']['device']}, jax {earlier['machine']['jax']}, {earlier['dtype']}: time now / then",
        _row("", [f"{run['candidates']} candidates" for run, _ in pairs]),
    ]
    for stage in STAGES:
        ratios = (run["stage_seconds"][stage]["median"] / old["stage_seconds"][stage]["median"] for run, old in pairs)
        lines.append(_row(stage, [f"{ratio:.3f}" for ratio in ratios]))
    whole = (run["chunk_seconds"]["median"] / old["chunk_seconds"]["median"] for run, old in pairs)
    return "\n".join([*lines, _row("the whole chunk", [f"{ratio:.3f}" for ratio in whole])])


def _row(name: str, cells: list[str]) -> str:
    return f"{name:48}" + "".join(f"{cell:>26}" for cell in cells)


def _ms(spread: dict[str, float]) -> str:
    return f"{1e3 * spread['median']:.1f} ({1e3 * spread['low']:.1f} to {1e3 * spread['high']:.1f})"


def _stage_sum(run: dict[str, Any]) -> float:
    return sum(spread["median"] for spread in run["stage_seconds"].values())


def _memory(peak: dict[str, int]) -> str:
    return ", ".join(f"{size / 1e9:.2f} ({where})" for where, size in peak.items())
