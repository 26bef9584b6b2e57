"""A benchmark's report for people: one table, and the ratio of two reports."""

import json
from typing import Any

from streamt1_jax.stages import NAMES

MEANING = {
    "propose": "DiT denoise, all steps of all candidates",
    "watch": "VAE decode of all candidates",
    "judge": "rewards",
    "select": "pick and gather the kept beams",
    "recall": "DiT context pass of the kept beams",
    "commit": "write the caches, route what leaves",
    "host": "record to the host",
}

# What two reports must share if their ratio is to be that of the code or of the machine.
ALIKE = ("model", "run", "dtype", "devices", "attention", "rewards")


def bench_table(report: dict[str, Any]) -> str:
    """Milliseconds of a steady chunk by stage, a column for each number of candidates, and what follows from them."""
    runs, machine, size = report["runs"], report["machine"], report["size"]
    prompt, search = report["prompt"], report["run"]["search"]
    one_device = report["matmul_peak_flop_per_second"]
    peak = report["devices"] * one_device
    lines = [
        f"{machine['device']} x{machine['devices']} ({machine['processor']}, {machine['cpus']} cores, load "
        f"{machine['load']:.1f}), jax {machine['jax']}, {report['dtype']}, attention "
        f"{report['attention']}, {size['width']}x{size['height']}, random weights, {report['repeats']} warm runs of "
        f"{report['chunks']} chunks: median (lowest to highest)",
        f"every lane: devices: {report['devices']}; rewards: {' and '.join(report['rewards'])}; {search['decode']} "
        f"decode, candidates decoded {runs[0]['decoded']}; sinking {'on' if search['sinking'] else 'off'}; no text "
        "encoder and no file in a chunk",
        f"matrix products reach {report['matmul_peak_flop_per_second'] / 1e12:.3g} TFLOP/s on one device",
        "once a prompt: "
        + "; ".join(
            f"{meaning}: {_ms(prompt[name]['seconds'])} ms, {prompt[name]['flop'] / 1e12:.3g} TFLOP, "
            f"{100 * prompt[name]['flop'] / prompt[name]['seconds']['median'] / one_device:.0f} %"
            for name, meaning in (("text", "text encoder"), ("prepare", "cross-attention keys and values"))
        ),
        "",
        _row("milliseconds a chunk", [f"{run['grid'][0]}x{run['grid'][1]} candidates" for run in runs]),
    ]
    for stage in NAMES:
        lines.append(_row(f"{stage}: {MEANING[stage]}", [_ms(run["stage_seconds"][stage]) for run in runs]))
    first = prompt["first_frames_seconds"]
    lines += [
        _row("stages, summed", [f"{1e3 * _stage_sum(run):.1f}" for run in runs]),
        _row("the whole chunk, one program", [_ms(run["chunk_seconds"]) for run in runs]),
        _row("stages over the whole", [f"{run['stages_over_chunk']:.3f}" for run in runs]),
        _row("the first chunk", [_ms(run["first_chunk_seconds"]) for run in runs]),
        _row("prompt's tokens to first frames, warm", [_ms(first[str(run["candidates"])]) for run in runs]),
        _row(_late(runs[0]["late_over_early"]), [f"{run['late_over_early']['ratio']:.3f}" for run in runs]),
        _row("sink chunks appended, of room for", [_sinks(run["appended_sinks"]) for run in runs]),
        "",
    ]
    for name in runs[0]["frames_per_second"]:
        lines.append(_row(f"frames/s, {name}", [f"{run['frames_per_second'][name]:.1f}" for run in runs]))
    for name in runs[0]["flop"]:
        shares = [f"{run['flop'][name] / 1e12:.3g} / {100 * run['flop_per_second'][name] / peak:.0f} %" for run in runs]
        lines.append(_row(f"TFLOP by formula / utilisation, {name}", shares))
    return "\n".join([*lines, "", *_costs(runs)])


def _costs(runs: list[dict[str, Any]]) -> list[str]:
    """Compilation, transfers and memory."""
    plans = [run["step_bytes"] for run in runs]
    return [
        _row("seconds to compile all programs, cold", [f"{run['compile_seconds']['cold']:.1f}" for run in runs]),
        _row("seconds to find them in the cache", [f"{run['compile_seconds']['warm']:.1f}" for run in runs]),
        _row("programs compiled while timing", [str(run["compiled_while_timing"]) for run in runs]),
        _row("MB to the host a chunk", [f"{run['host_bytes'] / 1e6:.2f}" for run in runs]),
        *(
            _row(f"GB of the compiled step, a device: {part}", [f"{plan[part] / 1e9:.3f}" for plan in plans])
            for part in (plans[0] if all(plans) else ())
        ),
        _row("GB at most, this lane or one to its left", [_memory(run["peak_bytes"]) for run in runs]),
    ]


def compare_table(report: dict[str, Any], earlier: dict[str, Any]) -> str:
    """How much longer each stage takes than in an earlier report, for the numbers of candidates that both have."""
    before = {run["candidates"]: run for run in earlier["runs"]}
    pairs = [(run, before[run["candidates"]]) for run in report["runs"] if run["candidates"] in before]
    now, then = (json.loads(json.dumps({key: each.get(key) for key in ALIKE})) for each in (report, earlier))
    other = [key for key in ALIKE if now[key] != then[key]]
    lines = [
        f"against {earlier['machine']['device']}, jax {earlier['machine']['jax']}, {earlier['dtype']}: time now / then"
        + (f"; NOT ALIKE: {', '.join(other)}" if other else ""),
        _row("", [f"{run['candidates']} candidates" for run, _ in pairs]),
    ]
    for stage in NAMES:
        ratios = (run["stage_seconds"][stage]["median"] / old["stage_seconds"][stage]["median"] for run, old in pairs)
        lines.append(_row(stage, [f"{ratio:.3f}" for ratio in ratios]))
    whole = (run["chunk_seconds"]["median"] / old["chunk_seconds"]["median"] for run, old in pairs)
    return "\n".join([*lines, _row("the whole chunk", [f"{ratio:.3f}" for ratio in whole])])


def _late(found: dict[str, Any]) -> str:
    (a, b), (c, d) = found["late"], found["early"]
    return f"chunks {a} to {b} over {c} to {d}, from 0"


def _sinks(found: dict[str, Any]) -> str:
    return f"{found['mean']:.1f} of {found['room']}"


def _row(name: str, cells: list[str]) -> str:
    return f"{name:48}" + "".join(f"{cell:>26}" for cell in cells)


def _ms(spread: dict[str, float]) -> str:
    return f"{1e3 * spread['median']:.1f} ({1e3 * spread['low']:.1f} to {1e3 * spread['high']:.1f})"


def _stage_sum(run: dict[str, Any]) -> float:
    return sum(spread["median"] for spread in run["stage_seconds"].values())


def _memory(peak: dict[str, int]) -> str:
    return ", ".join(f"{size / 1e9:.2f} ({where})" for where, size in peak.items())
