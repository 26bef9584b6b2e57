"""The conversion engine, its sources, the LoRA, and every published layout from files to a loaded checkpoint."""

import argparse
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from published import (
    TINY,
    as_torch,
    dit_tensors,
    golden_lora,
    lora_tensors,
    random_tensors,
    umt5_tensors,
    vae_tensors,
    write_diffusers,
    write_wan,
)
from safetensors.numpy import save_file

from convert import hub
from convert.cli import add_convert_parser, run_convert
from convert.engine import Rule, convert, convert_pieces, plan
from convert.sources import DictSource, open_folder
from streamt1_jax.checkpoint import load_checkpoint, load_params
from streamt1_jax.errors import BadInputError, WeightsError
from streamt1_jax.networks import network_graph
from streamt1_jax.params_store import params_sha256


def struct_of(**shapes):
    return {key.replace("_", "."): jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()}


# --- engine ---------------------------------------------------------------------------------------------------


def test_six_refusals_in_one_error():
    rules = [
        Rule(r"block\.(?P<layer>\d+)\.w", "block.w", "linear"),
        Rule(r"in", "in.w"),
        Rule(r"also_in", "in.w"),
        Rule(r"two", "two.w"),
        Rule(r"tw.", "two.w"),
        Rule(r"lost", "nowhere.w"),
        Rule(r"bent", "bent.w", "linear"),
        Rule(r"conv", "conv.w", "conv3d"),
    ]
    target = struct_of(block_w=(4, 3, 2), in_w=(5,), two_w=(1,), bent_w=(3, 2), conv_w=(1, 1, 1, 2, 2), absent_w=(7,))
    source = {f"block.{i}.w": (2, 3) for i in (0, 1, 9)} | {f"odd.{i}.w": (1,) for i in range(12)}
    source |= {"in": (5,), "also_in": (5,), "two": (1,), "lost": (1,), "bent": (3, 2), "conv": (2, 2)}
    with pytest.raises(WeightsError) as error:
        plan(source, rules, target, name="thing")
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("thing: found 22 tensors that do not fit")
    for part in (
        "no rule: + odd.{0-11}.w (1,)",
        "two rules: + two by two and tw.",
        "unknown target: + block.9.w -> block.w[9], + lost -> nowhere.w",
        "target set twice: + in -> also_in -> in.w",
        "wrong shape: + bent -> bent.w (3, 2) as 'linear' is not (3, 2), + conv -> conv.w (2, 2) as 'conv3d' is not",
        "never set: - absent.w (7,), - block.w[{2-3}] (3, 2), - two.w (1,)",
    ):
        assert part in text, f"{part!r} is not in: {text}"


def test_target_set_whole_and_by_layer_is_set_twice():
    rules = [Rule(r"a\.(?P<layer>\d+)", "a.w"), Rule("a", "a.w")]
    with pytest.raises(WeightsError, match=r"target set twice: \+ a -> a\.0 -> a\.w"):
        plan({"a": (2, 3), "a.0": (3,)}, rules, struct_of(a_w=(2, 3)))


def test_plan_needs_no_memory():
    huge = (10**6, 10**6)
    made = plan({"w": huge}, [Rule("w", "w", "linear")], {"w": jax.ShapeDtypeStruct(huge, jnp.float32)})
    assert made.size == 10**12


def test_bfloat16_crosses_as_bits():
    """Every bit pattern there is, NaN payloads and subnormals too, transposed and not."""
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    x = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    source = DictSource({"a.0": x, "a.1": x, "b": x})
    rules = [Rule(r"a\.(?P<layer>\d)", "a", "linear"), Rule("b", "b")]
    target = {
        "a": jax.ShapeDtypeStruct((2, 256, 256), jnp.bfloat16),
        "b": jax.ShapeDtypeStruct((256, 256), jnp.bfloat16),
    }
    out = dict(convert(plan(source.shapes, rules, target), source, jnp.bfloat16))
    assert np.array_equal(out["a"].view(np.uint16), np.stack([bits.T, bits.T]))
    assert np.array_equal(out["b"].view(np.uint16), bits)


def test_a_cast_rounds_as_torch_does():
    x = random_tensors({"w": (70, 90)})["w"]
    made = plan({"w": x.shape}, [Rule("w", "w", "linear")], {"w": jax.ShapeDtypeStruct((90, 70), jnp.bfloat16)})
    (_, out), *_ = convert(made, DictSource({"w": x}), ml_dtypes.bfloat16)
    expected = torch.from_numpy(x.T.copy()).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(out.view(np.int16), expected)


@pytest.mark.parametrize("limit", [1, 100, 260, 10**6])
def test_pieces_are_the_whole_cut_along_the_first_axis(limit):
    tensors = random_tensors({"s.0": (5, 6), "s.1": (5, 6), "s.2": (5, 6), "w": (9, 7), "v": (3,)})
    rules = [Rule(r"s\.(?P<layer>\d)", "s", "linear"), Rule("w", "w", "linear"), Rule("v", "v")]
    target = struct_of(s=(3, 6, 5), w=(7, 9), v=(3,))
    made = plan({key: x.shape for key, x in tensors.items()}, rules, target)
    whole = dict(convert(made, DictSource(tensors), np.float32))
    joined: dict[str, list] = {}
    for path, start, array in convert_pieces(made, DictSource(tensors), np.float32, limit):
        assert array.nbytes <= limit or len(array) == 1
        assert start == sum(map(len, joined.setdefault(path, [])))
        joined[path].append(array)
    assert {path: np.concatenate(x).tolist() for path, x in joined.items()} == {k: x.tolist() for k, x in whole.items()}


def test_tensors_planned_but_never_read_are_a_bug():
    made = plan({"w": (1,)}, [Rule("w", "w")], struct_of(w=(1,)))
    with pytest.raises(AssertionError, match="never read"):
        list(convert(made, DictSource(random_tensors({"w": (1,), "extra": (1,)})), np.float32))


def test_quantised_weights_are_refused():
    made = plan({"w": (1,)}, [Rule("w", "w")], struct_of(w=(1,)))
    with pytest.raises(WeightsError, match="quantised"):
        list(convert(made, DictSource({"w": np.zeros(1, np.int8)}), np.float32))


# --- published layouts, from files to a loaded checkpoint -----------------------------------------------------


def cli(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    add_convert_parser(parser.add_subparsers())
    return run_convert(parser.parse_args(["convert", *map(str, argv)]))


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    return write_wan(tmp_path_factory.mktemp("wan") / "Wan2.1-T2V-tiny")


def loaded(out: Path, network: str) -> dict[str, np.ndarray]:
    state = load_params(load_checkpoint(out), network)
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def as_bfloat16(x: np.ndarray) -> list:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32).tolist()


def test_wan(tmp_path, wan, capsys):
    out = tmp_path / "new" / "out"
    assert cli("wan", "--source", wan, "--out", out, "--height", 32, "--width", 48) == 0
    assert str(out) in capsys.readouterr().out
    checkpoint = load_checkpoint(out)
    assert checkpoint.config == TINY
    summary = "Wan2.1-T2V-tiny, converted to bfloat16"
    assert checkpoint.manifest["origin"] == {"recipe": "wan", "summary": summary, "source": {"path": str(wan)}}
    assert (checkpoint.tokenizer_dir / "tokenizer.json").is_file()
    types = {name: entry["dtype"] for name, entry in checkpoint.manifest["networks"].items()}
    assert types == {"dit": "bfloat16", "vae": "float32", "text": "bfloat16"}

    dit, source = loaded(out, "dit"), dit_tensors()
    found = dit["blocks.cross_attn.k.kernel"][1].astype(np.float32).tolist()
    assert found == as_bfloat16(source["blocks.1.cross_attn.k.weight"].T)
    vae = vae_tensors()
    assert loaded(out, "vae")["decoder.conv_in.kernel"].size == vae["decoder.conv1.weight"].size
    text = loaded(out, "text")["token_embedding.embedding"]
    assert text.astype(np.float32).tolist() == as_bfloat16(umt5_tensors()["token_embedding.weight"])


def test_one_file_or_many_and_again_give_the_same_parameters(tmp_path, wan):
    single = write_wan(tmp_path / "single", sharded=False)
    hashes = []
    for i, source in enumerate((wan, single, single)):
        cli("wan", "--source", source, "--out", tmp_path / f"out{i}", "--dtype", "float32")
        networks = load_checkpoint(tmp_path / f"out{i}").manifest["networks"]
        hashes.append({name: entry["params_sha256"] for name, entry in networks.items()})
    assert hashes[0] == hashes[1] == hashes[2]
    assert hashes[0]["dit"] == params_sha256(load_params(load_checkpoint(tmp_path / "out0"), "dit"))


def test_longlive_with_averaged_wrapped_weights_and_a_lora(tmp_path, wan):
    trained, averaged = as_torch(dit_tensors("model.")), as_torch(dit_tensors("model._fsdp_wrapped_module."))
    averaged = {key: 2 * x for key, x in averaged.items()}
    torch.save({"generator": trained, "generator_ema": averaged}, tmp_path / "base.pt")
    torch.save({"generator_lora": as_torch(lora_tensors())}, tmp_path / "lora.pt")
    given = ["longlive", "--base", wan, "--generator", tmp_path / "base.pt", "--dtype", "float32"]
    cli(*given, "--lora", tmp_path / "lora.pt", "--lora-alpha", 6, "--out", tmp_path / "out")
    cli(*given, "--no-ema", "--out", tmp_path / "plain")

    origin = load_checkpoint(tmp_path / "out").manifest["origin"]
    assert (origin["generator"]["key"], origin["ema"]) == ("generator_ema", True)
    assert origin["summary"] == "Causal generator base.pt with LoRA lora.pt on Wan2.1-T2V-tiny, converted to float32"
    assert origin["lora"]["merged"]
    assert (origin["lora"]["ranks"], origin["lora"]["alpha"]) == ([3], 6.0)
    assert len(origin["lora"]["sha256"]) == 64
    plain = load_checkpoint(tmp_path / "plain").manifest["origin"]
    assert (plain["generator"]["key"], plain["ema"], plain["lora"]) == ("generator", False, {"merged": False})
    assert plain["summary"] == "Causal generator base.pt on Wan2.1-T2V-tiny, converted to float32"

    base, lora = dit_tensors(), lora_tensors()
    key = "blocks.1.self_attn.o"
    a, b = (lora[f"base_model.model.{key}.lora_{half}.weight"] for half in "AB")
    expected = 2 * base[key + ".weight"] + 2 * (b @ a)
    np.testing.assert_allclose(
        loaded(tmp_path / "out", "dit")["blocks.self_attn.o.kernel"][1], expected.T, rtol=1e-5, atol=1e-5
    )
    plain_kernel = loaded(tmp_path / "plain", "dit")["blocks.self_attn.o.kernel"][1]
    assert plain_kernel.tolist() == base[key + ".weight"].T.tolist()


def test_choices_that_a_generator_needs(tmp_path, wan):
    torch.save(
        {"generator": as_torch(dit_tensors("model.")), "generator_lora": as_torch(lora_tensors())}, tmp_path / "both.pt"
    )
    given = ["longlive", "--base", wan, "--generator", tmp_path / "both.pt", "--out", tmp_path / "out"]
    with pytest.raises(WeightsError, match="--no-lora"):
        cli(*given)
    for options in (["--lora", "a", "--lora", "b"], ["--lora", "a", "--no-lora"], ["--lora-alpha", 3]):
        with pytest.raises(BadInputError, match="expected"):
            cli(*given, *options)
    with pytest.raises(BadInputError, match="above 0"):
        cli(*given, "--lora", "a", "--lora-alpha", -1)
    cli(*given, "--lora", tmp_path / "both.pt")
    with pytest.raises(WeightsError, match="converted checkpoint"):
        cli("longlive", "--base", wan, "--generator", tmp_path / "out", "--lora", tmp_path / "both.pt", "--out", "x")


def test_golden_lora_from_files_to_a_forward_pass(tmp_path):
    """The recorded flow, from a LongLive generator and a LoRA on disk."""
    parts, case = golden_lora()
    base = write_wan(tmp_path / "base", dit=parts["base"])
    wide = {
        key: np.zeros([case["dit"]["text_dim"] if n == 16 else n for n in x.shape], np.float32)
        for key, x in umt5_tensors().items()
    }
    torch.save(as_torch(wide), base / "models_t5_umt5-xxl-enc-bf16.pth")
    (base / "config.json").write_text(json.dumps(case["dit"]))
    torch.save({"generator": as_torch(parts["base"])}, tmp_path / "base.pt")
    torch.save(as_torch(parts["lora"]), tmp_path / "lora.pt")
    given = ["--base", base, "--generator", tmp_path / "base.pt", "--lora", tmp_path / "lora.pt"]
    cli("longlive", *given, "--lora-alpha", case["alpha"], "--dtype", "float32", "--out", tmp_path / "out")

    checkpoint = load_checkpoint(tmp_path / "out")
    graphdef, _ = network_graph(checkpoint.config, "dit", jnp.dtype("float32"))

    @jax.jit
    def flow(params, x, text, timesteps):
        dit = nnx.merge(graphdef, params)
        return dit(x, dit.encode_time(timesteps), dit.encode_text(text), None, jnp.int32(0))

    run = parts[""]
    timesteps = np.full(3, run["timestep"], np.float32)
    found = flow(load_params(checkpoint, "dit"), run["x"][0], run["prompt_embeds"][0], timesteps)
    error = np.abs(np.asarray(found) - run["flow"][0]).max()
    assert error < 1e-4, f"flow: max error {error:.2e}"


def test_diffusers(tmp_path):
    source = write_diffusers(tmp_path / "source")
    assert len(list((source / "transformer").glob("*.safetensors"))) > 1
    size = ["--height", TINY.height, "--width", TINY.width]
    cli("diffusers", "--source", source, "--out", tmp_path / "out", "--dtype", "float32", *size)
    checkpoint = load_checkpoint(tmp_path / "out")
    assert checkpoint.config == TINY
    assert checkpoint.manifest["origin"]["summary"] == "source in the diffusers format, converted to float32"
    theirs = open_folder(source / "transformer")
    found = loaded(tmp_path / "out", "dit")["blocks.ffn_in.kernel"][0]
    assert found.tolist() == theirs.read("blocks.0.ffn.net.0.proj.weight").T.tolist()
    text = open_folder(source / "text_encoder").read("shared.weight")
    assert loaded(tmp_path / "out", "text")["token_embedding.embedding"].tolist() == text.astype(np.float32).tolist()


def test_keys_that_do_not_fit_write_nothing(tmp_path, wan):
    folder = tmp_path / "wan"
    shutil.copytree(wan, folder)
    for file in folder.glob("diffusion_pytorch_model*"):
        file.unlink()
    dit = dit_tensors()
    dit["img_emb.proj.0.weight"] = dit.pop("head.head.bias")
    dit["blocks.0.modulation"] = dit["blocks.0.modulation"][..., :-1].copy()
    save_file(dit, folder / "diffusion_pytorch_model.safetensors")
    text = as_torch(umt5_tensors(), "bfloat16")
    del text["norm.weight"]
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(WeightsError) as error:
        cli("wan", "--source", folder, "--out", tmp_path / "out")
    for part in (
        "+ img_emb.proj.0.weight",
        "- head.projection.bias",
        "blocks.0.modulation -> blocks.modulation[0]",
        "text: found 1",
        "- norm.scale",
    ):
        assert part in str(error.value), f"{part!r} is not in {error.value}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wan"]


def test_sizes_without_a_config(tmp_path):
    """Heads of 128, as in every published size; another width must say its heads."""
    shapes = {key: x.shape for key, x in dit_tensors().items()}
    from convert.sizes import wan_dit_config

    with pytest.raises(WeightsError, match="num_heads"):
        wan_dit_config(shapes, {})
    with pytest.raises(WeightsError, match="model_type 'i2v', not 't2v'"):
        wan_dit_config(shapes, {"model_type": "i2v"})
    with pytest.raises(WeightsError, match=r"patch_embedding\.weight is missing"):
        wan_dit_config({}, {"num_heads": 2})


def test_a_source_that_lacks_parts(tmp_path, wan):
    """One error names all that a folder lacks, with the command that downloads just that, into it."""
    folder = tmp_path / "wan"
    shutil.copytree(wan, folder)
    (folder / "Wan2.1_VAE.pth").unlink()
    (folder / "google" / "umt5-xxl" / "tokenizer.json").unlink()
    missing = r"Wan2\.1_VAE\.pth{} google/umt5-xxl/tokenizer\.json"
    command = rf"`hf download {hub.WAN} {missing.format('')} --local-dir {folder}`"
    with pytest.raises(WeightsError, match=rf"{folder}: no {missing.format(',')}, expected .*: {command}"):
        cli("wan", "--source", folder, "--out", tmp_path / "out")
    for file in folder.glob("diffusion_pytorch_model*"):
        file.unlink()
    with pytest.raises(WeightsError, match=r"no diffusion_pytorch_model\.safetensors, Wan2\.1_VAE\.pth"):
        cli("wan", "--source", folder, "--out", tmp_path / "out")
    with pytest.raises(WeightsError, match=rf"no transformer/config\.json, .*`hf download {hub.WAN_DIFFUSERS} "):
        cli("diffusers", "--source", folder, "--out", tmp_path / "out")


def test_a_repository_that_lacks_parts(tmp_path, fake_hub):
    with pytest.raises(WeightsError, match=rf"some/repo: no transformer/config\.json.* such as {hub.WAN_DIFFUSERS}"):
        cli("diffusers", "--source", "some/repo", "--out", tmp_path / "out")


def test_networks_of_different_models(tmp_path, wan):
    folder = tmp_path / "wan"
    shutil.copytree(wan, folder)
    wide = random_tensors({key: tuple(32 if n == 16 else n for n in x.shape) for key, x in umt5_tensors().items()})
    torch.save(as_torch(wide), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(WeightsError, match=r"text_dim 16 differs from text\.dim 32"):
        cli("wan", "--source", folder, "--out", tmp_path / "out")


def test_a_tokenizer_that_generating_would_refuse(tmp_path, wan):
    """A tokenizer with more tokens than the embedding has rows, or of no kind that generating opens."""
    folder = tmp_path / "wan"
    shutil.copytree(wan, folder)
    text = umt5_tensors()
    text["token_embedding.weight"] = text["token_embedding.weight"][:724].copy()
    torch.save(as_torch(text, "bfloat16"), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(WeightsError, match=r"has id 724 .*vocabulary of 724"):
        cli("wan", "--source", folder, "--out", tmp_path / "out")
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="cannot be read as a tokenizer"):
        cli("wan", "--source", folder, "--out", tmp_path / "out")
    (folder / "google" / "umt5-xxl" / "tokenizer.json").rename(folder / "google" / "umt5-xxl" / "spiece.model")
    with pytest.raises(WeightsError, match=r"no google/umt5-xxl/tokenizer\.json"):
        cli("wan", "--source", folder, "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wan"]


# --- hub ------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def fake_hub(tmp_path, monkeypatch, wan):
    """A hub whose every repository holds the tiny Wan folder and one generator; records what it was asked."""
    asked = []
    snapshot = tmp_path / "snapshots" / COMMIT
    snapshot.parent.mkdir()
    shutil.copytree(wan, snapshot)
    (snapshot / "models").mkdir()
    torch.save({"generator": as_torch(dit_tensors("model."))}, snapshot / "models" / "longlive_base.pt")

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_hub_revisions_are_recorded_as_commits(tmp_path, fake_hub):
    out = tmp_path / "out"
    given = ["--base", "Wan-AI/Wan2.1-T2V-1.3B", "--generator", hub.LONGLIVE, "--out", out]
    with pytest.raises(BadInputError, match=r"LongLive 2\.0.*--revision"):
        cli("longlive", *given)
    with pytest.raises(BadInputError, match=r"LongLive 2\.0"):
        cli("longlive", *given, "--revision", "main")
    cli("longlive", *given, "--revision", "abc")
    assert fake_hub[-1] == (hub.LONGLIVE, "abc", ["models/longlive_base.pt"])
    base = next(call for call in fake_hub if call[0].startswith("Wan-AI"))
    assert base[1] == "main"
    assert not any(pattern.startswith("diffusion") for pattern in base[2])  # The base's own DiT is not needed.
    origin = load_checkpoint(out).manifest["origin"]
    assert origin["base"] == {"repo": "Wan-AI/Wan2.1-T2V-1.3B", "revision": COMMIT}
    assert origin["generator"]["revision"] == COMMIT


def test_bad_options_are_met_before_a_download(tmp_path, fake_hub):
    given = ["wan", "--source", "Wan-AI/Wan2.1-T2V-14B"]
    with pytest.raises(BadInputError, match="exists"):
        cli(*given, "--out", tmp_path)
    with pytest.raises(BadInputError, match="33"):
        cli(*given, "--out", tmp_path / "out", "--height", 33)
    assert not fake_hub


def test_a_file_of_any_repository(fake_hub):
    located = hub.locate_file("some/repo:models/longlive_base.pt", None, hub.GENERATOR_FILES)
    assert located.path.is_file()
    assert located.origin == {"repo": "some/repo", "revision": COMMIT, "file": "models/longlive_base.pt"}
    for wrong in ("some/repo", "some/repo:../x", "nothing", "some/repo:/etc/passwd"):
        with pytest.raises(WeightsError, match="does not exist, expected a file"):
            hub.locate_file(wrong, None, hub.GENERATOR_FILES)


def test_offline_without_a_cache_is_one_line(tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("Cannot reach the server\nand more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(WeightsError, match=r"Wan-AI/Wan2.1-T2V-14B at revision main: .* could not be fetched") as error:
        cli("wan", "--source", "Wan-AI/Wan2.1-T2V-14B", "--out", tmp_path / "out")
    assert "\n" not in str(error.value)
