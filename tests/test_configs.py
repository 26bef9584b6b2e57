"""The shipped config files: true to the defaults, and with no key that nothing uses."""

import dataclasses
from pathlib import Path

import pytest

import configs
from streamt1_jax.config import RunConfig, SearchConfig
from streamt1_jax.settings import KEYS, load_settings

FILES = sorted(path for path in Path(configs.__file__).parent.glob("*.py") if path.stem != "__init__")


def file(name):
    return next(path for path in FILES if path.stem == name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_loads(path):
    """Which also means that it has no unknown key."""
    assert load_settings(path).generate.seed == 42


def test_stream_t1_is_the_default_spelt_out():
    settings = load_settings(file("stream_t1"))
    assert settings.run == RunConfig()
    assert settings.generate == dataclasses.replace(load_settings().generate, seconds=5.0)
    text = file("stream_t1").read_text()
    unset = {"search.short_mean_window", "search.short_reward_frames"}  # None
    unset |= {"generate.frames", "generate.height", "generate.width"}  # None
    unset |= {"rewards.dir", "rewards.device"}  # None
    assert {key for key in KEYS if f"config.{key} = " not in text} == unset


def test_longlive_is_the_same_step_with_one_candidate():
    run = load_settings(file("longlive")).run
    assert run == dataclasses.replace(RunConfig(), search=SearchConfig.longlive())
    assert run.search.grid == (1, 1)
    assert run.appended_chunks == 0
