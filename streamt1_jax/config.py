"""Every setting of the system: frozen dataclasses, checked when made.

A config that breaks several rules raises one error that lists them all. Released sizes are named constructors.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from streamt1_jax.errors import BadInputError

PATCH = 2  # The DiT's patch is one latent frame by 2x2 latent pixels, in every published size.
MAX_SEED = 2**32  # Seeds are unsigned 32-bit numbers; derived seeds wrap there.


def _check(name: str, rules: list[tuple[bool, str]]) -> None:
    """Raises one `BadInputError` with the text of every rule that does not hold."""
    broken = [text for holds, text in rules if not holds]
    if broken:
        raise BadInputError(f"{name}: " + "; ".join(broken))


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _are_sizes(*values: Any) -> bool:
    """Whether a rule about these fields together makes sense yet; each has its own rule as well."""
    return all(_is_int(value, 1) for value in values)


def _size_rules(config: Any, *keys: str) -> list[tuple[bool, str]]:
    values = {key: getattr(config, key) for key in keys}
    return [
        (_is_int(value, 1), f"{key} is {value!r}, expected an integer of at least 1") for key, value in values.items()
    ]


def _eps_rule(eps: Any) -> tuple[bool, str]:
    return _is_positive(eps), f"eps is {eps!r}, expected a number above 0"


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the causal Wan DiT, in the names of the published `config.json` (METHOD section 2)."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6

    def __post_init__(self):
        dim, heads, freq_dim = self.dim, self.num_heads, self.freq_dim
        _check(
            "dit",
            [
                *_size_rules(self, *(f.name for f in dataclasses.fields(self) if f.name != "eps")),
                _eps_rule(self.eps),
                (
                    not _are_sizes(dim, heads) or dim % (2 * heads) == 0,
                    f"dim {dim} does not split into {heads} heads of an even size",
                ),
                (not _are_sizes(freq_dim) or freq_dim % 2 == 0, f"freq_dim {freq_dim} is odd"),
                (
                    not _are_sizes(self.in_dim, self.out_dim) or self.in_dim == self.out_dim,
                    f"in_dim {self.in_dim} differs from out_dim {self.out_dim}",
                ),
            ],
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def wan_1_3b(cls) -> "DiTConfig":
        return cls()

    @classmethod
    def wan_14b(cls) -> "DiTConfig":
        return cls(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the causal Wan VAE (METHOD section 7)."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)

    def __post_init__(self):
        mults, temporal = self.dim_mult, self.temporal_downsample
        _check(
            "vae",
            [
                (_is_int(self.dim, 2) and self.dim % 2 == 0, f"dim is {self.dim!r}, expected an even integer"),
                *_size_rules(self, "z_dim", "num_res_blocks"),
                (
                    isinstance(mults, tuple) and _are_sizes(*mults),
                    f"dim_mult is {mults!r}, expected integers of at least 1",
                ),
                (
                    isinstance(temporal, tuple) and all(isinstance(t, bool) for t in temporal),
                    f"temporal_downsample is {temporal!r}, expected True or False for each",
                ),
                (
                    not (isinstance(mults, tuple) and isinstance(temporal, tuple)) or len(mults) == len(temporal) + 1,
                    f"{mults!r} of dim_mult needs one temporal_downsample less, not {temporal!r}",
                ),
            ],
        )

    @property
    def space_factor(self) -> int:
        """Pixels to a latent pixel, in height and in width."""
        return 2 ** len(self.temporal_downsample)

    @property
    def time_factor(self) -> int:
        """Pixel frames to a latent frame, after the first."""
        return 2 ** sum(self.temporal_downsample)


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of the UMT5 encoder (METHOD section 8)."""

    vocab_size: int = 256384
    dim: int = 4096
    num_heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10240
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self):
        sizes = (f.name for f in dataclasses.fields(self) if f.name != "eps")
        _check("text", [*_size_rules(self, *sizes), _eps_rule(self.eps)])


@dataclass(frozen=True)
class ModelConfig:
    """The three networks of one checkpoint, and the size of video they were made for."""

    dit: DiTConfig = field(default_factory=DiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: UMT5Config = field(default_factory=UMT5Config)
    height: int = 480
    width: int = 832
    timestep_shift: float = 5.0  # of the few-step schedule that the DiT was trained at

    def __post_init__(self):
        multiple = PATCH * self.vae.space_factor
        _check(
            "model",
            [
                (
                    self.dit.in_dim == self.vae.z_dim,
                    f"dit.in_dim {self.dit.in_dim} differs from vae.z_dim {self.vae.z_dim}",
                ),
                (
                    self.dit.text_dim == self.text.dim,
                    f"dit.text_dim {self.dit.text_dim} differs from text.dim {self.text.dim}",
                ),
                (
                    _is_positive(self.timestep_shift),
                    f"timestep_shift is {self.timestep_shift!r}, expected a number above 0",
                ),
                *(
                    (
                        _is_int(size, multiple) and size % multiple == 0,
                        f"{key} is {size!r}, expected a multiple of {multiple}",
                    )
                    for key, size in (("height", self.height), ("width", self.width))
                ),
            ],
        )

    @classmethod
    def wan_1_3b(cls) -> "ModelConfig":
        return cls()

    @classmethod
    def wan_14b(cls) -> "ModelConfig":
        return cls(dit=DiTConfig.wan_14b())

    @classmethod
    def tiny(cls) -> "ModelConfig":
        """For tests and quick looks: every part is there and nothing takes long."""
        return cls(
            dit=DiTConfig(dim=96, ffn_dim=160, num_heads=4, num_layers=3, freq_dim=32, text_dim=48, text_len=16),
            vae=VAEConfig(dim=8),
            text=UMT5Config(vocab_size=1024, dim=48, num_heads=4, head_dim=12, ffn_dim=96, num_layers=2),
            height=64,
            width=96,
        )

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """The sizes named `1.3b`, `14b`, `mini` or `tiny`."""
        sizes = {"1.3b": cls.wan_1_3b, "14b": cls.wan_14b, "mini": cls.mini, "tiny": cls.tiny}
        if name not in sizes:
            raise BadInputError(f"preset {name!r} is unknown, expected one of {', '.join(sizes)}")
        return sizes[name]()

    @classmethod
    def mini(cls) -> "ModelConfig":
        """The embedded model: the same three architectures, 128x80 pixels.

        Its schedule is less noisy than Wan's: the more tokens a frame has, the more noise it takes to hide as much
        (Esser et al. 2024, arXiv:2403.03206, section 5.3.2), and here are 40 for 1560. With a shift of 5 three of the
        four steps said where things are, and one what they look like; 5/3 was chosen by a trial.
        """
        return cls(
            dit=DiTConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=6, freq_dim=64, text_dim=128, text_len=64),
            vae=VAEConfig(dim=8, dim_mult=(1, 2, 4, 8), num_res_blocks=1),
            text=UMT5Config(vocab_size=1024, dim=128, num_heads=4, head_dim=32, ffn_dim=256, num_layers=2),
            height=80,
            width=128,
            timestep_shift=5 / 3,
        )


@dataclass(frozen=True)
class StreamConfig:
    """The chunk loop: few-step schedule, window and sink (METHOD sections 1 and 3). Lengths in latent frames."""

    latent_frames_per_chunk: int = 3
    local_attn_size: int = 12  # sink + window + the chunk itself
    sink_size: int = 3
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    timestep_shift: float | None = None  # None: that of the weights, 5 for Wan's
    context_noise: float = 0.0
    global_sink: bool = True  # at a prompt switch the sinks are kept; False: replaced too (METHOD section 9)

    def __post_init__(self):
        steps = self.denoising_steps
        # Lengths in chunks mean nothing while the chunk has no length.
        f = self.latent_frames_per_chunk if _is_int(self.latent_frames_per_chunk, 1) else 1
        _check(
            "stream",
            [
                *_size_rules(self, "latent_frames_per_chunk"),
                (
                    _is_int(self.sink_size, f) and self.sink_size % f == 0,
                    f"sink_size is {self.sink_size!r}, expected a whole number of chunks of {f} frames, at least one",
                ),
                (
                    _is_int(self.local_attn_size, 1) and self.local_attn_size % f == 0,
                    f"local_attn_size is {self.local_attn_size!r}, expected a whole number of chunks of {f} frames",
                ),
                (
                    not (_is_int(self.local_attn_size, 1) and _is_int(self.sink_size, 1))
                    or self.local_attn_size >= self.sink_size + f,
                    f"local_attn_size {self.local_attn_size} leaves no room for a chunk of {f} "
                    f"beside sink_size {self.sink_size}",
                ),
                (
                    isinstance(steps, tuple)
                    and len(steps) > 0
                    and all(_is_int(s, 1) and s <= 1000 for s in steps)
                    and all(a > b for a, b in itertools.pairwise(steps)),
                    f"denoising_steps is {steps!r}, expected falling integers from 1000 to 1",
                ),
                (
                    self.timestep_shift is None or _is_positive(self.timestep_shift),
                    f"timestep_shift is {self.timestep_shift!r}, expected a number above 0, or None",
                ),
                (
                    _is_number(self.context_noise, 0, 1000),
                    f"context_noise is {self.context_noise!r}, expected 0 to 1000",
                ),
                (
                    isinstance(self.global_sink, bool),
                    f"global_sink is {self.global_sink!r}, expected True or False",
                ),
            ],
        )

    @property
    def sink_chunks(self) -> int:
        return self.sink_size // self.latent_frames_per_chunk

    @property
    def local_chunks(self) -> int:
        """Chunks in `local_attn_size`: as many as a prompt switch can recache."""
        return self.local_attn_size // self.latent_frames_per_chunk

    @property
    def window_chunks(self) -> int:
        """Past chunks that a chunk attends to beside the sinks."""
        return self.local_chunks - self.sink_chunks - 1


@dataclass(frozen=True)
class SearchConfig:
    """The test-time search (METHOD sections 4 to 6). The defaults are the released ones."""

    beams: int = 2  # "top_k" in the released code
    candidates_per_beam: int = 2  # "beam_size" in the released code
    noise_propagation: bool = True
    pruning: bool = True  # False: one candidate
    sinking: bool = True  # False: every evicted chunk is discarded
    noise_fusion_sigma: float = -0.1
    sliding_window_size: int = 10  # chunks that the long score sees
    short_score_fusion_cap: float = 0.4
    short_threshold: float = 0.0
    long_threshold: float = 0.2
    short_mean_window: int | None = None  # chunks in the mean of the short score; None: all earlier ones
    max_sink_size: int = 15  # latent frames
    ema_alpha: float = 0.999
    sink_dtype: str = "float32"  # or "bfloat16", which rounds most of an EMA with alpha 0.999 away
    short_reward_frames: int | None = None  # frames of a chunk that the short reward is shown; None: all
    decode: str = "streaming"  # or "window", as released

    def __post_init__(self):
        positive = ("beams", "candidates_per_beam", "sliding_window_size", "max_sink_size")
        rules = _size_rules(self, *positive)
        rules += [
            (isinstance(getattr(self, key), bool), f"{key} is {getattr(self, key)!r}, expected True or False")
            for key in ("noise_propagation", "pruning", "sinking")
        ]
        ranges = {
            "noise_fusion_sigma": (-1.0, 1.0),
            "short_score_fusion_cap": (0.0, 1.0),
            "ema_alpha": (0.0, 1.0),
            "short_threshold": (-math.inf, math.inf),
            "long_threshold": (-math.inf, math.inf),
        }
        rules += [
            (
                _is_number(getattr(self, key), low, high),
                f"{key} is {getattr(self, key)!r}, expected a number from {low:g} to {high:g}",
            )
            for key, (low, high) in ranges.items()
        ]
        window = self.short_mean_window
        rules.append(
            (
                window is None or _is_int(window, 1),
                f"short_mean_window is {window!r}, expected None or an integer of at least 1",
            )
        )
        shown = self.short_reward_frames
        rules.append(
            (
                shown is None or _is_int(shown, 1),
                f"short_reward_frames is {shown!r}, expected None or an integer of at least 1",
            )
        )
        rules.append(
            (
                self.sink_dtype in ("float32", "bfloat16"),
                f"sink_dtype is {self.sink_dtype!r}, expected 'float32' or 'bfloat16'",
            )
        )
        rules.append(
            (
                self.decode in ("streaming", "window"),
                f"decode is {self.decode!r}, expected 'streaming' or 'window'",
            )
        )
        _check("search", rules)

    @property
    def grid(self) -> tuple[int, int]:
        """(B, K) as run: without pruning there is one beam of one candidate."""
        return (self.beams, self.candidates_per_beam) if self.pruning else (1, 1)

    @classmethod
    def longlive(cls) -> "SearchConfig":
        """Plain LongLive streaming: one candidate, fresh noise, every eviction dropped (METHOD section 9)."""
        return cls(beams=1, candidates_per_beam=1, noise_propagation=False, sinking=False)


def grid_of(candidates: int) -> tuple[int, int]:
    """(beams, candidates of each) for a number of candidates a chunk: 1 -> 1x1, 2 -> 1x2, 3 -> 1x3, 4 -> 2x2, 8 -> 2x4.

    Two beams of one candidate each would never meet a choice before the end; so two candidates share a beam.
    """
    return (2, candidates // 2) if candidates >= 4 and candidates % 2 == 0 else (1, candidates)


def check_sinks(chunk: int, sink_size: int, max_sink_size: int) -> None:
    """What the two sections must agree on; latent frames.

    Raises:
        BadInputError: room for fewer sinks than there are at the start, or for a part of a chunk.
    """
    _check(
        "search",
        [
            (max_sink_size >= sink_size, f"max_sink_size {max_sink_size} is below stream.sink_size {sink_size}"),
            (
                max_sink_size % chunk == 0,
                f"max_sink_size {max_sink_size} is not a whole number of chunks of {chunk} latent frames",
            ),
        ],
    )


@dataclass(frozen=True)
class RunConfig:
    """One run: what is asked of a checkpoint."""

    stream: StreamConfig = field(default_factory=StreamConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self):
        check_sinks(self.stream.latent_frames_per_chunk, self.stream.sink_size, self.search.max_sink_size)

    @property
    def appended_chunks(self) -> int:
        """Room for appended sinks, in chunks; none where sinking is off."""
        if not self.search.sinking:
            return 0
        return (self.search.max_sink_size - self.stream.sink_size) // self.stream.latent_frames_per_chunk

    @property
    def cache_slots(self) -> int:
        """Chunks that the KV cache can hold: sinks, window, appended sinks."""
        return self.stream.sink_chunks + self.stream.window_chunks + self.appended_chunks
