"""The `streamt1` command.

- Exit codes: 0 done, 1 a mismatch or another failure, 2 bad input, 3 weights, 4 out of memory, 130 interrupted.
- An error is one line on stderr: what came, what was expected, what to do. STREAMT1_DEBUG=1 shows the traceback.
- Everything a user typed is checked before JAX is imported, let alone weights are loaded.
"""

import argparse
import contextlib
import os
import statistics
import sys
import traceback
import typing
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from streamt1_jax.cli_bench import add_bench, add_doctor
from streamt1_jax.cli_compare import add_compare
from streamt1_jax.cli_score import add_score, reward_overrides
from streamt1_jax.cli_train import add_train_mini
from streamt1_jax.config import RunConfig
from streamt1_jax.errors import BadInputError, OutOfMemoryError, StreamT1Error
from streamt1_jax.interrupts import Interrupts
from streamt1_jax.settings import load_settings

if TYPE_CHECKING:
    from streamt1_jax import Output
    from streamt1_jax.generate import Job

INTERRUPTED = 130
FAILED = 1
SHUTDOWN_SECONDS = 24 * 3600  # how long a host that is done waits for the others


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage and leaving."""

    def error(self, message: str) -> typing.NoReturn:
        raise BadInputError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; prints at most one line of error."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with warnings.catch_warnings(), Interrupts() as interrupts:
        warnings.showwarning = _show_warning
        try:
            args = _build_parser(convert=argv[:1] == ["convert"]).parse_args(argv)
            args.interrupts = interrupts
            return args.run(args)
        except SystemExit as leaving:  # argparse after --help
            return int(leaving.code or 0)
        except KeyboardInterrupt as stop:
            return _fail(": ".join(["interrupted", *map(str, stop.args)]), INTERRUPTED)
        except StreamT1Error as error:
            return _fail(str(error), error.exit_code)
        except Exception as error:
            if _is_out_of_memory(error):
                return _fail(
                    f"{_first_line(error)}; free the device, or use one with more memory", OutOfMemoryError.exit_code
                )
            what = f"{type(error).__name__}: {error}"
            return _fail(f"{what}; this is a fault of the program: set STREAMT1_DEBUG=1 to see where", FAILED)


def _fail(message: str, code: int) -> int:
    if os.environ.get("STREAMT1_DEBUG") == "1":
        traceback.print_exc()
    print(f"streamt1: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"streamt1: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _build_parser(*, convert: bool) -> argparse.ArgumentParser:
    """The parser of all commands; the options of `convert` only where asked, since they live beside torch."""
    parser = _Parser(prog="streamt1", description="Streaming video generation with test-time search, in JAX.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    with _torch_required():
        if convert:
            from convert.cli import add_convert_parser

            add_convert_parser(commands)
            commands.choices["convert"].set_defaults(run=_run_convert)
        else:
            commands.add_parser("convert", help="convert PyTorch checkpoints")
    add_compare(commands)
    add_bench(commands)
    add_doctor(commands)
    add_score(commands)
    add_train_mini(commands)
    parity = commands.add_parser("parity", help="replay a recorded PyTorch run and compare")
    parity.add_argument("case", help="CASE.safetensors, with CASE.json beside it, or a folder of the reward models")
    parity.set_defaults(run=_run_parity)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="make a video from a prompt",
        description="Makes OUT.mp4, the record of its search OUT.json, a picture OUT.png, and a page OUT.html.",
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="what the video shows")
    add(
        "--prompts-file",
        metavar="FILE",
        help="one prompt per line instead, switches below it as `@5.25s prompt`; --out is then a folder",
    )
    add("--out", required=True, metavar="PATH", help="the video's name, ending in .mp4; with --prompts-file a folder")
    add("--overwrite", action="store_true", help="replace an earlier result of that name")
    add("--resume", action="store_true", help="go on with a run that was stopped, to the same bits")
    add("--no-state", action="store_true", help="do not save the state of every chunk: the run cannot be resumed")
    add(
        "--switch",
        action="append",
        default=[],
        metavar="TIME=PROMPT",
        help='show another prompt from then on: 5.25s="a blue square"; repeatable',
    )
    add("--live", action="store_true", help="let OUT.live.mp4 grow, to be watched while the video is made")
    add(
        "--checkpoint", default="mini", metavar="DIR", help="a converted checkpoint (default: mini, the embedded model)"
    )
    add("--config", metavar="FILE", help="a Python file with get_config(), such as configs/stream_t1.py; it is run")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one setting, such as search.beams=4; repeatable",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", help="length; the nearest legal number of frames is made (default: 5)")
    length.add_argument("--frames", help="length in pixel frames, 12k - 3: 9, 21, ..., 81 (5 s), ..., 477 (30 s)")
    add("--seed", help="0 to 4294967295 (default: 42)")
    add("--height", help="pixels, a multiple of 16 (default: as the weights were trained)")
    add("--width", help="pixels, a multiple of 16 (default: as the weights were trained)")
    add(
        "--rewards",
        metavar="DIR|SHORT[,LONG]",
        help="a folder of converted rewards (HPSv3 and VideoReward), or the two rewards by name "
        "(default: mini for the embedded model, native for others)",
    )
    add("--reward-device", metavar="DEVICE", help="of torch rewards: cuda:1, cuda:0, cpu (default: the first GPU)")
    add("--strict", action="store_true", help="refuse a prompt that is too long instead of cutting it")
    add("--allow-cpu", action="store_true", help="run a full-size model without a GPU (very slow)")
    add("--devices", type=int, default=1, metavar="N", help="devices of this machine that share the candidates")
    add("--coordinator", metavar="HOST:PORT", help="share a prompts file over --hosts machines, met at this address")
    add("--hosts", type=int, default=1, metavar="N", help="how many machines share the prompts file")
    add("--host", type=int, default=0, metavar="I", help="which of them this is, from 0")
    add("--progress", action="store_true", help="show the progress bar even where stderr is no terminal")
    parser.set_defaults(run=_run_generate)


def _overrides(args: argparse.Namespace) -> list[str]:
    """The flags as further `--set` texts, so that one parser reads them all."""
    texts = [*reward_overrides(args.rewards, args.reward_device, args.set)]
    if args.frames is not None:
        texts.append("generate.seconds=none")  # of the config file
    if args.seconds is not None:
        texts.append("generate.frames=none")
    for key in ("seconds", "frames", "seed", "height", "width"):
        value = getattr(args, key)
        if value is not None:
            texts.append(f"generate.{key}={value}")
    return [*texts, "generate.strict=true"] if args.strict else texts


def _run_generate(args: argparse.Namespace) -> int:
    from streamt1_jax.generate import generate, plan_jobs

    settings = load_settings(args.config, _overrides(args))
    jobs, skipped = plan_jobs(args, settings)
    if skipped:
        _show_warning(f"{args.prompts_file}: {skipped} blank lines skipped, {len(jobs)} prompts left")
    if args.devices < 1:
        raise BadInputError(f"--devices is {args.devices}, expected at least 1")

    from streamt1_jax import StreamT1Pipeline
    from streamt1_jax.compile_cache import enable_compilation_cache
    from streamt1_jax.rewards.choice import check_choice, leave_room, make_rewards
    from streamt1_jax.sharding import candidate_mesh
    from streamt1_jax.weights import find_weights

    published = check_choice(settings.rewards)
    if published is not None:
        leave_room(settings, lambda: find_weights(args.checkpoint).config, published)
    enable_compilation_cache()
    jobs = _of_this_host(args, jobs)
    for job in jobs:
        if job.finished:
            print(f"video   {job.paths.video} (finished before)")
    missing = [job for job in jobs if not job.finished]
    if not missing:
        return 0
    if args.devices > 1:
        candidate_mesh(settings.run.search, args.devices)  # before the weights are loaded
    with _memory_advice(settings.run):
        pipe = StreamT1Pipeline.from_pretrained(args.checkpoint, allow_cpu=args.allow_cpu, devices=args.devices)
        prompts = [prompt for job in missing for prompt in job.script.prompts]
        pipe.encode(prompts, strict=settings.generate.strict)  # the text encoder is loaded once
        rewards = (settings.rewards.short, settings.rewards.long)
        if settings.rewards.dir is not None or settings.rewards.device is not None:
            rewards = make_rewards(settings.rewards, pipe.prompts, published, pipe.weights)
        for number, job in enumerate(jobs, start=1):
            if job in missing:
                label = f"{number}/{len(jobs)}" if args.prompts_file else job.paths.video.name
                _tell(job, generate(pipe, job, settings, rewards, label, args))
            if args.interrupts.requested:  # while the last chunk of a video was made, which is complete now
                raise KeyboardInterrupt
    return 0


def _tell(job: "Job", out: "Output") -> None:
    """What is there now, a line a file."""
    for name, path in zip(("video", "record", "tree", "report"), job.paths.results, strict=True):
        print(f"{name:7} {path}")
    print(f"weights {out.info['weights']['summary']}")
    seconds = out.info["seconds"]
    steady = seconds["chunks"][2:]  # the first two compile
    print(
        f"time    {seconds['total']:.1f} s for {len(out.frames) / out.fps:.1f} s of video"
        + (f"; {statistics.median(steady):.3f} s a chunk after the first two" if steady else "")
    )
    if saving := out.info.get("saving"):
        print(
            f"saving  {saving['seconds_per_chunk']:.3f} s a chunk for a state of {saving['state_bytes'] / 1e6:.1f} MB"
        )
    sys.stdout.flush()


def _of_this_host(args: argparse.Namespace, jobs: list["Job"]) -> list["Job"]:
    """Every N-th prompt, where N machines share them. The machines meet at the start and wait for each other at the
    end; a video is made by one of them alone, so its result does not depend on how many there are."""
    if args.coordinator is None:
        if (args.hosts, args.host) != (1, 0):
            raise BadInputError("--hosts and --host came without --coordinator: give the address of host 0 to all")
        return jobs
    name, _, port = args.coordinator.rpartition(":")
    if not name or not port.isdecimal():
        raise BadInputError(f"--coordinator is {args.coordinator!r}, expected HOST:PORT: try 10.0.0.1:1234")
    if args.hosts < 1 or not 0 <= args.host < args.hosts:
        raise BadInputError(
            f"--hosts is {args.hosts} and --host {args.host}, expected at least one host, and a host below that number"
        )
    if args.prompts_file is None:
        raise BadInputError("--coordinator came without --prompts-file: one prompt cannot be shared over machines")
    import jax

    jax.distributed.initialize(
        args.coordinator, num_processes=args.hosts, process_id=args.host, shutdown_timeout_seconds=SHUTDOWN_SECONDS
    )
    return jobs[jax.process_index() :: jax.process_count()]


@contextlib.contextmanager
def _memory_advice(run: RunConfig) -> Iterator[None]:
    """Turns the device's running out of memory into an error that names two settings to lower."""
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        search, stream = run.search, run.stream
        lower = {
            "search.candidates_per_beam": (
                search.candidates_per_beam,
                search.pruning and search.candidates_per_beam > 1,
            ),
            "search.beams": (search.beams, search.pruning and search.beams > 1),
            "search.max_sink_size": (search.max_sink_size, run.appended_chunks > 0),
            "stream.local_attn_size": (stream.local_attn_size, run.stream.window_chunks > 0),
        }
        names = [f"{name} (now {value})" for name, (value, possible) in lower.items() if possible]
        first, second, *_ = [*names, "generate.height", "generate.width"]
        raise OutOfMemoryError(f"{_first_line(error)}; lower {first} or {second}") from error


def _is_out_of_memory(error: Exception) -> bool:
    # JAX has renamed this class twice; the status code in its text stays.
    from_xla = any(cls.__name__ in ("JaxRuntimeError", "XlaRuntimeError") for cls in type(error).__mro__)
    return isinstance(error, MemoryError) or (from_xla and "RESOURCE_EXHAUSTED" in str(error))


def _first_line(error: Exception) -> str:
    return "out of memory: " + (str(error).strip() or type(error).__name__).splitlines()[0]


def _run_convert(args: argparse.Namespace) -> int:
    with _torch_required():
        from convert.cli import run_convert

        return run_convert(args)


@contextlib.contextmanager
def _torch_required() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torch":
            raise
        raise StreamT1Error(
            "PyTorch is not installed, expected it to read PyTorch checkpoints: pip install 'streamt1-jax[torch]'"
        ) from error


def _run_parity(args: argparse.Namespace) -> int:
    from streamt1_jax.compile_cache import enable_compilation_cache
    from streamt1_jax.parity import run_parity

    enable_compilation_cache()
    return run_parity(args.case)


if __name__ == "__main__":
    sys.exit(main())
