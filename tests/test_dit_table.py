"""The DiT's tables against every published list of keys, both ways, and against diffusers' own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from published import TINY, keys

from convert.dit_table import diffusers_dit_rules, longlive_dit_rules, wan_dit_rules
from convert.engine import abstract_params, convert, plan
from convert.lora import LoRASource
from convert.sources import DictSource
from streamt1_jax.config import DiTConfig
from streamt1_jax.models.dit import CausalWanDiT

PUBLISHED = {
    "wan2.1_t2v_1.3b_dit": (DiTConfig.wan_1_3b(), wan_dit_rules),
    "wan2.1_t2v_14b_dit": (DiTConfig.wan_14b(), wan_dit_rules),
    "longlive_base_generator": (DiTConfig.wan_1_3b(), longlive_dit_rules),
    "diffusers_wan2.1_t2v_1.3b_transformer": (DiTConfig.wan_1_3b(), diffusers_dit_rules),
}


def target(config: DiTConfig):
    return abstract_params(lambda: CausalWanDiT(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_keys_fill_every_parameter_once(name):
    config, rules = PUBLISHED[name]
    shapes = keys(name)
    made = plan(shapes, rules(), target(config))  # Raises unless keys and parameters match both ways.
    assert not made.unused
    assert sum(len(leaf.fills) for leaf in made.leaves.values()) == len(shapes)
    assert made.size == sum(int(np.prod(shape)) for shape in shapes.values())


def test_order_of_rules_does_not_matter():
    config, rules = PUBLISHED["diffusers_wan2.1_t2v_1.3b_transformer"]
    shapes = keys("diffusers_wan2.1_t2v_1.3b_transformer")
    assert plan(shapes, rules(), target(config)) == plan(shapes, rules()[::-1], target(config))


class Zeros:
    """A source of full-size shapes without memory."""

    def __init__(self, shapes):
        self.shapes = shapes

    def read(self, key):
        return np.broadcast_to(np.float32(0), self.shapes[key])


@pytest.mark.parametrize("base", ["wan2.1_t2v_1.3b_dit", "longlive_base_generator"])
def test_longlive_lora_fits_every_linear_of_the_blocks(base):
    lora = keys("longlive_lora")
    merged = LoRASource(Zeros(keys(base)), Zeros(lora))
    assert merged.ranks == [256]
    linears = [key for key, shape in keys(base).items() if "blocks." in key and len(shape) == 2]
    assert len(lora) == 600 == 2 * len(linears)


def test_diffusers_needs_no_permutation():
    """The same noisy latents give the same flow: patches, head, modulation and time are in one order."""
    from diffusers import WanTransformer3DModel

    config = TINY.dit
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    ).eval()
    x, text, timestep = torch.randn(1, 16, 3, 6, 8), torch.randn(1, config.text_len, config.text_dim), 625.0
    with torch.no_grad():
        expected = theirs(x, torch.tensor([timestep]), text, return_dict=False)[0][0].permute(1, 0, 2, 3).numpy()

    source = DictSource(theirs.state_dict())
    ours = nnx.eval_shape(lambda: CausalWanDiT(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    made = plan(source.shapes, diffusers_dit_rules(), abstract_params(lambda: ours))
    params = dict(convert(made, source, np.float32))
    graphdef, abstract = nnx.split(ours)
    flat = [(path, leaf.replace(jnp.asarray(params[".".join(path)]))) for path, leaf in nnx.to_flat_state(abstract)]

    @jax.jit
    def flow(params, x, text, timesteps):
        dit = nnx.merge(graphdef, params)
        return dit(x, dit.encode_time(timesteps), dit.encode_text(text), None, jnp.int32(0))

    given = x[0].permute(1, 0, 2, 3).numpy(), text[0].numpy(), np.full(3, timestep, np.float32)
    found = flow(nnx.from_flat_state(flat), *given)
    error = np.abs(np.asarray(found) - expected).max()
    assert error < 1e-4, f"flow: max error {error:.2e} of values up to {np.abs(expected).max():.2f}"
