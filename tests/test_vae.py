"""The Wan VAE against the recorded reference run and against diffusers, and its streaming against itself."""

import functools
import itertools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from convert.engine import abstract_params, convert, plan
from convert.sources import DictSource
from convert.vae_table import diffusers_vae_rules, wan_vae_rules
from streamt1_jax.config import VAEConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.models import conv
from streamt1_jax.models.conv import NARROW, causal_conv3d, next_past
from streamt1_jax.models.vae import LATENT_MEAN, LATENT_STD, Decoder, Encoder, WanVAE

DATA = Path(__file__).parent / "data"
GOLDEN_CONFIG = VAEConfig(dim=8)
# Two levels with time, two sizes of picture: the least that has every part.
SMALL = VAEConfig(dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True))
ATOL = 1e-4


def assert_close(name, ours, reference, atol):
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, f"{name}: shape {ours.shape}, expected {reference.shape}"
    error = np.abs(ours - reference)
    assert error.max() <= atol, f"{name}: max error {error.max():.3g}, mean {error.mean():.3g}, allowed {atol:.3g}"


def load_vae(config, tensors, rules, dtype=jnp.float32):
    """A `WanVAE` filled from a published state dict, through the real table and the real engine."""

    def make():
        return WanVAE(config, dtype=dtype, rngs=nnx.Rngs(0))

    source = DictSource(tensors)
    filled = dict(convert(plan(source.shapes, rules, abstract_params(make)), source, np.dtype(dtype)))
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    params = [
        (path, leaf.replace(jnp.asarray(filled[".".join(map(str, path))])))
        for path, leaf in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(params))


@nnx.jit
def decode(decoder, latents):
    return decoder.decode(latents)


@functools.partial(nnx.jit, static_argnames="first")
def decode_chunk(decoder, state, latents, first):
    return decoder.decode_chunk(state, latents, first)


@functools.partial(nnx.jit, static_argnames="first")
def decode_frame(decoder, state, z, first):
    return decoder.decode_frame(state, z, first)


@nnx.jit
def encode(encoder, video):
    return encoder.encode(video)


@functools.partial(nnx.jit, static_argnames="first")
def encode_chunk(encoder, state, video, first):
    return encoder.encode_chunk(state, video, first)


# --- against the recorded reference run


@pytest.fixture(scope="module")
def golden():
    """The recorded arrays, without their batch axis of one."""
    return {key: x if key.startswith("vae.") else x[0] for key, x in load_file(DATA / "vae.safetensors").items()}


@pytest.fixture(scope="module")
def golden_weights(golden):
    return {key.removeprefix("vae."): x for key, x in golden.items() if key.startswith("vae.")}


@pytest.fixture(scope="module")
def vae(golden_weights):
    return load_vae(GOLDEN_CONFIG, golden_weights, wan_vae_rules(GOLDEN_CONFIG))


def test_decode_matches_the_recorded_run(vae, golden):
    frames = decode(vae.decoder, golden["latents"])
    assert frames.dtype == jnp.float32
    expected = golden["video_unclamped"].transpose(1, 2, 3, 0)  # [3, T, H, W] -> [T, H, W, 3]
    assert_close("frames", frames, np.clip(0.5 * np.clip(expected, -1, 1) + 0.5, 0, 1), ATOL)
    assert_close("last frame", 2 * frames[-1:] - 1, golden["video"].transpose(0, 2, 3, 1), ATOL)


def test_decode_frame_matches_the_recorded_run_before_the_clamp(vae, golden):
    latents = golden["latents"].transpose(0, 2, 3, 1) * np.array(LATENT_STD) + np.array(LATENT_MEAN)
    state = vae.decoder.init_decoder_state(*latents.shape[1:3])
    frames = []
    for index, z in enumerate(latents.astype(np.float32)):
        new, state = decode_frame(vae.decoder, state, jnp.asarray(z), first=index == 0)
        frames.append(new)
    assert [len(new) for new in frames] == [1, 4, 4]
    assert_close("unclamped", np.concatenate(frames), golden["video_unclamped"].transpose(1, 2, 3, 0), ATOL)


def test_encode_matches_the_recorded_run(vae, golden):
    latents = encode(vae.encoder, golden["pixels"].transpose(1, 2, 3, 0))
    assert latents.dtype == jnp.float32
    assert_close("latents", latents, golden["encoded"], ATOL)


# --- against diffusers


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            VAEConfig(dim=8, dim_mult=(1, 3, 2), num_res_blocks=2, temporal_downsample=(True, True)), id="three_levels"
        ),
        pytest.param(
            VAEConfig(dim=4, dim_mult=(1, 1, 2, 3), num_res_blocks=1, temporal_downsample=(True, False, True)),
            id="time_apart",
        ),
    ],
)
def test_matches_diffusers(config):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(
        base_dim=config.dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # gains of one and biases of zero would hide mistakes
            parameter += 0.1 * torch.randn_like(parameter)
        video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
        z = torch.randn(1, config.z_dim, 3, 2, 3)
        encoded = theirs.encode(video).latent_dist.mode()[0].numpy()
        decoded = theirs.decode(z).sample[0].numpy()
    mean, std = (np.array(x)[:, None, None] for x in (theirs.config.latents_mean, theirs.config.latents_std))

    state_dict = {key: x.numpy() for key, x in theirs.state_dict().items()}
    ours = load_vae(config, state_dict, diffusers_vae_rules(config))
    latents = encode(ours.encoder, video[0].numpy().transpose(1, 2, 3, 0))
    assert_close("latents", latents, (encoded.transpose(1, 0, 2, 3) - mean) / std, ATOL)
    frames = decode(ours.decoder, ((z[0].numpy().transpose(1, 0, 2, 3) - mean) / std).astype(np.float32))
    assert_close("frames", frames, 0.5 * decoded.transpose(1, 2, 3, 0) + 0.5, ATOL)


# --- streaming


def random_vae(dtype):
    """A `WanVAE` of the size `SMALL`, always the same but for rounding; quicker than compiling its initialisers."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: WanVAE(SMALL, dtype=dtype, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 1.0
        return jnp.asarray(scale * rng.normal(size=leaf.shape), dtype)

    return nnx.merge(graphdef, jax.tree.map(draw, abstract))


@pytest.fixture(scope="module")
def small():
    return random_vae(jnp.float32)


@pytest.fixture(scope="module")
def small_latents():
    return jax.random.normal(jax.random.key(0), (4, SMALL.z_dim, 2, 3))


@pytest.fixture(scope="module")
def small_video():
    return jax.random.uniform(jax.random.key(1), (13, 8, 12, 3), minval=-1.0)


# Every way to cut four latent frames into pieces, as the frames that begin a new piece.
CUTS = [cuts for n in range(4) for cuts in itertools.combinations((1, 2, 3), n)]


def pieces(cuts):
    """(start, stop) of each piece of four latent frames."""
    return list(itertools.pairwise((0, *cuts, 4)))


@pytest.fixture(scope="module")
def decoded_at_once(small, small_latents):
    return decode(small.decoder, small_latents)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_decoding_any_split_equals_decoding_at_once(small, small_latents, decoded_at_once, cuts):
    state, frames = small.decoder.init_decoder_state(2, 3), []
    for start, stop in pieces(cuts):
        new, state = decode_chunk(small.decoder, state, small_latents[start:stop], first=start == 0)
        assert len(new) == 4 * (stop - start) - 3 * (start == 0)
        frames.append(new)
    assert_close(f"cut at {cuts}", np.concatenate(frames), decoded_at_once, 1e-5)


@pytest.fixture(scope="module")
def encoded_at_once(small, small_video):
    return encode(small.encoder, small_video)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_encoding_any_split_equals_encoding_at_once(small, small_video, encoded_at_once, cuts):
    state, latents = small.encoder.init_encoder_state(8, 12), []
    for start, stop in pieces(cuts):
        video = small_video[max(0, 4 * start - 3) : 4 * stop - 3]
        new, state = encode_chunk(small.encoder, state, video, first=start == 0)
        latents.append(new)
    assert_close(f"cut at {cuts}", np.concatenate(latents), encoded_at_once, 1e-5)


def test_the_first_frame_never_enters_the_time_upsampling(small, small_latents):
    _, state = decode_chunk(small.decoder, small.decoder.init_decoder_state(2, 3), small_latents[:1], first=True)
    pasts = [level.resample for level in state.levels]
    assert [past is None for past in pasts] == [False, False, True]
    assert not any(np.any(past) for past in pasts if past is not None)
    assert np.any(state.conv_in)


def test_vmapped_equals_one_by_one(small):
    """Three beams in different states, so that a leak from one to another would show."""
    latents = jax.random.normal(jax.random.key(2), (3, 5, SMALL.z_dim, 2, 3))

    @nnx.jit
    def both_chunks(decoder, latents):
        def one(latents):
            state = decoder.init_decoder_state(2, 3)
            begin, state = decoder.decode_chunk(state, latents[:3], True)
            end, state = decoder.decode_chunk(state, latents[3:], False)
            return jnp.concatenate([begin, end]), state

        return jax.vmap(one)(latents)

    frames, state = both_chunks(small.decoder, latents)
    for row in range(3):
        start = small.decoder.init_decoder_state(2, 3)
        begin, state_one = decode_chunk(small.decoder, start, latents[row, :3], first=True)
        end, state_one = decode_chunk(small.decoder, state_one, latents[row, 3:], first=False)
        assert_close(f"beam {row}", frames[row], np.concatenate([begin, end]), 1e-5)
        for at, (many, one) in enumerate(zip(jax.tree.leaves(state), jax.tree.leaves(state_one), strict=True)):
            assert_close(f"beam {row}, state leaf {at}", many[row], one, 1e-4)


def test_bfloat16_is_near_float32(small, small_latents, small_video, decoded_at_once, encoded_at_once):
    half = random_vae(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.decoder.init_decoder_state(2, 3))} == {jnp.dtype("bfloat16")}
    pairs = {
        "decode": (decode(half.decoder, small_latents), decoded_at_once),
        "encode": (encode(half.encoder, small_video), encoded_at_once),
    }
    for name, (ours, exact) in pairs.items():
        assert ours.dtype == jnp.float32, name
        relative = float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact - exact.mean()))
        assert relative < 0.05, f"{name}: relative error {relative:.3g}"  # bfloat16 rounds by 0.004, some 20 times


# --- the parts


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("widths", [(NARROW - 8, NARROW + 8), (NARROW + 8, 3), (NARROW + 8, NARROW + 16)])
def test_causal_conv3d_equals_the_plain_3d_convolution(frames, widths):
    past, x, kernel = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate([(2, 5, 6, widths[0]), (frames, 5, 6, widths[0]), (3, 3, 3, *widths)])
    )
    everything = jnp.concatenate([past, x])
    plain = jax.lax.conv_general_dilated(
        everything[None], kernel, (1, 1, 1), [(0, 0), (1, 1), (1, 1)], dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    ours = causal_conv3d(past, x, kernel)
    assert_close("causal_conv3d", ours, plain[0], 1e-4)
    np.testing.assert_array_equal(next_past(past, x), everything[-2:])


def test_a_black_frame_has_a_finite_gradient(small):
    """Zeros through the norms: 0 / 0 without its guard."""
    zeros = jax.tree.map(jnp.zeros_like, nnx.split(small.encoder)[1])
    graphdef = nnx.split(small.encoder)[0]

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(nnx.merge(graphdef, params).encode(jnp.zeros((1, 8, 8, 3))) ** 2)

    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient(zeros)))


# --- full size, by shapes alone


@pytest.mark.parametrize(
    ("keys", "rules"), [("wan2.1_vae", wan_vae_rules), ("diffusers_wan2.1_vae", diffusers_vae_rules)]
)
def test_the_table_fits_the_full_size_checkpoint(keys, rules):
    """The engine refuses a key or a parameter that is not matched exactly once; here also a rule."""
    config = VAEConfig()
    shapes = {
        key: tuple(shape) for key, shape in json.loads((DATA / "checkpoint_keys" / f"{keys}.json").read_text()).items()
    }
    target = abstract_params(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    planned = plan(shapes, rules(config), target, name=keys)
    assert planned.leaves.keys() == target.keys()
    assert not planned.unused
    assert planned.size == sum(math.prod(shape) for shape in shapes.values())
    for rule in rules(config):
        matched = [key for key in shapes if re.fullmatch(rule.pattern, key)]
        assert len(matched) == 1, f"{rule} matches {matched}"


def test_full_size_shapes():
    decoder = nnx.eval_shape(lambda: Decoder(VAEConfig(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(decoder)

    def second_chunk(params, latents):
        decoder = nnx.merge(graphdef, params)
        first, state = decoder.decode_chunk(decoder.init_decoder_state(60, 104), latents, True)
        second, new_state = decoder.decode_chunk(state, latents, False)
        return first, second, state, new_state

    latents = jax.ShapeDtypeStruct((3, 16, 60, 104), jnp.float32)
    first, second, state, new_state = jax.eval_shape(second_chunk, params, latents)
    assert first.shape == (9, 480, 832, 3)
    assert second.shape == (12, 480, 832, 3)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), new_state)
    state_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert round(state_bytes / 1e9, 2) == 1.89


# --- bad inputs


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda vae: vae.decoder.decode(jnp.zeros((2, 8, 2, 3))), r"\(2, 8, 2, 3\), expected \[f, 16, h, w\]"),
        (lambda vae: vae.decoder.decode(jnp.zeros((0, 16, 2, 3))), "at least one frame"),
        (lambda vae: vae.encoder.encode(jnp.zeros((4, 8, 8, 3))), r"4 frames, expected 4\*k \+ 1"),
        (lambda vae: vae.encoder.encode(jnp.zeros((5, 8, 10, 3))), r"8x10, expected multiples of 4; crop to 8x8"),
        (
            lambda vae: vae.encoder.encode_chunk(
                vae.encoder.init_encoder_state(8, 8), jnp.zeros((5, 8, 8, 3)), first=False
            ),
            r"5 frames, expected 4\*k;",
        ),
        (lambda _: Encoder(VAEConfig(dim=4, z_dim=8), rngs=nnx.Rngs(0)), "z_dim is 8, expected 16"),
        (lambda _: Decoder(VAEConfig(dim=4, z_dim=8), rngs=nnx.Rngs(0)), "z_dim is 8, expected 16"),
    ],
)
def test_bad_inputs_are_refused(small, call, words):
    with pytest.raises(BadInputError, match=words):
        call(small)


@pytest.mark.parametrize("shape", [(2, 6, 6, 5, 7), (1, 1, 3, 4, 2)], ids=str)
def test_the_gradient_made_for_cpus_is_that_of_the_convolution(shape):
    t, h, w, i, o = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, weight = (
        jax.random.normal(key, size)
        for key, size in zip(keys, [(3, t, h, w, i), (3, 3, i, o), (3, t, h, w, o)], strict=True)
    )

    def gradients(convolution):
        loss = lambda x, kernel: jnp.sum(jax.vmap(lambda one: convolution(one, kernel))(x) * weight)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)

    for name, ours, theirs in zip(("x", "kernel"), gradients(conv.conv2d), gradients(conv._conv2d), strict=True):
        assert_close(name, ours, theirs, 1e-4)
