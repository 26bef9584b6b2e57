"""Replay of single networks: one forward with a LoRA, the VAE, the text encoder."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from streamt1_jax.config import ModelConfig
from streamt1_jax.models.attention import rope_angles, rotate
from streamt1_jax.models.dit import CausalWanDiT
from streamt1_jax.models.umt5 import UMT5Encoder, encode_prompt
from streamt1_jax.models.vae import WanVAE
from streamt1_jax.recorded_case import (
    LATENT_TOLERANCE,
    Comparison,
    Recorded,
    build_network,
    close,
    dit_config,
    equal,
    under,
)
from streamt1_jax.schedule import scheduled_sigmas


def replay_lora(tensors: Recorded, sizes: Recorded) -> Iterator[Comparison]:
    """Merges the LoRA by the converter's own code, then runs chunk 0."""
    from convert.dit_table import longlive_dit_rules
    from convert.lora import LoRASource
    from convert.sources import DictSource

    config = dit_config(sizes["dit"])
    source = LoRASource(DictSource(under(tensors, "base.")), DictSource(under(tensors, "lora.")), sizes["alpha"])
    merged = {key: source.read(key) for key in source.shapes}
    recorded = under(tensors, "merged.")
    yield equal("names of merged weights", sorted(merged), sorted(recorded))
    ours, theirs = (np.concatenate([w[key].ravel() for key in recorded]) for w in (merged, recorded))
    yield close("merged weights", ours, theirs, 1e-6)

    model = build_network(lambda: CausalWanDiT(config, rngs=nnx.Rngs(0)), longlive_dit_rules(), merged, "dit")
    x, prompt_embeds = (jnp.asarray(tensors[key][0]) for key in ("x", "prompt_embeds"))
    timestep = float(tensors["timestep"])

    @jax.jit
    def forward():
        text, time = model.encode_text(prompt_embeds), model.encode_time(jnp.array([timestep]))
        start = jnp.int32(0)
        return model(x, time, text, None, start), model.context(x, time, text, None, start)

    flow, kv = forward()
    yield close("flow", flow, tensors["flow"][0], LATENT_TOLERANCE)
    sigmas = scheduled_sigmas(ModelConfig().timestep_shift)
    sigma = float(sigmas[np.abs(1000 * sigmas - timestep).argmin()])
    yield close("x0", x - sigma * flow, tensors["x0"][0], LATENT_TOLERANCE)
    frames, _, height, width = x.shape
    angles = rope_angles(jnp.int32(0), frames, height // 2, width // 2, config.head_dim)
    for layer in range(config.num_layers):  # recorded before rotation
        yield close(
            f"keys of layer {layer}",
            kv.k[layer],
            rotate(jnp.asarray(tensors[f"kv{layer}.k"][0]), angles),
            LATENT_TOLERANCE,
        )
        yield close(f"values of layer {layer}", kv.v[layer], tensors[f"kv{layer}.v"][0], LATENT_TOLERANCE)


def replay_vae(tensors: Recorded) -> Iterator[Comparison]:
    from convert.sizes import wan_vae_config
    from convert.vae_table import wan_vae_rules

    weights = under(tensors, "vae.")
    config = wan_vae_config({key: x.shape for key, x in weights.items()})
    vae = build_network(lambda: WanVAE(config, rngs=nnx.Rngs(0)), wan_vae_rules(config), weights, "vae")
    video = tensors["pixels"][0].transpose(1, 2, 3, 0)
    yield close("encoded latents", jax.jit(vae.encoder.encode)(video), tensors["encoded"][0], LATENT_TOLERANCE)
    decoded = jax.jit(vae.decoder.decode)(tensors["latents"][0])
    recorded = tensors["video"][0].transpose(0, 2, 3, 1)
    yield close("decoded video", 2.0 * decoded - 1.0, recorded, LATENT_TOLERANCE)  # recorded in [-1, 1]
    unclamped = jax.jit(vae.decoder.decode_unclamped)(tensors["latents"][0])
    recorded = tensors["video_unclamped"][0].transpose(1, 2, 3, 0)
    yield close("decoded video, unclamped", unclamped, recorded, LATENT_TOLERANCE)


def replay_umt5(tensors: Recorded) -> Iterator[Comparison]:
    from convert.sizes import wan_umt5_config
    from convert.umt5_table import wan_umt5_rules

    weights = under(tensors, "t5.")
    config = wan_umt5_config({key: x.shape for key, x in weights.items()})
    encoder = build_network(
        lambda: UMT5Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), wan_umt5_rules(), weights, "text"
    )
    ids, mask = tensors["ids"], tensors["mask"]
    hidden = jax.jit(jax.vmap(encoder))(ids, mask)
    yield close("hidden states", hidden, tensors["hidden"], LATENT_TOLERANCE)
    embeds = jax.jit(jax.vmap(lambda i, m: encode_prompt(encoder, i, m)))(ids, mask)
    yield close("prompt embeddings", embeds, tensors["prompt_embeds"], LATENT_TOLERANCE)
