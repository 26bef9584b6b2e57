"""`streamt1 parity`: the recorded reference run and its parts match, and the least change to them does not.

tests/data holds the recorded files cut down: the video has every 13th frame, the VAE's encoder is that of another case
(a decoder does not mind), a LoRA case has the merged weights of one block. They are put together again here.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close
from flax import nnx
from reference_longlive import ReferenceLongLive
from safetensors.numpy import load_file, save_file

from convert.engine import build
from convert.vae_table import wan_vae_rules
from streamt1_jax import parity_search
from streamt1_jax.config import VAEConfig
from streamt1_jax.errors import BadInputError, WeightsError
from streamt1_jax.models.vae import WanVAE
from streamt1_jax.parity import replay, run_parity
from streamt1_jax.recorded_case import LATENT_TOLERANCE, PIXEL_TOLERANCE, close, equal

DATA = Path(__file__).parent / "data"


def recorded_run() -> tuple[dict[str, np.ndarray], dict]:
    """The whole of `stream_t1_a` but its video."""
    other = load_file(DATA / "vae.safetensors")
    tensors = {key: x for key, x in other.items() if key.startswith(("vae.encoder.", "vae.conv1."))}
    for part in ("dit", "vae", "run"):
        tensors |= load_file(DATA / f"stream_t1_a_{part}.safetensors")
    return tensors, json.loads((DATA / "stream_t1_a.json").read_text())


def first_chunk() -> tuple[dict[str, np.ndarray], dict]:
    """The run's first chunk as a case of its own: the same candidates, of which one beam is kept.

    Nothing of it depends on what follows: a video of one chunk has the same fusion weight there, 0.
    """
    tensors, sizes = recorded_run()
    candidates = [c for c in sizes["candidates"] if c["chunk"] == 0]
    best = max(candidates, key=lambda c: c["score"])
    assert [seeds[0] for seeds in sizes["history_seeds"]] == [best["seed"]] * 2
    kept = {"history_seeds": [[best["seed"]]], "final_scores": [best["score"]], "candidates": candidates}
    config = sizes["config"] | {"beams": 1, "candidates_per_beam": len(candidates), "chunks": 1}
    tensors["beam0.latents"] = tensors["beam0.latents"][:, :3]
    return tensors, sizes | kept | {"config": config}


def lora_case() -> tuple[dict[str, np.ndarray], dict]:
    """With the merged weights that were cut away, by the formula: W + (alpha / rank) B A."""
    tensors, sizes = load_file(DATA / "lora.safetensors"), json.loads((DATA / "lora.json").read_text())
    for key in [key for key in tensors if key.startswith("base.")]:
        weight, name = tensors[key], key.removeprefix("base.").removesuffix(".weight")
        lora = "lora.base_model.model." + name.removeprefix("model.")
        if f"{lora}.lora_A.weight" in tensors:
            a, b = (tensors[f"{lora}.lora_{half}.weight"] for half in "AB")
            weight = weight + sizes["alpha"] / sizes["rank"] * (b @ a)
        tensors.setdefault("merged." + key.removeprefix("base."), weight.astype(np.float32))
    return tensors, sizes


def vae_case() -> tuple[dict[str, np.ndarray], None]:
    tensors = load_file(DATA / "vae.safetensors")
    tensors["video"] = np.clip(tensors["video_unclamped"], -1, 1).transpose(0, 2, 1, 3, 4)
    return tensors, None


def umt5_case() -> tuple[dict[str, np.ndarray], None]:
    return load_file(DATA / "umt5.safetensors"), None


def switch_case() -> tuple[dict[str, np.ndarray], dict]:
    return load_file(DATA / "interactive_a.safetensors"), json.loads((DATA / "interactive_a.json").read_text())


KINDS = {
    "first_chunk": first_chunk,
    "switches": switch_case,
    "lora": lora_case,
    "vae": vae_case,
    "umt5": umt5_case,
}


def write(folder: Path, tensors, sizes) -> str:
    path = folder / "case.safetensors"
    save_file({key: np.array(x, order="C") for key, x in tensors.items()}, path)
    if sizes is not None:
        path.with_suffix(".json").write_text(json.dumps(sizes))
    return str(path)


def assert_matches(path: str, capsys) -> None:
    code = run_parity(path)
    out = capsys.readouterr().out
    assert code == 0, out
    assert "MISMATCH" not in out
    count = out.count("  ok\n")
    assert f"{count} of {count} quantities match" in out


@pytest.mark.parametrize("kind", ["switches", "lora", "vae", "umt5"])
def test_a_recorded_case_matches(kind, tmp_path, capsys):
    assert_matches(write(tmp_path, *KINDS[kind]()), capsys)


def test_switches_that_keep_the_sink_match_a_plain_longlive(tmp_path, capsys):
    """The recorded run replaces the sink; the other policy is that of a reference which makes the recorded run too."""
    tensors, sizes = switch_case()
    recorded, reference = tensors["latents"][0], ReferenceLongLive(tensors, sizes)
    assert not sizes["global_sink"]
    assert_close("sink replaced", reference.run(global_sink=False), recorded, LATENT_TOLERANCE)
    kept = reference.run(global_sink=True)
    first, second = sizes["switch_frames"]
    assert_close("the first switch reaches back to the start", kept[first:second], recorded[first:second], 1e-4)
    assert np.abs(kept[second:] - recorded[second:]).max() > 0.1, "both policies make the same"
    tensors["latents"], sizes["global_sink"] = kept[None].astype(np.float32), True
    assert_matches(write(tmp_path, tensors, sizes), capsys)


def test_a_chunk_matches_and_a_changed_record_of_it_does_not(tmp_path, capsys, monkeypatch):
    """One change each of three candidates: a flag, a seed, a sink."""
    results = []
    run_search = parity_search.run_search
    monkeypatch.setattr(parity_search, "run_search", lambda *args: results.append(run_search(*args)) or results[-1])
    tensors, sizes = first_chunk()
    assert_matches(write(tmp_path, tensors, sizes), capsys)

    # A program with rewards on the host is compiled every time, and what it gives is the same.
    monkeypatch.setattr(parity_search, "run_search", lambda *args: results[0])
    sizes["candidates"][2]["ema"] = True
    sizes["candidates"][3]["seed"] = 99
    sizes["candidates"][0]["sink_starts"] = [3]
    assert run_parity(write(tmp_path, tensors, sizes)) == 1
    wrong = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("MISMATCH")]
    assert sorted(wrong) == ["candidates' EMA flags", "candidates' seeds", "starts of appended sinks"]


def add(key: str, amount: float, at=0):
    """Changes one number of a tensor."""

    def change(tensors, sizes):
        changed = tensors[key].copy()
        changed.ravel()[at] += amount
        tensors[key] = changed

    return change


CHANGES = {
    "weight": ("first_chunk", add("dit.model.blocks.1.self_attn.v.bias", 1e-2), {"latents"}),
    "switch_prompt": ("switches", add("prompt_embeds", 1.0, at=-1), {"latents of frames 18 to 26"}),
    "lora_alpha": ("lora", lambda tensors, sizes: sizes.update(alpha=17), {"merged weights", "flow"}),
    "vae_latent": ("vae", add("latents", 1e-2), {"decoded video"}),
    "vae_pixel": ("vae", add("encoded", 2e-4), {"encoded latents"}),
    "umt5_hidden": ("umt5", add("hidden", 2e-4, at=-1), {"hidden states"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_case_does_not_match(change, tmp_path, capsys):
    kind, apply, quantities = CHANGES[change]
    tensors, sizes = KINDS[kind]()
    apply(tensors, sizes)
    assert run_parity(write(tmp_path, tensors, sizes)) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.endswith("MISMATCH")]
    for quantity in quantities:
        assert any(quantity in line for line in wrong), f"{quantity} matched: {wrong}"


@pytest.mark.slow
def test_the_whole_recorded_run_matches(tmp_path):
    """10 chunks, 2 beams of 2 candidates, every route: each quantity, the video last."""
    tensors, sizes = recorded_run()
    comparisons = {c.quantity: c for c in replay(write(tmp_path, tensors, sizes))}
    wrong = {name: c.error for name, c in comparisons.items() if not c.matches}
    assert not wrong
    assert comparisons["candidates' seeds"].count == len(sizes["candidates"]) == 40
    assert comparisons["beam 0 latents"].count == tensors["beam0.latents"].size
    assert {"short scores", "fused scores", "candidates' parents", "kept beams' seeds"} <= set(comparisons)


def test_the_recorded_video_is_that_of_the_recorded_latents():
    tensors, sizes = recorded_run()
    fields = {key: sizes["vae"][key] for key in ("dim", "z_dim", "num_res_blocks")}
    lists = {key: tuple(sizes["vae"][key]) for key in ("dim_mult", "temporal_downsample")}
    config = VAEConfig(**fields, **lists)
    weights = {key.removeprefix("vae."): x for key, x in tensors.items() if key.startswith("vae.")}
    vae = build(lambda: WanVAE(config, rngs=nnx.Rngs(0)), wan_vae_rules(config), weights)
    video = jax.jit(vae.decoder.decode)(jnp.asarray(tensors["beam0.latents"][0]))
    assert_close("every 13th frame", video[::13], tensors["video_every_13"], PIXEL_TOLERANCE)


class TestRefusals:
    def test_no_file(self, tmp_path):
        with pytest.raises(BadInputError, match="not a file"):
            replay(tmp_path / "none.safetensors")

    def test_not_safetensors(self, tmp_path):
        (tmp_path / "case.safetensors").write_bytes(b"not a header")
        with pytest.raises(BadInputError, match="cannot be read"):
            replay(tmp_path / "case.safetensors")

    @pytest.mark.parametrize("notes", ["{", "[1, 2]"])
    def test_broken_notes(self, tmp_path, notes):
        path = write(tmp_path, {"x": np.zeros(1)}, {})
        Path(path).with_suffix(".json").write_text(notes)
        with pytest.raises(BadInputError, match="cannot be read"):
            replay(path)

    def test_no_known_kind(self, tmp_path):
        with pytest.raises(BadInputError, match="expected a recorded"):
            replay(write(tmp_path, {"x": np.zeros(1)}, {}))

    @pytest.mark.parametrize("key", ["seeds", "prompt_embeds"])
    def test_a_missing_tensor_is_named(self, tmp_path, key):
        tensors, sizes = first_chunk()
        del tensors[key]
        with pytest.raises(BadInputError, match=key):
            replay(write(tmp_path, tensors, sizes))

    def test_a_setting_that_is_not_ours(self, tmp_path):
        tensors, sizes = first_chunk()
        sizes["config"]["temperature"] = 2
        with pytest.raises(BadInputError, match="temperature"):
            replay(write(tmp_path, tensors, sizes))

    def test_a_network_that_is_not_ours(self, tmp_path):
        tensors, sizes = first_chunk()
        sizes["dit"]["patch_size"] = [1, 4, 4]
        with pytest.raises(BadInputError, match="patch_size"):
            replay(write(tmp_path, tensors, sizes))

    def test_weights_of_another_size(self, tmp_path):
        tensors, sizes = first_chunk()
        sizes["dit"]["num_layers"] = 4
        with pytest.raises(WeightsError, match=r"blocks\.modulation\[3\]|blocks"):
            replay(write(tmp_path, tensors, sizes))


class TestComparison:
    def test_nan_never_matches(self):
        assert not close("x", [1.0, np.nan], [1.0, np.nan], 1.0).matches
        assert not close("x", [1.0, np.nan], [1.0, 2.0], np.inf).matches

    def test_another_shape_never_matches(self):
        assert not close("x", np.zeros((2, 3)), np.zeros((3, 2)), 1.0).matches
        assert not close("x", np.zeros(3), np.zeros((1, 3)), 1.0).matches

    def test_the_largest_difference_counts(self):
        got = close("x", [1.0, 2.0, 3.0], [1.0, 2.5, 3.25], 0.5)
        assert (got.error, got.count, got.matches) == (0.5, 3, True)

    def test_entries_that_differ_are_counted(self):
        assert equal("x", [1, 2, 3], [1, 2, 3]).matches
        assert equal("x", [1, 2, 4], [1, 2, 3]).error == 1
        assert equal("x", [1, 2], [1, 2, 3]).error == 1
        assert equal("x", [True, None], [1, 0]).error == 1
