"""The causal DiT against diffusers, the recorded reference run and a plain NumPy network after docs/METHOD.md."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close
from flax import nnx
from safetensors.numpy import load_file

from convert.dit_table import diffusers_dit_rules, longlive_dit_rules
from convert.engine import build, dotted
from convert.lora import LoRASource
from convert.sources import DictSource
from streamt1_jax.config import DiTConfig, ModelConfig
from streamt1_jax.models.dit import KV, CausalWanDiT, Past
from streamt1_jax.networks import network_graph

DATA = Path(__file__).parent / "data"
ATOL = 1e-4
CONFIG = DiTConfig(dim=48, ffn_dim=40, num_heads=2, num_layers=3, freq_dim=16, text_dim=20, text_len=6)
FRAMES, HEIGHT, WIDTH = 3, 4, 6  # of latents: 3 * 2 * 3 = 18 tokens
TOKENS = FRAMES * HEIGHT * WIDTH // 4


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def diffusers_model():
    """Every parameter random, also those that are constants when the model is made."""
    import torch
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        in_channels=CONFIG.in_dim,
        out_channels=CONFIG.out_dim,
        text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=CONFIG.eps,
        rope_max_seq_len=64,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
            if name.endswith(("norm_q.weight", "norm_k.weight", "norm2.weight")):
                p.add_(1.0)
    return model


def make(dtype=jnp.float32):
    return CausalWanDiT(CONFIG, dtype=dtype, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model(diffusers_model):
    return build(make, diffusers_dit_rules(), diffusers_model.state_dict(), name="diffusers")


@pytest.fixture(scope="module")
def prompt():
    """Rows past the prompt are zero."""
    x = draw(7, CONFIG.text_len, CONFIG.text_dim)
    x[4:] = 0.0
    return jnp.asarray(x)


@nnx.jit
def flow(model, x, timesteps, prompt, past, start):
    return model(x, model.encode_time(timesteps), model.encode_text(prompt), past, start)


@nnx.jit
def context(model, x, timesteps, prompt, past, start):
    return model.context(x, model.encode_time(timesteps), model.encode_text(prompt), past, start)


def chunk(seed):
    return jnp.asarray(draw(seed, FRAMES, CONFIG.in_dim, HEIGHT, WIDTH))


# Against diffusers


def their_flow(diffusers_model, x, timestep, prompt):
    import torch

    with torch.no_grad():
        out = diffusers_model(
            hidden_states=torch.from_numpy(np.array(x)).transpose(0, 1)[None],
            timestep=torch.tensor(np.array(timestep)),
            encoder_hidden_states=torch.from_numpy(np.array(prompt))[None],
            return_dict=False,
        )[0]
    return out[0].transpose(0, 1).numpy()


@pytest.mark.parametrize("timestep", [1000.0, 833.3333, 0.0])
def test_one_chunk_matches_diffusers(diffusers_model, model, prompt, timestep):
    x = chunk(1)
    expected = their_flow(diffusers_model, x, [timestep], prompt)
    assert np.abs(expected).max() > 0.5
    ours = flow(model, x, jnp.array([timestep]), prompt, None, jnp.int32(0))
    assert ours.dtype == jnp.float32
    assert_close(f"flow at {timestep}", ours, expected, ATOL)


def test_a_timestep_a_frame_matches_diffusers(diffusers_model, model, prompt):
    """Which has one a token."""
    x, timesteps = chunk(1), [0.0, 500.0, 937.5]
    expected = their_flow(diffusers_model, x, [np.repeat(np.float32(timesteps), TOKENS // FRAMES)], prompt)
    assert_close("flow", flow(model, x, jnp.array(timesteps), prompt, None, jnp.int32(0)), expected, ATOL)


def test_equal_timesteps_of_all_frames_are_one(model, prompt):
    x, start = chunk(1), jnp.int32(0)
    one = flow(model, x, jnp.array([625.0]), prompt, None, start)
    assert_close("flow", flow(model, x, jnp.full((FRAMES,), 625.0), prompt, None, start), one, 1e-6)


# Against the recorded run


def test_matches_the_recorded_run():
    """One forward of chunk 0 with a LoRA merged: flow and x0; `streamt1 parity` compares the keys and values too."""
    case, sizes = load_file(DATA / "lora.safetensors"), json.loads((DATA / "lora.json").read_text())
    base, lora = (
        DictSource({k.removeprefix(p): x for k, x in case.items() if k.startswith(p)}) for p in ("base.", "lora.")
    )
    merged = LoRASource(base, lora, sizes["alpha"])
    fields = {key: value for key, value in sizes["dit"].items() if key in DiTConfig.__dataclass_fields__}
    tensors = {key: merged.read(key) for key in merged.shapes}
    model = build(lambda: CausalWanDiT(DiTConfig(**fields), rngs=nnx.Rngs(0)), longlive_dit_rules(), tensors)
    x, timestep = jnp.asarray(case["x"][0]), jnp.asarray(case["timestep"])[None]
    prompt = jnp.asarray(case["prompt_embeds"][0])
    ours = flow(model, x, timestep, prompt, None, jnp.int32(0))
    assert_close("flow", ours, case["flow"][0], ATOL)
    u = np.linspace(1, 0, 1001)[:-1]
    sigmas = 5 * u / (1 + 4 * u)
    sigma = sigmas[np.abs(1000 * sigmas - case["timestep"]).argmin()]
    assert_close("x0", np.asarray(x) - sigma * np.asarray(ours), case["x0"][0], ATOL)


# Against a plain network


class PlainDiT:
    """METHOD section 2 in float64. All frames of all chunks at once; a token sees its own chunk and earlier ones."""

    def __init__(self, model: CausalWanDiT):
        params = dotted(nnx.state(model, nnx.Param))
        self.p = {path: np.asarray(x, np.float64) for path, x in params.items()}
        self.c = model.config

    def linear(self, x, path, layer=...):
        return x @ self.p[f"{path}.kernel"][layer] + self.p[f"{path}.bias"][layer]

    def rms(self, x, path, layer):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.c.eps) * self.p[f"{path}.scale"][layer]

    def norm(self, x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + self.c.eps)

    @staticmethod
    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    @staticmethod
    def silu(x):
        return x / (1 + np.exp(-x))

    def rope(self, x, positions):
        """x [T, N, D]; positions [T, 3] of frame, row and column."""
        n = self.c.head_dim // 6
        pairs = (self.c.head_dim // 2 - 2 * n, n, n)
        angles = np.concatenate(
            [positions[:, [a]] * 10000.0 ** (-np.arange(m) / m) for a, m in enumerate(pairs)], axis=1
        )
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    def attention(self, q, k, v, mask=None):
        logits = np.einsum("qnd,knd->nqk", q, k) / np.sqrt(self.c.head_dim)
        logits = logits if mask is None else np.where(mask, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("nqk,knd->qnd", weights / weights.sum(-1, keepdims=True), v)

    def heads(self, x):
        return x.reshape(len(x), self.c.num_heads, -1)

    def qkv(self, x, context, path, layer):
        q = self.heads(self.rms(self.linear(x, f"{path}.q", layer), f"{path}.norm_q", layer))
        k = self.heads(self.rms(self.linear(context, f"{path}.k", layer), f"{path}.norm_k", layer))
        return q, k, self.heads(self.linear(context, f"{path}.v", layer))

    def __call__(self, x, timesteps, prompt, *, chunk_frames, starts):
        """Flow, and the rotated keys and the values of every layer.

        Args:
            x: [F, C, h, w], chunk after chunk.
            timesteps: one a frame.
            starts: position of each chunk's first frame.
        """
        frames, channels, height, width = x.shape
        rows, columns, per_frame = height // 2, width // 2, height * width // 4
        patches = x.reshape(frames, channels, rows, 2, columns, 2).transpose(0, 2, 4, 1, 3, 5)
        h = self.linear(patches.reshape(frames * per_frame, -1).astype(np.float64), "patch_embedding")
        chunk = np.repeat(np.arange(frames) // chunk_frames, per_frame)
        frame = np.repeat([s + i for s in starts for i in range(chunk_frames)], per_frame)
        cell = np.tile(np.arange(per_frame), frames)
        positions = np.stack([frame, cell // columns, cell % columns], axis=1)
        mask = chunk[:, None] >= chunk[None]

        text = self.linear(self.gelu(self.linear(np.asarray(prompt, np.float64), "text_in")), "text_out")
        half = self.c.freq_dim // 2
        angles = np.asarray(timesteps, np.float64)[:, None] * 10000.0 ** (-np.arange(half) / half)
        sinusoid = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        e = self.linear(self.silu(self.linear(sinusoid, "time_in")), "time_out")
        e0 = self.linear(self.silu(e), "time_projection").reshape(frames, 6, -1)

        keys, values = [], []
        for layer in range(self.c.num_layers):
            m = np.repeat(self.p["blocks.modulation"][layer] + e0, per_frame, axis=0)
            shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (m[:, i] for i in range(6))
            y = self.norm(h) * (1 + scale_a) + shift_a
            q, k, v = self.qkv(y, y, "blocks.self_attn", layer)
            q, k = self.rope(q, positions), self.rope(k, positions)
            keys.append(k)
            values.append(v)
            y = self.attention(q, k, v, mask).reshape(len(h), -1)
            h = h + gate_a * self.linear(y, "blocks.self_attn.o", layer)
            y = self.norm(h) * self.p["blocks.cross_norm.scale"][layer] + self.p["blocks.cross_norm.bias"][layer]
            y = self.attention(*self.qkv(y, text, "blocks.cross_attn", layer)).reshape(len(h), -1)
            h = h + self.linear(y, "blocks.cross_attn.o", layer)
            y = self.norm(h) * (1 + scale_f) + shift_f
            y = self.linear(self.gelu(self.linear(y, "blocks.ffn_in", layer)), "blocks.ffn_out", layer)
            h = h + gate_f * y

        m = np.repeat(self.p["head.modulation"] + e[:, None], per_frame, axis=0)
        out = self.linear(self.norm(h) * (1 + m[:, 1]) + m[:, 0], "head.projection")
        out = out.reshape(frames, rows, columns, 2, 2, self.c.out_dim).transpose(0, 5, 1, 3, 2, 4)
        return out.reshape(x.shape), np.stack(keys), np.stack(values)


@pytest.fixture(scope="module")
def plain(model):
    return PlainDiT(model)


def with_slots(kv: KV, slots: int, garbage: float) -> Past:
    """The keys of the past in a larger cache: what stands behind them must not matter."""
    length = kv.k.shape[1]
    room = [jnp.full((x.shape[0], slots, *x.shape[2:]), garbage).at[:, :length].set(x) for x in kv]
    return Past(KV(*room), jnp.int32(length))


def test_plain_network_matches_diffusers(diffusers_model, plain, prompt):
    """The reference's own check."""
    x = chunk(1)
    ours, *_ = plain(np.asarray(x), [750.0] * FRAMES, prompt, chunk_frames=FRAMES, starts=[0])
    assert_close("flow", ours, their_flow(diffusers_model, x, [750.0], prompt), ATOL)


@pytest.mark.parametrize("start", [0, 3 * 7])
def test_chunk_after_chunk_equals_all_at_once(model, plain, prompt, start):
    """Three chunks through the cache against one pass over all of them with a mask, the first two at timestep 0."""
    chunks, starts = [chunk(seed) for seed in (1, 2, 3)], [start, start + FRAMES, start + 2 * FRAMES]
    times = [0.0] * (2 * FRAMES) + [833.0] * FRAMES
    joined = np.concatenate(chunks)
    expected, keys, values = plain(joined, times, prompt, chunk_frames=FRAMES, starts=starts)

    clean = jnp.zeros(1)
    first = context(model, chunks[0], clean, prompt, None, jnp.int32(starts[0]))
    second = context(model, chunks[1], clean, prompt, with_slots(first, 3 * TOKENS, 50.0), jnp.int32(starts[1]))
    both = KV(*(jnp.concatenate(pair, axis=1) for pair in zip(first, second, strict=True)))
    assert_close("keys from the context pass", both.k, keys[:, : 2 * TOKENS], ATOL)
    assert_close("values from the context pass", both.v, values[:, : 2 * TOKENS], ATOL)

    past = with_slots(both, 3 * TOKENS, -50.0)
    ours = flow(model, chunks[2], jnp.array([833.0]), prompt, past, jnp.int32(starts[2]))
    assert_close("flow of the third chunk", ours, expected[2 * FRAMES :], ATOL)


def test_order_of_the_past_does_not_matter(model, prompt):
    """The window is a ring: its slots stand in any order."""
    clean = jnp.zeros(1)
    first = context(model, chunk(1), clean, prompt, None, jnp.int32(0))
    second = context(model, chunk(2), clean, prompt, with_slots(first, 3 * TOKENS, 0.0), jnp.int32(FRAMES))
    flows = []
    for pair in ((first, second), (second, first)):
        past = with_slots(KV(*(jnp.concatenate(x, axis=1) for x in zip(*pair, strict=True))), 3 * TOKENS, 0.0)
        flows.append(flow(model, chunk(3), jnp.array([833.0]), prompt, past, jnp.int32(2 * FRAMES)))
    assert_close("flow", flows[1], flows[0], 1e-5)


def test_frames_past_1023(model, plain, prompt):
    """Where the released code stops. A float32 angle of 2000 radians is known to 1e-4."""
    starts = [2000, 2000 + FRAMES]
    first = context(model, chunk(1), jnp.zeros(1), prompt, None, jnp.int32(starts[0]))
    past = with_slots(first, 3 * TOKENS, 0.0)
    ours = flow(model, chunk(2), jnp.array([500.0]), prompt, past, jnp.int32(starts[1]))
    joined = np.concatenate([chunk(1), chunk(2)])
    expected, *_ = plain(joined, [0.0] * FRAMES + [500.0] * FRAMES, prompt, chunk_frames=FRAMES, starts=starts)
    assert_close("flow", ours, expected[FRAMES:], 1e-3)


def test_cross_attention_sees_every_row_of_the_prompt(model, prompt):
    """Rows past the prompt are zero but not masked: their biases count."""
    args = (chunk(1), jnp.array([500.0]))
    longer = flow(model, *args, prompt, None, jnp.int32(0))
    cut = flow(model, *args, prompt[:4], None, jnp.int32(0))
    assert float(jnp.abs(longer - cut).max()) > 1e-3


@pytest.mark.usefixtures("standard_promotion")
def test_bfloat16_is_near_float32(diffusers_model, model, prompt):
    half = build(functools.partial(make, jnp.bfloat16), diffusers_dit_rules(), diffusers_model.state_dict())
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}
    kv = context(half, chunk(1), jnp.zeros(1), prompt, None, jnp.int32(0))
    assert kv.k.dtype == kv.v.dtype == jnp.bfloat16
    expected = context(model, chunk(1), jnp.zeros(1), prompt, None, jnp.int32(0))
    ours = flow(half, chunk(2), jnp.array([833.0]), prompt, Past(kv, jnp.int32(TOKENS)), jnp.int32(FRAMES))
    reference = flow(model, chunk(2), jnp.array([833.0]), prompt, Past(expected, jnp.int32(TOKENS)), jnp.int32(FRAMES))
    assert ours.dtype == jnp.float32
    for name, x, y in (("keys", kv.k, expected.k), ("values", kv.v, expected.v), ("flow", ours, reference)):
        error = jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y)
        assert float(error) < 0.02, f"{name}: relative error {float(error):.3g}"


# Full size, by shape alone


@pytest.mark.parametrize(
    ("model_config", "keys"),
    [(ModelConfig.wan_1_3b(), "wan2.1_t2v_1.3b_dit"), (ModelConfig.wan_14b(), "wan2.1_t2v_14b_dit")],
    ids=["1.3B", "14B"],
)
def test_full_size_by_shape(model_config, keys):
    config = model_config.dit
    graphdef, params = network_graph(model_config, "dit", jnp.bfloat16)
    published = json.loads((DATA / "checkpoint_keys" / f"{keys}.json").read_text())
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert numbers == sum(math.prod(shape) for shape in published.values())

    tokens = 3 * 1560
    dim = (config.num_layers, tokens, config.num_heads, config.head_dim)
    slots = KV(*(jax.ShapeDtypeStruct((dim[0], 3 * tokens, *dim[2:]), jnp.bfloat16) for _ in range(2)))

    def run(params, x, timestep, prompt, past, start):
        model = nnx.merge(graphdef, params)
        time, text = model.encode_time(timestep), model.encode_text(prompt)
        return model(x, time, text, past, start), model.context(x, time, text, past, start)

    number = jax.ShapeDtypeStruct((), jnp.int32)
    x = jax.ShapeDtypeStruct((3, 16, 60, 104), jnp.float32)
    prompt, timestep = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((512, config.text_dim), (1,)))
    with jax.numpy_dtype_promotion("standard"):
        velocity, kv = jax.eval_shape(run, params, x, timestep, prompt, Past(slots, number), number)
    assert (velocity.shape, velocity.dtype) == (x.shape, jnp.float32)
    assert (kv.k.shape, kv.k.dtype) == (kv.v.shape, kv.v.dtype) == (dim, jnp.bfloat16)
