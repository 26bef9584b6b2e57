"""The whole search once more, after docs/METHOD.md alone: NumPy and Python lists, one candidate at a time.

The networks and rewards are those of `fake_generator.py`, by their own formulas in float64.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from fake_generator import DIM, LAYERS, STEPS, TIME, C, F, FakeParams, H, W


@dataclass
class Chunk:
    """A committed chunk as later chunks see it; keys are kept as they are before rotation."""

    start: int  # its first latent frame, which is its position for ever
    k: np.ndarray  # [LAYERS, F, DIM]
    v: np.ndarray
    number: int = -1


@dataclass
class Beam:
    sinks: list[Chunk] = field(default_factory=list)
    window: list[Chunk] = field(default_factory=list)
    routes: dict[int, str] = field(default_factory=dict)  # by number of chunk, for the day it is evicted
    noise: np.ndarray | None = None
    seeds: list[int] = field(default_factory=list)
    shorts: list[float] = field(default_factory=list)
    longs: list[float] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)

    def copy(self) -> "Beam":
        chunks = ([Chunk(c.start, c.k, c.v, c.number) for c in pool] for pool in (self.sinks, self.window))
        return Beam(
            *chunks,
            dict(self.routes),
            self.noise,
            list(self.seeds),
            list(self.shorts),
            list(self.longs),
            list(self.latents),
        )


@dataclass
class Candidate:
    chunk: int
    parent: int
    seed: int
    short: float
    long: float
    score: float
    ema: bool
    append: bool
    sink_starts: list[int]
    latents: np.ndarray
    noise: np.ndarray
    kept: int | None = None


@dataclass
class Result:
    candidates: list[list[Candidate]]  # of each chunk, in the order tried
    evicted: list[list[tuple[int, str] | None]]  # of each chunk and kept beam: what leaves when the next chunk begins
    beams: list[list[Beam]]  # of each chunk: the kept beams
    closest: float  # the smallest difference that decided a pick or a flag


def turn(x: np.ndarray, frame: int) -> np.ndarray:
    """One head's vector at a frame (row and column 0): its first pair is a complex number, turned by the frame."""
    x = np.array(x, np.float64)
    pair = complex(x[0], x[1]) * np.exp(1j * frame)  # theta of the first pair of an axis is 1
    x[0], x[1] = pair.real, pair.imag
    return x


def text_of(prompt: np.ndarray) -> float:
    return float(np.tanh(np.asarray(prompt, np.float64).sum(axis=0)).mean())


class ReferenceSearch:
    """METHOD sections 3 to 6.

    Args:
        draws: the draws of a seed, (initial [f, C, h, w], renoise [steps - 1, f, C, h, w]).
        settings: names and meanings of `SearchConfig`; `sinks`, `window`, `max_sinks` in chunks; `global_sink`.
    """

    def __init__(self, params: FakeParams, prompt: np.ndarray, draws: Callable, prompt_index: int = 0, **settings):
        self.params = FakeParams(*(np.asarray(x, np.float64) for x in params))
        self.text = text_of(prompt)
        self.draws, self.prompt_index, self.s = draws, prompt_index, settings
        self.closest = math.inf

    # The networks

    def attend(self, beam: Beam, start: int) -> np.ndarray:
        seen = beam.sinks + beam.window
        total = np.zeros(DIM)
        if not seen:
            return total
        for layer in range(LAYERS):
            query = turn(self.params.query[layer], start)
            keys = np.array([turn(c.k[layer, j], c.start + j) for c in seen for j in range(F)])
            values = np.array([c.v[layer, j] for c in seen for j in range(F)])
            weights = np.exp(keys @ query - (keys @ query).max())
            total += weights / weights.sum() @ values
        return total

    def denoise(self, initial: np.ndarray, renoise: np.ndarray, beam: Beam, start: int) -> np.ndarray:
        drift = (self.params.mix @ self.attend(beam, start)).reshape(C, H, W) + self.text + 0.05 * start
        x = initial
        for i in range(STEPS):
            x = np.tanh(self.params.step[i] * x + drift)
            if i < STEPS - 1:
                x = x + 0.5 * renoise[i]
        return x

    def context(self, latents: np.ndarray, beam: Beam, start: int, number: int) -> Chunk:
        flat = latents.reshape(len(latents), -1)
        past = 0.3 * self.attend(beam, start)
        k = np.stack([flat @ self.params.key[layer].T + self.text for layer in range(LAYERS)])
        v = np.stack([flat @ self.params.value[layer].T + past for layer in range(LAYERS)])
        return Chunk(start, k, v, number)

    def decode(self, chunks: list[np.ndarray]) -> np.ndarray:
        """A whole video from a fresh decoder."""
        state, frames = np.zeros((C, H, W)), []
        for frame in np.concatenate(chunks):
            state = 0.5 * state + frame
            picture = np.einsum("chw,cr->hwr", state, self.params.colour)
            frames += [1 / (1 + np.exp(-self.params.time[t] * picture)) for t in range(TIME if frames else 1)]
        return np.array(frames)

    def short_reward(self, video: np.ndarray) -> float:
        return 12 * np.sin(5 * video).mean() + self.prompt_index / 8

    def long_reward(self, video: np.ndarray) -> float:
        return 9 * np.mean([np.cos(t) * frame.mean() for t, frame in enumerate(video)])

    # The search

    def run(self, seed: int, chunks: int, switches: dict[int, tuple[np.ndarray, int]] | None = None) -> Result:
        """Args: switches: chunk -> (prompt, its index), from that chunk on."""
        beams = [Beam() for _ in range(self.beams)]
        candidates, evicted, kept_beams = [], [], []
        for chunk in range(chunks):
            if switches and chunk in switches:
                prompt, self.prompt_index = switches[chunk]
                self.text = text_of(prompt)
                for beam in beams:
                    self.recache(beam, chunk)
            tried = [c for b, beam in enumerate(beams) for c in self.candidates(beam, b, chunk, chunks, seed)]
            order = sorted(range(len(tried)), key=lambda i: (-tried[i].score, i))
            self.note(*(tried[a].score - tried[b].score for a, b in itertools.pairwise(order)))
            parents, beams = beams, []
            for rank, i in enumerate(order[: self.beams]):
                tried[i].kept = rank
                beams.append(self.commit(parents[tried[i].parent], tried[i], chunk))
            candidates.append(tried)
            kept_beams.append([beam.copy() for beam in beams])
            evicted.append([self.begin(beam) for beam in beams])
        return Result(candidates, evicted, kept_beams, self.closest)

    def recache(self, beam: Beam, chunk: int) -> None:
        """METHOD section 9; an appended sink is a sink, and goes the way of the first one."""
        first, window = self.s["sinks"], self.s["window"]
        local = first + window + 1
        replaced = not self.s["global_sink"] or chunk <= local
        count = min(chunk, local) if replaced else window + 1
        begin = chunk - count
        seen = Beam() if replaced else Beam(sinks=beam.sinks)
        group = self.context(np.concatenate(beam.latents[begin:]), seen, begin * F, begin)
        places = [(begin + i, slice(i * F, (i + 1) * F)) for i in range(count)]
        fresh = [Chunk(number * F, group.k[:, at], group.v[:, at], number) for number, at in places]
        if replaced:
            beam.sinks, fresh = fresh[:first], fresh[first:]
        beam.window = fresh[max(len(fresh) - window, 0) :]

    @property
    def beams(self) -> int:
        return self.s["beams"] if self.s["pruning"] else 1

    @property
    def per_beam(self) -> int:
        return self.s["candidates_per_beam"] if self.s["pruning"] else 1

    def note(self, *differences: float) -> None:
        """Remembers how close a decision was; a tie to the last bit decides nothing."""
        self.closest = min([self.closest, *(abs(d) for d in differences)])

    def begin(self, beam: Beam) -> tuple[int, str] | None:
        """The next chunk begins: where the window is full, its oldest chunk is evicted and routed."""
        if len(beam.window) <= self.s["window"]:
            return None
        oldest = beam.window.pop(0)
        route = beam.routes[oldest.number] if self.s["sinking"] else "discard"
        if route == "append" and len(beam.sinks) >= self.s["max_sinks"]:
            route = "ema"
        if route == "append":
            beam.sinks.append(oldest)
        elif route == "ema":
            sink, a = beam.sinks[-1], self.s["ema_alpha"]
            mixed = Chunk(sink.start, a * sink.k + (1 - a) * oldest.k, a * sink.v + (1 - a) * oldest.v, sink.number)
            beam.sinks[-1] = mixed
        return oldest.number, route

    def candidates(self, beam: Beam, b: int, chunk: int, chunks: int, seed: int) -> list[Candidate]:
        start = chunk * F
        made = []
        for i in range(self.per_beam):
            if chunk == 0:
                number = seed + b * self.per_beam + i
            elif i == 0 and self.s["noise_propagation"]:
                number = beam.seeds[-1]
            else:
                number = seed + 1000 * chunk + 100 * b + i
            number %= 2**32
            initial, renoise = self.draws(number)
            if chunk > 0 and self.s["noise_propagation"]:
                sigma = self.s["noise_fusion_sigma"]
                initial = sigma * beam.noise + math.sqrt(1 - sigma**2) * initial
            latents = self.denoise(initial, renoise, beam, start)
            made.append(self.judge(beam, b, chunk, chunks, number, initial, latents))
        return made

    def judge(self, beam, b, chunk, chunks, seed, noise, latents) -> Candidate:
        history = [*beam.latents, latents]
        size = self.s["sliding_window_size"]
        if self.s["decode"] == "window":
            short_video, long_video = self.decode([latents]), self.decode(history[-size:])
        else:  # every frame decoded once, in the stream of its own beam
            stream = self.decode(history)
            short_video = stream[0 if chunk == 0 else TIME * F * chunk - (TIME - 1) :]
            first = max(0, chunk + 1 - size)
            long_video = stream[0 if first == 0 else TIME * F * first - (TIME - 1) :]
        short, long = self.short_reward(short_video), self.long_reward(long_video)

        start, f, total = chunk * F, F, chunks * F
        alpha = min(start / (total - f), self.s["short_score_fusion_cap"]) if total > f else 0.0
        score = alpha * short + (1 - alpha) * long
        ema, append = self.flags(beam, chunk, short, long)
        starts = [sink.start for sink in beam.sinks[self.s["sinks"] :]]
        return Candidate(chunk, b, seed, short, long, score, ema, append, starts, latents, noise)

    def flags(self, beam: Beam, chunk: int, short: float, long: float) -> tuple[bool, bool]:
        if chunk == 0:
            return False, False
        window = self.s["short_mean_window"]
        earlier = beam.shorts if window is None else beam.shorts[-window:]
        rise = short - np.mean(earlier) - self.s["short_threshold"]
        fall = beam.longs[-1] - long - self.s["long_threshold"]
        self.note(rise, fall)
        short_high, long_low = rise > 0, fall > 0
        return bool(short_high and not long_low), bool(short_high and long_low)

    def commit(self, parent: Beam, won: Candidate, chunk: int) -> Beam:
        beam = parent.copy()
        stored = self.context(won.latents, parent, chunk * F, chunk)
        pool = beam.sinks if chunk < self.s["sinks"] else beam.window
        pool.append(stored)
        beam.routes[chunk] = "append" if won.append else "ema" if won.ema else "discard"
        beam.noise = won.noise
        beam.seeds.append(won.seed)
        beam.shorts.append(won.short)
        beam.longs.append(won.long)
        beam.latents.append(won.latents)
        return beam
