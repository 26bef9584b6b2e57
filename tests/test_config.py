"""The frozen configs: sizes that follow, and one error that lists every bad field (FAULTS row 8)."""

import dataclasses
import math

import pytest

from streamt1_jax.config import DiTConfig, ModelConfig, RunConfig, SearchConfig, StreamConfig, UMT5Config, VAEConfig
from streamt1_jax.errors import BadInputError

CONFIGS = [DiTConfig, VAEConfig, UMT5Config, ModelConfig, StreamConfig, SearchConfig, RunConfig]


def message(make, **fields) -> str:
    with pytest.raises(BadInputError) as caught:
        make(**fields)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_defaults_are_legal_and_frozen(config):
    made = config()
    assert made == config()
    assert hash(made) == hash(config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(made)[0].name, 1)


def test_defaults_are_the_released_ones():
    assert DiTConfig() == DiTConfig.wan_1_3b() == ModelConfig.wan_1_3b().dit
    assert DiTConfig.wan_1_3b().head_dim == DiTConfig.wan_14b().head_dim == 128
    assert (StreamConfig().sink_chunks, StreamConfig().window_chunks) == (1, 2)
    assert RunConfig().cache_slots == 1 + 2 + 4
    assert (VAEConfig().space_factor, VAEConfig().time_factor) == (8, 4)
    search = SearchConfig()
    assert (search.beams, search.candidates_per_beam, search.noise_fusion_sigma) == (2, 2, -0.1)
    assert (search.short_threshold, search.long_threshold, search.short_mean_window) == (0.0, 0.2, None)
    assert (search.sliding_window_size, search.short_score_fusion_cap) == (10, 0.4)
    assert (search.max_sink_size, search.ema_alpha, search.decode) == (15, 0.999, "streaming")


BAD = {
    DiTConfig: {"dim": 0, "num_heads": 2.0, "freq_dim": 33, "eps": 0, "in_dim": 0, "out_dim": True},
    VAEConfig: {"dim": 3, "z_dim": 0, "num_res_blocks": "2", "dim_mult": (1, 0), "temporal_downsample": (1, 0)},
    UMT5Config: {"vocab_size": -1, "dim": 1.5, "num_layers": None, "eps": math.nan},
    ModelConfig: {"height": 100, "width": -832},
    StreamConfig: {
        "latent_frames_per_chunk": 0,
        "local_attn_size": "12",
        "sink_size": 0,
        "denoising_steps": (250, 500),
        "timestep_shift": math.nan,
        "context_noise": -1,
    },
    SearchConfig: {
        "beams": 0,
        "candidates_per_beam": 1.0,
        "noise_propagation": 1,
        "pruning": None,
        "sinking": "yes",
        "noise_fusion_sigma": 1.01,
        "sliding_window_size": 0,
        "short_score_fusion_cap": -0.1,
        "short_threshold": math.nan,
        "long_threshold": math.nan,
        "short_mean_window": 0,
        "max_sink_size": True,
        "ema_alpha": 1.5,
        "decode": "both",
    },
}


@pytest.mark.parametrize("config", BAD, ids=lambda c: c.__name__)
def test_one_error_lists_every_bad_field(config):
    text = message(config, **BAD[config])
    missing = [key for key in BAD[config] if key not in text]
    assert not missing, f"not named: {missing}, in: {text}"


@pytest.mark.parametrize(
    ("config", "field"), [(config, field) for config, fields in BAD.items() for field in fields], ids=str
)
def test_each_bad_field_alone_is_refused_with_its_value(config, field):
    value = BAD[config][field]
    text = message(config, **{field: value})
    assert field in text
    assert repr(value) in text or str(value) in text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0000001, "0.1", None, True], ids=str)
def test_sigma_outside_its_range(value):
    assert "noise_fusion_sigma" in message(SearchConfig, noise_fusion_sigma=value)


@pytest.mark.parametrize("value", [-1, 1, -1.0, 0, 0.5])
def test_sigma_inside_its_range(value):
    assert SearchConfig(noise_fusion_sigma=value).noise_fusion_sigma == value


@pytest.mark.parametrize(
    ("config", "fields", "both"),
    [
        (StreamConfig, {"sink_size": 4}, ("4", "3")),
        (StreamConfig, {"local_attn_size": 13}, ("13", "3")),
        (StreamConfig, {"local_attn_size": 3}, ("local_attn_size 3", "sink_size 3")),
        (StreamConfig, {"sink_size": 12}, ("local_attn_size 12", "sink_size 12")),
        (StreamConfig, {"denoising_steps": (1000, 1000)}, ("denoising_steps",)),
        (StreamConfig, {"denoising_steps": (1001, 500)}, ("denoising_steps",)),
        (StreamConfig, {"denoising_steps": (500, 0)}, ("denoising_steps",)),
        (StreamConfig, {"denoising_steps": ()}, ("denoising_steps",)),
        (StreamConfig, {"denoising_steps": [1000, 500]}, ("denoising_steps",)),
        (RunConfig, {"search": SearchConfig(max_sink_size=2)}, ("max_sink_size 2", "sink_size 3")),
        (RunConfig, {"search": SearchConfig(max_sink_size=16)}, ("max_sink_size 16", "3")),
        (RunConfig, {"stream": StreamConfig(sink_size=18, local_attn_size=21)}, ("max_sink_size 15", "sink_size 18")),
        (DiTConfig, {"dim": 1530}, ("1530", "12")),
        (DiTConfig, {"dim": 12, "num_heads": 4}, ("12", "4")),  # heads of an odd size cannot be rotated
        (DiTConfig, {"in_dim": 32}, ("32", "16")),
        (VAEConfig, {"dim_mult": (1, 2)}, ("(1, 2)", "(False, True, True)")),
        (VAEConfig, {"dim_mult": 4}, ("4",)),
        (ModelConfig, {"vae": VAEConfig(z_dim=48)}, ("16", "48")),
        (ModelConfig, {"text": UMT5Config(dim=2048)}, ("4096", "2048")),
        (ModelConfig, {"height": 488}, ("488", "16")),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_fields_that_disagree_are_both_named(config, fields, both):
    text = message(config, **fields)
    assert all(part in text for part in both), text


def test_without_pruning_there_is_one_candidate():
    assert SearchConfig(beams=4, candidates_per_beam=3).grid == (4, 3)
    assert SearchConfig(beams=4, candidates_per_beam=3, pruning=False).grid == (1, 1)


def test_without_sinking_there_is_no_room_for_sinks():
    run = RunConfig(search=SearchConfig(sinking=False))
    assert (run.appended_chunks, run.cache_slots) == (0, 3)


def test_longlive_is_plain_streaming():
    search = SearchConfig.longlive()
    assert search.grid == (1, 1)
    assert (search.noise_propagation, search.sinking) == (False, False)


def test_slots_of_other_layouts():
    stream = StreamConfig(latent_frames_per_chunk=2, sink_size=4, local_attn_size=6)
    run = RunConfig(stream, SearchConfig(max_sink_size=10))
    assert (stream.sink_chunks, stream.window_chunks, run.appended_chunks, run.cache_slots) == (2, 0, 3, 5)
