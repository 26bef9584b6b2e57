"""The embedded model as it ships: what it was trained for, it can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from flax import nnx

from streamt1_jax import SearchConfig, StreamT1Pipeline
from streamt1_jax.config import ModelConfig
from streamt1_jax.mini import shipped
from streamt1_jax.mini.checks import check_video
from streamt1_jax.mini.world import Scene, background_picture, held_out_scenes
from streamt1_jax.networks import network_graph

SCENES = held_out_scenes(4)


def psnr(video: np.ndarray, right: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pixels, in dB."""
    return float(10 * np.log10(255**2 / np.mean((video.astype(float) - right.astype(float)) ** 2)))


def test_the_package_stays_small():
    assert sum(path.stat().st_size for path in shipped.FOLDER.iterdir()) <= 16 * 2**20


@pytest.mark.slow
def test_the_vae_brings_back_held_out_clips():
    graph, abstract = network_graph(ModelConfig.mini(), "vae", jnp.float32)
    params = shipped.load_mini(shipped.FOLDER, "vae", abstract)

    @jax.jit
    def code(params, video):
        vae = nnx.merge(graph, params)
        return vae.decoder.decode(vae.encoder.encode(video))

    found = []
    for scene in SCENES:
        right = worlds.film(scene, frames=33)
        decoded = np.asarray(code(params, jnp.asarray(right / 127.5 - 1, jnp.float32)))
        found.append(psnr(np.round(decoded * 255), right))
    assert min(found) > 25, found
    assert np.mean(found) > 28, found


def empty_video(scene: Scene, shape: tuple[int, ...]) -> np.ndarray:
    """The right background, and nothing before it."""
    return np.broadcast_to(background_picture(scene.background), shape).astype(np.uint8)


@pytest.fixture(scope="module")
def videos() -> list[np.ndarray]:
    pipe = StreamT1Pipeline.from_pretrained("mini")
    return [pipe(s.caption(), frames=33, seed=1, search=SearchConfig.longlive()).frames for s in SCENES]


@pytest.mark.slow
def test_a_generated_video_shows_what_its_caption_says(videos):
    made = [check_video(video, scene).mean for video, scene in zip(videos, SCENES, strict=True)]
    others = [check_video(video, scene).mean for video, scene in zip(videos, SCENES[1:] + SCENES[:1], strict=True)]
    noise = np.random.default_rng(0).integers(0, 256, videos[0].shape, np.uint8)
    random = [check_video(noise, scene).mean for scene in SCENES]
    assert min(made) > max(random), (made, random)
    empty = [check_video(empty_video(scene, videos[0].shape), scene).mean for scene in SCENES]
    assert all(np.array(made) > np.array(empty)), (made, empty)
    assert np.mean(made) > np.mean(others) + 0.1, (made, others)
