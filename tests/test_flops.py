"""Work by formula, against the published table of the full-size model and against what XLA counts itself."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from streamt1_jax import flops
from streamt1_jax.config import DiTConfig, ModelConfig, RunConfig, SearchConfig, UMT5Config, VAEConfig
from streamt1_jax.models.dit import KV, Past
from streamt1_jax.models.umt5 import encode_prompt
from streamt1_jax.networks import network_graph

TERA = 1e12
FRAME_TOKENS = 30 * 52  # of one latent frame of 832x480
# Latent frames that a forward sees -> TFLOP.
WINDOWS = {3: 16.2, 6: 20.2, 9: 24.3, 12: 28.3, 15: 32.3, 18: 36.4, 21: 40.4, 24: 44.5}

# XLA counts a loop's body once, so one layer; wide, so that element-wise work (not in the formulas) is a small part.
SIZED = ModelConfig(
    dit=DiTConfig(dim=256, ffn_dim=768, num_heads=2, num_layers=1, freq_dim=32, text_dim=64, text_len=32),
    vae=VAEConfig(dim=32),
    text=UMT5Config(vocab_size=1024, dim=64, num_heads=4, head_dim=32, ffn_dim=512, num_layers=1),
    height=128,
    width=192,
)
F, C, H, W = 3, 16, 16, 24
TOKENS = F * H * W // 4
ROOM = 0.04  # of what the formulas leave out, and of the borders that XLA leaves out of convolutions


def shape(*sizes: int, dtype=jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


def counted(run, *args) -> float:
    """What XLA says the compiled program computes; nothing is executed."""
    costs = jax.jit(run).lower(*args).compile().cost_analysis()
    assert costs is not None
    return costs["flops"]


def check(name: str, formula: float, xla: float, room: float = ROOM) -> None:
    assert abs(formula / xla - 1) <= room, f"{name}: {formula:.4g} by formula, {xla:.4g} by XLA: {formula / xla:.4f}"


@pytest.mark.parametrize(("window", "expected"), WINDOWS.items())
def test_a_forward_at_full_size(window, expected):
    config = DiTConfig.wan_1_3b()
    work = flops.dit_forward(config, 3 * FRAME_TOKENS, (window - 3) * FRAME_TOKENS) / TERA
    assert work == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(("first", "expected"), [(False, 13.55), (True, 4.35)])
def test_decoding_a_latent_frame_at_full_size(first, expected):
    assert flops.vae_decode_frame(VAEConfig(), 60, 104, first=first) / TERA == pytest.approx(expected, abs=0.01)


def test_the_text_encoder_at_full_size():
    assert flops.umt5_encode(UMT5Config(), 512) / TERA == pytest.approx(4.8, abs=0.05)


@pytest.mark.parametrize("past", [0, 200])
@pytest.mark.parametrize("context", [False, True], ids=["forward", "context"])
def test_the_dit_as_xla_counts(past, context):
    # The context pass has all of its blocks but the last in its loop.
    config = dataclasses.replace(SIZED.dit, num_layers=2) if context else SIZED.dit
    graphdef, params = network_graph(dataclasses.replace(SIZED, dit=config), "dit", jnp.float32)
    model = nnx.eval_shape(lambda: nnx.merge(graphdef, params))
    time = jax.eval_shape(lambda params: nnx.merge(graphdef, params).encode_time(jnp.zeros((1,))), params)
    heads = (config.num_heads, config.head_dim)
    text = KV(*[shape(config.num_layers, config.text_len, *heads)] * 2)
    seen = Past(KV(*[shape(config.num_layers, past, *heads)] * 2), shape(dtype=jnp.int32)) if past else None
    name = "context" if context else "__call__"

    def run(params, x, time, text, seen, start):
        return getattr(nnx.merge(graphdef, params), name)(x, time, text, seen, start)

    assert model.config == config
    xla = counted(run, params, shape(F, C, H, W), time, text, seen, shape(dtype=jnp.int32))
    check("DiT", flops.dit_forward(config, TOKENS, past, context=context), xla)


def test_the_prompt_as_xla_counts():
    graphdef, params = network_graph(SIZED, "dit", jnp.float32)
    config = SIZED.dit
    xla = counted(
        lambda params, embeds: nnx.merge(graphdef, params).encode_text(embeds),
        params,
        shape(config.text_len, config.text_dim),
    )
    check("prompt", flops.dit_text(config), xla)


@pytest.mark.parametrize("first", [True, False])
def test_the_decoder_as_xla_counts(first):
    graphdef, params = network_graph(SIZED, "decoder", jnp.float32)
    state = jax.eval_shape(lambda params: nnx.merge(graphdef, params).init_decoder_state(H, W), params)
    xla = counted(
        lambda params, state, z: nnx.merge(graphdef, params).decode_frame(state, z, first=first),
        params,
        state,
        shape(H, W, C),
    )
    check("decoder", flops.vae_decode_frame(SIZED.vae, H, W, first=first), xla)


def test_the_text_encoder_as_xla_counts():
    graphdef, params = network_graph(SIZED, "text", jnp.float32)
    ids = shape(128, dtype=jnp.int32)
    xla = counted(lambda params, ids, mask: encode_prompt(nnx.merge(graphdef, params), ids, mask), params, ids, ids)
    check("text encoder", flops.umt5_encode(SIZED.text, 128), xla)


def test_layers_add_up():
    """XLA saw one layer; the rest follows from this."""
    work = [
        flops.dit_forward(dataclasses.replace(SIZED.dit, num_layers=n), TOKENS, 100, context=c)
        for c in (False, True)
        for n in (1, 2, 3)
    ]
    forward, context = work[:3], work[3:]
    assert forward[1] - forward[0] == forward[2] - forward[1] == context[1] - context[0] == context[2] - context[1]
    text = [flops.umt5_encode(dataclasses.replace(SIZED.text, num_layers=n), 128) for n in (1, 2, 3)]
    assert text[1] - text[0] == text[2] - text[1] == text[0]


def test_a_chunk_of_two_by_two_at_full_size():
    """18 forwards, as the desk study has it: 508 TFLOP of the DiT but for the context pass's missing last block."""
    model, run = ModelConfig.wan_1_3b(), RunConfig(search=SearchConfig())
    work = {name: amount / TERA for name, amount in flops.chunk(model, run, 480, 832, appended=0).items()}
    assert work["propose"] == pytest.approx(16 * 28.3, rel=0.002)
    assert work["recall"] == pytest.approx(2 * 28.3 * 29 / 30, rel=0.005)
    assert work["watch"] == pytest.approx(163, rel=0.005)


def test_appended_sinks_are_attended_to():
    """A sink chunk more is a window of three latent frames more: the next entry of the published table."""
    model, run = ModelConfig.wan_1_3b(), RunConfig(search=SearchConfig())
    work = [flops.chunk(model, run, 480, 832, appended=n)["propose"] / TERA for n in (0, 0.5, 1)]
    assert work[2] == pytest.approx(16 * WINDOWS[15], rel=0.002)
    assert work[1] == pytest.approx((work[0] + work[2]) / 2)


def test_window_decode_decodes_the_window_for_every_candidate():
    """As released: 126 TFLOP for the chunk and 1589 for ten chunks, of four candidates."""
    model = ModelConfig.wan_1_3b()
    released, ours = (
        flops.chunk(model, RunConfig(search=SearchConfig(decode=decode)), 480, 832, appended=0)["watch"] / TERA
        for decode in ("window", "streaming")
    )
    assert released == pytest.approx(126 + 1589, rel=0.005)
    assert ours == pytest.approx(163, rel=0.005)
