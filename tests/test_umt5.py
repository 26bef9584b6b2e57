"""The UMT5 encoder against the recorded reference run and against transformers, through the real tables."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from convert.engine import abstract_params, convert, plan
from convert.sources import DictSource
from convert.umt5_table import transformers_umt5_rules, wan_umt5_rules
from streamt1_jax.config import UMT5Config
from streamt1_jax.errors import WeightsError
from streamt1_jax.models.umt5 import UMT5Encoder, encode_prompt, relative_position_buckets

DATA = Path(__file__).parent / "data"
TABLES = {
    "umt5_xxl_encoder": wan_umt5_rules,
    "transformers_umt5_xxl_encoder": transformers_umt5_rules,
}
GOLDEN_CONFIG = UMT5Config(vocab_size=97, dim=64, num_heads=4, head_dim=16, ffn_dim=112, num_layers=3)


def load_encoder(config, tensors, rules, dtype=jnp.float32):
    def make():
        return UMT5Encoder(config, dtype=dtype, rngs=nnx.Rngs(0))

    source = DictSource(tensors)
    filled = dict(convert(plan(source.shapes, rules, abstract_params(make)), source, np.dtype(dtype)))
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    params = [
        (path, leaf.replace(jnp.asarray(filled[".".join(map(str, path))])))
        for path, leaf in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(params))


@nnx.jit
def hidden_of_prompts(encoder, ids, mask):
    return jax.vmap(lambda i, m: encoder(i, m))(ids, mask)


@nnx.jit
def embeds_of_prompts(encoder, ids, mask):
    return jax.vmap(lambda i, m: encode_prompt(encoder, i, m))(ids, mask)


def assert_close(name, ours, reference, atol):
    ours, reference = np.asarray(ours, np.float32), np.asarray(reference, np.float32)
    assert ours.shape == reference.shape, f"{name}: shape {ours.shape} is not {reference.shape}"
    error = np.abs(ours - reference)
    assert error.max() <= atol, f"{name}: max error {error.max():.3g}, mean {error.mean():.3g}, allowed {atol:g}"


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "umt5.safetensors")


@pytest.fixture(scope="module")
def golden_weights(golden):
    return {key.removeprefix("t5."): x for key, x in golden.items() if key.startswith("t5.")}


@pytest.fixture(scope="module")
def encoder(golden_weights):
    return load_encoder(GOLDEN_CONFIG, golden_weights, wan_umt5_rules())


@pytest.fixture(scope="module")
def prompts(golden):
    return jnp.asarray(golden["ids"], jnp.int32), jnp.asarray(golden["mask"], jnp.int32)


@pytest.mark.parametrize(("name", "function"), [("hidden", hidden_of_prompts), ("prompt_embeds", embeds_of_prompts)])
def test_matches_the_recorded_run(name, function, encoder, prompts, golden):
    assert_close(name, function(encoder, *prompts), golden[name], 1e-4)


def test_only_padding_rows_are_zero(encoder, prompts):
    embeds = np.asarray(embeds_of_prompts(encoder, *prompts))
    np.testing.assert_array_equal(np.any(embeds != 0, axis=-1), np.asarray(prompts[1]) == 1)


def test_padding_never_reaches_the_prompt(encoder, prompts):
    ids, mask = prompts
    other = jnp.where(mask == 1, ids, 55)
    assert not np.array_equal(ids, other)
    np.testing.assert_array_equal(embeds_of_prompts(encoder, ids, mask), embeds_of_prompts(encoder, other, mask))


def test_vmapped_equals_one_by_one(encoder, prompts):
    ids, mask = prompts
    together = embeds_of_prompts(encoder, ids, mask)
    one = nnx.jit(encode_prompt)
    for row in range(ids.shape[0]):
        assert_close(f"prompt {row}", together[row], one(encoder, ids[row], mask[row]), 1e-5)


def test_bfloat16_is_near_float32(encoder, golden_weights, prompts):
    half = load_encoder(GOLDEN_CONFIG, golden_weights, wan_umt5_rules(), jnp.bfloat16)
    result = embeds_of_prompts(half, *prompts)
    assert result.dtype == jnp.bfloat16
    exact = np.asarray(embeds_of_prompts(encoder, *prompts))
    error = np.asarray(result, np.float32) - exact
    relative = np.sqrt(np.mean(error**2) / np.mean(exact**2))
    assert relative < 0.02, f"relative error {relative:.3g}"  # bfloat16 keeps 8 bits: 0.004 a rounding


def test_matches_transformers():
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    theirs = transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=50, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2, dropout_rate=0.0)
    ).eval()
    with torch.no_grad():  # Norms and biases start as ones and small numbers, which would hide mistakes.
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    config = UMT5Config(vocab_size=50, dim=32, num_heads=4, head_dim=8, ffn_dim=48, num_layers=2)
    ours = load_encoder(config, theirs.state_dict(), transformers_umt5_rules())

    rng = np.random.default_rng(0)
    lengths, text_len = [1, 7, 60, 150], 150  # further apart than the last bucket's distance of 128
    mask = (np.arange(text_len) < np.array(lengths)[:, None]).astype(np.int32)
    ids = rng.integers(3, 50, mask.shape).astype(np.int32) * mask
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
    hidden = hidden_of_prompts(ours, jnp.asarray(ids), jnp.asarray(mask))
    for row, length in enumerate(lengths):
        assert_close(f"prompt of {length} tokens", hidden[row], expected[row].numpy(), 1e-4)


def test_buckets_of_a_small_case():
    buckets = relative_position_buckets(9, num_buckets=8, max_distance=8)
    np.testing.assert_array_equal(buckets[0], [0, 5, 6, 6, 7, 7, 7, 7, 7])
    np.testing.assert_array_equal(buckets[-1], [3, 3, 3, 3, 3, 2, 2, 1, 0])


@pytest.fixture(scope="module")
def xxl_target():
    return abstract_params(lambda: UMT5Encoder(UMT5Config(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))


@pytest.fixture(params=TABLES)
def xxl(request):
    shapes = json.loads((DATA / "checkpoint_keys" / f"{request.param}.json").read_text())
    return {key: tuple(shape) for key, shape in shapes.items()}, TABLES[request.param]()


def test_xxl_keys_fill_every_parameter(xxl, xxl_target):
    shapes, rules = xxl
    made = plan(shapes, rules, xxl_target)
    assert made.leaves.keys() == xxl_target.keys()
    assert made.unused == {key for key in shapes if key == "encoder.embed_tokens.weight"}
    assert made.size == sum(np.prod(shape) for key, shape in shapes.items() if key not in made.unused)
    assert xxl_target["layers.attention.position_bias"].shape == (24, 32, 64)
    assert {leaf.dtype.name for leaf in xxl_target.values()} == {"bfloat16"}


def test_a_missing_or_foreign_key_is_named(xxl, xxl_target):
    shapes, rules = xxl
    dropped = next(key for key in shapes if "17" in key and key.endswith("o.weight"))
    changed = {key: shape for key, shape in shapes.items() if key != dropped} | {"decoder.weight": (4096,)}
    with pytest.raises(WeightsError, match=r"decoder\.weight") as error:
        plan(changed, rules, xxl_target)
    assert "layers.attention.o.kernel[17]" in str(error.value)


def test_fresh_weights_give_moderate_logits():
    """A model trained from scratch starts with hidden states and attention of unit scale (no sqrt(D) division)."""
    config = UMT5Config(vocab_size=64, dim=64, num_heads=2, head_dim=32, ffn_dim=64, num_layers=2)
    fresh = UMT5Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    kernel = fresh.layers.attention.q.kernel[...]
    assert kernel.shape == (2, 64, 64)
    np.testing.assert_allclose(kernel.std(), (64 * 32) ** -0.5, rtol=0.05)
    assert not np.array_equal(kernel[0], kernel[1])
