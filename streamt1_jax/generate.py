"""`streamt1 generate`: what to make and where it goes, one video at a time, and what is left when it stops early."""

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt1_jax.errors import BadInputError, RewardError
from streamt1_jax.outputs import (
    SOFTWARE,
    RunPaths,
    check_beside,
    folder_outputs,
    make_folder,
    single_output,
    write_errors,
    write_json,
)
from streamt1_jax.progress import Progress
from streamt1_jax.publish import sweep_results, write_together
from streamt1_jax.run_info import asked, differences, normal
from streamt1_jax.run_store import RunStore, holds_run, is_known, sweep_run
from streamt1_jax.segments import Script, Segment, parse_switch, plan_switches, scripts_of_lines
from streamt1_jax.settings import Settings, chunks_of
from streamt1_jax.text import check_prompt, read_prompts_file

if TYPE_CHECKING:
    from streamt1_jax import ChunkResult, Output, StreamT1Pipeline


@dataclass(frozen=True)
class Job:
    """One video to make."""

    script: Script
    paths: RunPaths
    asked: dict[str, Any] = field(default_factory=dict)  # of this video, as plain data
    finished: bool = False  # an earlier run has made it


def plan_jobs(args: argparse.Namespace, settings: Settings) -> tuple[list[Job], int]:
    """What to make and where to put it, every prompt, switch and path checked; and blank lines skipped.

    Raises:
        BadInputError: a prompt, a switch or a path that cannot be used.
    """
    scripts, skipped = _read_scripts(args)
    run = settings.run
    chunks = chunks_of(settings.generate.num_frames(run.stream), run.stream)
    plans = [plan_switches(script.switches, run.stream, chunks) for script in scripts]
    if args.resume and args.coordinator is not None:
        raise BadInputError("--resume came with --coordinator, which saves no states: resume on one machine")
    if args.resume and args.overwrite:
        raise BadInputError("--resume goes on with a run and --overwrite begins anew, expected one of them")

    video = Path(args.out)
    sweep_results(video if args.prompts_file is not None else video.parent)

    def replaceable(paths: RunPaths, path: Path) -> bool:
        """A result that the run which is resumed has left, unfinished or finished."""
        return args.resume and (is_known(path, paths.resume) or _is_finished(paths))

    checks: dict[str, Any] = {"overwrite": args.overwrite, "replaceable": replaceable}
    if args.prompts_file is None:
        places = [single_output(args.out, **checks)]
    else:
        names = ["\n".join(script.prompts) for script in scripts]
        places = folder_outputs(args.out, names, **checks)
    jobs = [
        Job(script, paths, _asked(script, segments, chunks, settings), args.resume and _is_finished(paths))
        for script, segments, paths in zip(scripts, plans, places, strict=True)
    ]
    for job in jobs:
        if job.finished:
            _check_same_run(job, args.checkpoint, settings)
        _check_run_folder(job, args)
    for job in jobs:
        if job.finished:
            sweep_run(job.paths.resume)
    return jobs, skipped


def _read_scripts(args: argparse.Namespace) -> tuple[list[Script], int]:
    if (args.prompt is None) == (args.prompts_file is None):
        came = "neither a prompt nor a prompts file" if args.prompt is None else "a prompt and a prompts file"
        raise BadInputError(
            f'{came} came, expected one of them: streamt1 generate "a red circle moves right" --out out.mp4'
        )
    if args.prompts_file is None:
        return [Script(check_prompt(args.prompt), tuple(parse_switch(text) for text in args.switch))], 0
    if args.switch:
        raise BadInputError(
            "--switch came with --prompts-file, expected switches in the file: a line `@5.25s a new prompt` below "
            "the prompt it follows"
        )
    lines, skipped = read_prompts_file(args.prompts_file)
    return scripts_of_lines(lines), skipped


def _check_run_folder(job: Job, args: argparse.Namespace) -> None:
    folder = job.paths.resume
    if args.live:
        check_beside(job.paths.live, overwrite=args.overwrite or args.resume)
    if args.no_state:
        if args.resume:
            raise BadInputError("--resume goes on from saved states, which --no-state switches off: drop one of them")
        return
    with write_errors(folder):  # a name too long
        exists = folder.exists()
    if not exists or job.finished:
        return
    if not folder.is_dir() or (not holds_run(folder) and any(folder.iterdir())):
        raise BadInputError(f"{str(folder)!r} exists and was not made by {SOFTWARE}: move it or name another --out")
    if not args.resume and not args.overwrite:
        raise BadInputError(
            f"{str(folder)!r} holds an unfinished run of this name: go on with --resume, or begin anew with --overwrite"
        )


def _asked(script: Script, segments: Sequence[Segment], chunks: int, settings: Settings) -> dict[str, Any]:
    rewards = {name: getattr(settings.rewards, name) for name in ("short", "long", "dir", "precision")}
    return asked(script.prompt, segments, settings.generate.seed, chunks, settings.run) | {"rewards": rewards}


def _record_of(paths: RunPaths) -> dict[str, Any]:
    """The record beside a result, if this program wrote it."""
    try:
        record = json.loads(paths.record.read_text(encoding="utf-8"))
        return record if record["software"] == SOFTWARE else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_finished(paths: RunPaths) -> bool:
    """Whether all results of a complete run are there."""
    return all(path.is_file() for path in paths.results) and _record_of(paths).get("complete") is True


def _check_same_run(job: Job, checkpoint: str, settings: Settings) -> None:
    """Raises `BadInputError` with the difference where the results that are there are of another run."""
    from streamt1_jax.weights import find_weights

    weights = find_weights(checkpoint)
    size = {
        "height": settings.generate.height or weights.config.height,
        "width": settings.generate.width or weights.config.width,
    }
    record = _record_of(job.paths)
    ours = normal({**job.asked, "size": size, "weights": weights.describe()})
    if different := differences({**record, **record.get("asked", {})}, ours):
        raise BadInputError(
            f"{str(job.paths.video)!r} is of another run: {'; '.join(different)}; expected the same settings, weights "
            "and seed: give those, name another --out, or replace it with --overwrite in place of --resume"
        )


def generate(
    pipe: "StreamT1Pipeline", job: Job, settings: Settings, rewards: Any, label: str, args: argparse.Namespace
) -> "Output":
    """Makes one video and writes its results; the states saved for it go when it is complete.

    Args:
        rewards: of the pipeline's call: names, or rewards that are made already.

    Raises:
        KeyboardInterrupt: it was interrupted; what exists has been written, and the states stay.
        RewardError: a reward failed; the states stay.
    """
    wanted, run = settings.generate, settings.run
    frames = wanted.num_frames(run.stream)
    options: dict[str, Any] = {"switches": job.script.switches} if job.script.switches else {}
    make_folder(job.paths.video.parent)
    # Orbax makes all processes of a distributed run wait for each other, and these make different videos.
    stateless = args.no_state or args.coordinator is not None
    store = None if stateless else RunStore(job.paths.resume, resume=args.resume)
    if store is not None:
        options["store"] = store
    try:
        with (
            _live(job.paths.live if args.live else None) as show_live,
            Progress(chunks_of(frames, run.stream), label, forced=args.progress) as progress,
        ):

            def on_chunk(result: "ChunkResult") -> bool:
                show_live(result)
                progress.show(result)
                return args.interrupts.requested

            with args.interrupts.deferred():
                out = pipe(
                    job.script.prompt,
                    frames=frames,
                    seed=wanted.seed,
                    height=wanted.height,
                    width=wanted.width,
                    config=run,
                    rewards=rewards,
                    strict=wanted.strict,
                    on_chunk=on_chunk,
                    **options,
                )
        if store is not None:
            store.wait()
        save_result(out, job.paths, asked=job.asked, overwrite=args.overwrite, store=store)
        complete = out.info.get("complete", True)
        if store is not None and complete:
            store.clear()
    except RewardError as error:
        if store is None:
            raise
        store.wait()
        if not store.holds_state:
            raise
        raise RewardError(f"{error}; the chunks before are saved, the same command with --resume goes on") from error
    finally:
        if store is not None:
            store.close()
    if not complete:
        raise KeyboardInterrupt(
            f"{job.paths.video} holds the first {len(out.frames) / out.fps:.1f} s"
            + ("" if store is None else "; the same command with --resume goes on")
        )
    return out


@contextlib.contextmanager
def _live(path: Path | None) -> Iterator[Any]:
    """Yields what takes each chunk into a growing video, which goes when the finished one is to come."""
    if path is None:
        yield lambda result: None
        return
    from streamt1_jax.video import GrowingVideo

    video = GrowingVideo(path)
    try:
        yield lambda result: video.add(result.frames)
    finally:
        video.discard()


def save_result(
    out: "Output", paths: RunPaths, *, asked: dict[str, Any], overwrite: bool, store: RunStore | None = None
) -> None:
    """Writes the video, its record, the picture of its search and its report: all of them or, at a failure, none.

    Args:
        asked: goes into the record, by which a later `--resume` knows the run.
        store: results that its interrupted run has left may be replaced.
    """
    from streamt1_jax.page import save_report
    from streamt1_jax.report import save_search_tree
    from streamt1_jax.video import write_mp4

    if store is not None:
        overwrite = overwrite or all(not path.exists() or is_known(path, store.folder) for path in paths.results)
    with write_together(paths.results, overwrite=overwrite) as (video, record, tree, report):
        write_mp4(video, out.frames, out.fps)
        write_json(record, {"software": SOFTWARE, "asked": asked, **out.info, "trace": out.trace.to_json()})
        save_search_tree(out.trace, tree)
        save_report(report, out.trace, out.info, video.read_bytes(), out.fps)
        if store is not None:
            store.note_results({path.name: path for path in (video, record, tree, report)})
