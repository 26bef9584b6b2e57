"""Runs of the command line that are stopped on the way, for test_resume.py; each in a process of its own.

Usage: resumable_run.py FOLDER PLAN.json. The plan is a list of runs, {"argv": [...], "stop": null or {...}}, done in
order; what became of each is printed as a line of JSON. A stop is a signal: some seconds after a chunk is there
(`chunk`, `delay`), while the video is encoded (`encoding`), or after so many renames of the results (`writing`).

Processes are forked before JAX makes any thread, so that everything is imported once.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from small import SMALL_IN_TIME, SmallWeights

import streamt1_jax
from streamt1_jax import cli, generate, pipeline, publish, weights
from streamt1_jax.progress import Progress


def send_later(number: int, delay: float) -> None:
    timer = threading.Timer(delay, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def arm(stop: dict[str, Any]) -> None:
    """Puts the signal in place."""
    if "chunk" in stop:
        show = Progress.show

        def shown(self, result):
            show(self, result)
            if not result.restored and result.chunk.index >= stop["chunk"] and not stop.get("sent"):
                stop["sent"] = True
                send_later(stop["signal"], stop["delay"])

        Progress.show = shown
    if "writing" in stop:
        rename, done = Path.rename, [0]

        def renamed(self, target):
            # In the main thread and at once: a handler of Python's runs before the next line.
            moves_result = publish._KIND in f"{self}{target}"
            if moves_result and done[0] == stop["writing"]:
                os.kill(os.getpid(), stop["signal"])
            done[0] += moves_result
            return rename(self, target)

        Path.rename = renamed
    if "encoding" in stop:
        from streamt1_jax import video

        encode = video._encode

        def encoded(path, frames, rate):
            path.write_bytes(b"half a video")
            os.kill(os.getpid(), stop["signal"])
            encode(path, frames, rate)

        video._encode = encoded


def run(argv: list[str], stop: dict[str, Any] | None) -> int:
    def find_weights(name_or_dir):
        return SmallWeights(SMALL_IN_TIME, seed=int(os.environ.get("WEIGHTS_SEED", "0")))

    class SmallPipeline(pipeline.StreamT1Pipeline):
        @classmethod
        def from_pretrained(cls, name_or_dir, **options):
            return cls(find_weights(name_or_dir))

    weights.find_weights = find_weights
    vars(streamt1_jax)["StreamT1Pipeline"] = SmallPipeline
    save = generate.save_result

    def save_with_arrays(out, paths, **options):
        save(out, paths, **options)
        np.savez(paths.video.with_suffix(".npz"), latents=out.latents, frames=out.frames)

    generate.save_result = save_with_arrays
    if stop is not None:
        arm(stop)
    return cli.main(["generate", *argv])


def main() -> None:
    folder, plan = sys.argv[1:]
    os.chdir(folder)
    for number, entry in enumerate(json.loads(Path(plan).read_text())):
        os.environ.update(entry.get("environment", {}))
        pid = os.fork()
        if pid == 0:
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            code = 1
            try:
                code = run(entry["argv"], entry["stop"])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        left = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
        saved = sorted(str(path) for path in Path().glob("*.resume/*"))
        seen = Path(f"seen-{number}")
        seen.mkdir()
        for name, data in left.items():
            (seen / name).write_bytes(data)
        result = {"code": os.waitstatus_to_exitcode(status), "left": sorted(left), "saved": saved}
        for name in ("out", "err"):
            result[name] = Path(f"{number}.{name}").read_text()
            Path(f"{number}.{name}").unlink()
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
