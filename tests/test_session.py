"""Streams of the pipeline: endless, closed at any time, with prompts that change; runs that are saved and go on."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_equal
from small import SMALL, SmallWeights

from streamt1_jax import saved_state
from streamt1_jax.config import SearchConfig
from streamt1_jax.errors import BadInputError, RewardError
from streamt1_jax.noise import Draws, gaussian_noise
from streamt1_jax.pipeline import StreamT1Pipeline
from streamt1_jax.rewards import host_reward, per_video
from streamt1_jax.run_store import KEPT_STATES, RunStore
from streamt1_jax.trace import Switch

PROMPT, OTHER = "a red circle moves right", "a blue square spins"
FRAMES = 41  # 7 chunks of the small model
SECONDS = 23 / 16  # chunk 4 begins there
SEARCH = SearchConfig(short_threshold=-1.0, long_threshold=0.0001, max_sink_size=9)


@pytest.fixture(scope="module")
def pipe() -> StreamT1Pipeline:
    return StreamT1Pipeline(SmallWeights())


@pytest.fixture(scope="module")
def make(pipe):
    return functools.partial(pipe, PROMPT, frames=FRAMES, search=SEARCH, switches={SECONDS: OTHER})


@pytest.fixture(scope="module")
def whole(make):
    return make()


# --- streams


def test_an_endless_stream_gives_all_of_every_chunk(pipe):
    with pipe.stream(PROMPT, search=SEARCH) as stream:
        for index, result in enumerate(stream):
            assert result.frames.shape == (5 if index == 0 else 6, SMALL.height, SMALL.width, 3)
            assert len(result.candidates) == 4
            assert len(result.routes) == 2
            assert result.seconds > 0
            assert (result.prompt, result.chunk.index, stream.committed) == (PROMPT, index, index + 1)
            if index == 5:
                break
    assert result.routes[0] is not None
    assert list(stream) == []


def test_a_stream_can_be_closed_at_any_time(pipe):
    for chunks in (0, 1, 2):
        stream = pipe.stream(PROMPT, search=SEARCH)
        for _ in range(chunks):
            next(stream)
        stream.close()
        stream.close()
        assert not stream.open
        with pytest.raises(StopIteration):
            next(stream)
        for switch in (stream.switch_prompt, pipe.switch_prompt):
            with pytest.raises(BadInputError, match=r"pipe\.stream\(prompt\)"):
                switch(OTHER)


def test_a_stream_with_a_length_ends(pipe):
    stream = pipe.stream(PROMPT, frames=11, search=SEARCH)
    assert len(list(stream)) == 2
    assert not stream.open


def test_a_switch_between_chunks_is_the_planned_one(pipe, whole):
    """By hand, in the same bits as with `switches`; a call of the pipeline makes the same chunks."""
    stream, records = pipe.stream(PROMPT, frames=FRAMES, search=SEARCH), []
    for result in stream:
        records.append(result.record)
        assert result.prompt == (PROMPT if result.chunk.index < 4 else OTHER)
        if result.chunk.index == 2:
            pipe.switch_prompt("something else")
        if result.chunk.index == 2:
            stream.switch_prompt(PROMPT)  # the last one counts, and a switch to the same prompt is one too
        if result.chunk.index == 3:
            assert stream.prompt == PROMPT
            pipe.switch_prompt(OTHER)
            assert stream.prompt == OTHER
    assert [(switch.chunk, switch.prompt) for switch in stream.switches] == [(3, PROMPT), (4, OTHER)]

    planned = pipe.stream(PROMPT, frames=FRAMES, search=SEARCH, switches={17 / 16: PROMPT, SECONDS: OTHER})
    for ours, theirs in zip(records, [result.record for result in planned], strict=True):
        assert_equal("latents", ours.latents, theirs.latents)
    assert planned.switches == stream.switches
    assert whole.trace.switches == (Switch(4, OTHER, True),)  # 4 chunks reach back to the start
    assert whole.info["switches"] == [{"chunk": 4, "prompt": OTHER, "sinks_replaced": True}]


def test_a_switch_before_the_first_chunk_is_another_prompt(pipe):
    stream = pipe.stream(PROMPT, frames=11, search=SEARCH)
    stream.switch_prompt(OTHER)
    switched = [result.record.latents for result in stream]
    plain = [result.record.latents for result in pipe.stream(OTHER, frames=11, search=SEARCH)]
    assert_equal("latents", np.array(switched), np.array(plain))
    assert stream.switches == []


@pytest.mark.parametrize("prompt", ["", "  ", "x\0"])
def test_a_prompt_that_cannot_be_used_leaves_the_stream_alone(pipe, prompt):
    stream = pipe.stream(PROMPT, search=SEARCH)
    with pytest.raises(BadInputError, match="prompt"):
        stream.switch_prompt(prompt)
    assert stream.prompt == PROMPT
    assert next(stream).prompt == PROMPT


class Moody:
    """A reward on the host that does as a test wants; one for all of them, so that its programs are compiled once."""

    def __init__(self):
        self.seen: list[str] = []
        self.healthy, self.mood = math.inf, "well"

    def __call__(self, video: np.ndarray, prompt: str) -> float:
        self.seen.append(prompt)
        if len(self.seen) <= self.healthy:
            return float(video.mean())
        if self.mood == "not finite":
            return math.nan
        raise ZeroDivisionError("the model died")


@pytest.fixture(scope="module")
def moody_search(pipe):
    """(the reward, a call of the pipeline with it): 2 candidates; those of the seeds 7001 and so on are NaN."""
    moody = Moody()
    reward = host_reward("moody", per_video(moody), pipe.prompts)
    draw = gaussian_noise((3, 16, 8, 16), 4)

    def noise(seed) -> Draws:
        draws = draw(seed)
        return Draws(jnp.where((seed // 1000 == 7) & (seed % 2 == 1), jnp.nan, draws.initial), draws.renoise)

    one = SearchConfig(beams=1, candidates_per_beam=2)
    return moody, functools.partial(pipe, PROMPT, search=one, rewards=(reward, "native"), noise=noise)


@pytest.fixture
def moody(moody_search):
    vars(moody_search[0]).update(vars(Moody()))
    return moody_search


def test_rewards_read_the_prompt_of_the_chunk(moody):
    reward, make = moody
    out = make(frames=17, switches={5 / 16: OTHER})
    assert reward.seen == [PROMPT] * 2 + [OTHER] * 4
    assert math.isfinite(out.trace.final_scores[0])


# --- the same bits (row 29), prompts together or alone (row 30), latents that are not finite (row 13)


def test_row_29_the_same_seed_makes_the_same_bits(make, whole):
    again = make()
    assert again.info["sha256"] == whole.info["sha256"]
    assert again.trace.final_scores == whole.trace.final_scores
    assert make(seed=43).info["sha256"] != whole.info["sha256"]


def test_row_30_prompts_together_or_alone(pipe, make, whole):
    pipe.encode(["one", "two", PROMPT])
    pipe("another prompt before it", frames=11, search=SEARCH, seed=7)
    assert make().info["sha256"] == whole.info["sha256"]
    fresh = StreamT1Pipeline(SmallWeights())
    (alone,), together = fresh.encode([PROMPT]), pipe.encode(["another prompt before it", PROMPT])
    assert_equal("embeddings", alone, together[1])


def test_row_13_latents_that_become_nan_are_never_kept(moody):
    _, make = moody
    with pytest.warns(UserWarning, match="1 of 2 candidates of chunk 1 are not finite"):
        out = make(frames=11, seed=6000)
    flawed = [(c.candidate, c.finite, c.kept is not None) for c in out.trace.chunks[1].candidates]
    assert flawed == [(0, True, True), (1, False, False)]
    assert np.isfinite(out.latents).all()


# --- runs that are saved


def stop_after(chunks: int):
    count = iter(range(1, 1000))
    return lambda result: next(count) == chunks


@pytest.fixture
def half(make, tmp_path) -> Path:
    """The folder of a run that was stopped after 5 of 7 chunks, beyond the switch."""
    with RunStore(tmp_path / "out.resume") as store:
        out = make(store=store, on_chunk=stop_after(5))
    assert not out.info["complete"]
    assert len(out.frames) == 29
    return tmp_path / "out.resume"


def resume(make, folder: Path):
    with RunStore(folder, resume=True) as store:
        out = make(store=store)
        store.wait()
    return out


def same(out, whole) -> bool:
    return (out.info["sha256"], out.trace.final_scores, out.trace.switches) == (
        whole.info["sha256"],
        whole.trace.final_scores,
        whole.trace.switches,
    )


def test_a_run_goes_on_to_the_same_bits(make, whole, half):
    assert len(list(half.glob("state-*"))) == KEPT_STATES
    restored = []
    with RunStore(half, resume=True) as store:
        out = make(store=store, on_chunk=lambda result: restored.append(result.restored))
        store.clear()
    assert not half.exists()
    assert restored == [True] * 5 + [False] * 2
    assert same(out, whole)
    cost = out.info["saving"]
    assert cost["chunks"] == 2
    assert cost["seconds_per_chunk"] > 0


def test_a_finished_run_goes_on_to_its_end(make, whole, half):
    assert same(resume(make, half), whole)
    assert same(resume(make, half), whole)


def damage_state(half: Path, kind: str) -> None:
    """The newest one."""
    newest = sorted(half.glob("state-*"))[-1]
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    match kind:
        case "flipped":
            data[len(data) // 2] ^= 1
            largest.write_bytes(data)
        case "truncated":
            largest.write_bytes(data[: len(data) // 2])
        case "empty":
            largest.write_bytes(b"")
        case "emptied":
            shutil.rmtree(newest)
            newest.mkdir()
        case "notes":
            (newest / saved_state.NOTES).write_text((newest / saved_state.NOTES).read_text()[:-9])
        case "note changed":
            text = (newest / saved_state.NOTES).read_text().replace('"committed": 5', '"committed": 4')
            (newest / saved_state.NOTES).write_text(text)
        case "record flipped":
            path = half / "chunk-000004.npz"
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "record missing":
            (half / "chunk-000004.npz").unlink()


DAMAGE = ["flipped", "truncated", "empty", "emptied", "notes", "note changed", "record flipped", "record missing"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_state_is_passed_over(make, whole, half, kind):
    damage_state(half, kind)
    with pytest.warns(UserWarning, match="the state before it is used"):
        assert same(resume(make, half), whole)


@pytest.mark.filterwarnings("ignore:.*the state before it is used")
def test_two_damaged_states_are_an_error(make, half):
    for folder in half.glob("state-*"):
        (folder / saved_state.NOTES).unlink()
    with pytest.raises(BadInputError, match="none of the 2 states"):
        resume(make, half)


def test_states_of_a_run_that_nothing_describes_are_an_error(make, half):
    """Another run may have made them; going on would mix both."""
    (half / "run.json").unlink()
    before = sorted(half.iterdir())
    with pytest.raises(BadInputError, match=r"run\.json cannot be read"):
        resume(make, half)
    assert sorted(half.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 43}, "seed is 43, saved was 42"),
        ({"frames": 47}, "chunks is 8, saved was 7"),
        ({"switches": {}}, f"switches.4 is None, saved was '{OTHER}'"),
        ({"search": SearchConfig(beams=1)}, "search.beams is 1, saved was 2"),
        ({"rewards": ("native", "other:Reward")}, "other"),
    ],
    ids=["seed", "length", "prompt", "config", "reward"],
)
def test_row_23_another_run_is_refused_with_the_difference(pipe, make, half, change, words):
    before = sorted(path.name for path in half.iterdir())
    with RunStore(half, resume=True) as store, pytest.raises(BadInputError, match=words):
        make(**change, store=store)
    assert sorted(path.name for path in half.iterdir()) == before


def test_row_23_other_weights_are_refused(half):
    other = StreamT1Pipeline(SmallWeights(seed=1))
    words = r"weights.summary is 'random numbers of seed 1'"
    with RunStore(half, resume=True) as store, pytest.raises(BadInputError, match=words):
        other(PROMPT, frames=FRAMES, search=SEARCH, switches={SECONDS: OTHER}, store=store)


def test_another_machine_is_a_warning(make, whole, half):
    notes = json.loads((half / "run.json").read_text())
    notes["environment"]["versions"]["jax"] = "0.0.1"
    (half / "run.json").write_text(json.dumps(notes))
    with pytest.warns(UserWarning, match=r"saved was '0\.0\.1'.*not to the same bits"):
        assert same(resume(make, half), whole)


def test_nothing_to_resume_is_a_warning(make, whole, tmp_path):
    with pytest.warns(UserWarning, match="nothing to resume"):
        assert same(resume(make, tmp_path / "none.resume"), whole)


def test_a_folder_that_is_not_ours_is_left_alone(make, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for resume_it in (True, False):
        with pytest.raises(BadInputError, match="not made by this program"):
            make(store=RunStore(tmp_path, resume=resume_it))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_users_file_in_our_folder_is_left_alone(half):
    (half / "mine.txt").write_text("mine")
    store = RunStore(half)
    store._hold()
    store.clear()
    assert [path.name for path in half.iterdir()] == ["mine.txt"]


def test_two_processes_do_not_share_a_run(make, half):
    code = (
        "import sys, time; from pathlib import Path; from streamt1_jax.run_store import RunStore\n"
        "store = RunStore(Path(sys.argv[1]), resume=True); store._hold(); print('held', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    holder = subprocess.Popen([sys.executable, "-c", code, str(half)], stdout=subprocess.PIPE, env=environment)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with RunStore(half, resume=True) as store, pytest.raises(BadInputError, match="in use by another process"):
            make(store=store)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_row_21_a_full_disk_leaves_the_earlier_states(make, whole, half, monkeypatch):
    class Full:
        """An Orbax that meets a full disk after writing a part."""

        class args:
            PyTreeSave = staticmethod(lambda packed: packed)

        def save(self, folder, args):
            folder.mkdir()
            (folder / "part").write_bytes(b"x")
            raise OSError(28, "No space left on device")

        def __enter__(self):
            return self, self

        def __exit__(self, *_):
            return False

    before = sorted(path.name for path in half.glob("state-*"))
    load, orbax = saved_state.load_state, saved_state.orbax

    def load_with_orbax(*args):
        """What is there can be read; only writing fails."""
        monkeypatch.setattr(saved_state, "orbax", orbax)
        try:
            return load(*args)
        finally:
            monkeypatch.setattr(saved_state, "orbax", Full)

    monkeypatch.setattr(saved_state, "load_state", load_with_orbax)
    with pytest.raises(BadInputError, match="No space left"):
        resume(make, half)
    monkeypatch.undo()
    assert sorted(path.name for path in half.glob("state-*")) == before
    assert not list(half.glob(".state-*"))
    assert same(resume(make, half), whole)


@pytest.mark.parametrize("mood", ["raises", "not finite"])
def test_row_32_a_reward_that_fails_mid_run_leaves_the_state_saved(moody, tmp_path, mood):
    reward, make = moody
    reward.healthy, reward.mood = 6, mood
    words = "'moody' failed with ZeroDivisionError: the model died" if mood == "raises" else "no candidate of chunk 3"
    with RunStore(tmp_path / "out.resume") as store, pytest.raises(RewardError, match=words):
        make(frames=29, store=store)
    assert [path.name for path in sorted((tmp_path / "out.resume").glob("state-*"))] == ["state-000002", "state-000003"]

    reward.healthy = math.inf
    with RunStore(tmp_path / "out.resume", resume=True) as store:
        resumed = make(frames=29, store=store)
    assert resumed.info["sha256"] == make(frames=29).info["sha256"]
