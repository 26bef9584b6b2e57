"""From published files to a video, through the command itself: every layout, and every fault of the files.

The networks are tiny, of random weights and of the same sizes in every layout, so that programs are compiled once.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_equal
from flax import nnx
from PIL import Image
from published import (
    TINY,
    TOKENIZER,
    as_torch,
    dit_tensors,
    lora_tensors,
    umt5_tensors,
    vae_tensors,
    write_diffusers,
    write_wan,
)
from safetensors.numpy import save_file

from convert.dit_table import wan_dit_rules
from convert.engine import build
from convert.umt5_table import wan_umt5_rules
from convert.vae_table import wan_vae_rules
from streamt1_jax import cli, generate
from streamt1_jax.checkpoint import load_checkpoint
from streamt1_jax.models.dit import CausalWanDiT
from streamt1_jax.models.umt5 import UMT5Encoder
from streamt1_jax.models.vae import WanVAE
from streamt1_jax.pipeline import StreamT1Pipeline
from streamt1_jax.result import Output
from streamt1_jax.video import read_video

PROMPT = "a red circle moves right"
FRAMES = 21  # Two chunks: the second has a parent and a noise prior.
SIZE, FLOAT32 = ("--height", TINY.height, "--width", TINY.width), ("--dtype", "float32")
DIT, TEXT, VAE = (
    "diffusion_pytorch_model-00001-of-00002.safetensors",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "Wan2.1_VAE.pth",
)


def streamt1(*argv: object) -> int:
    return cli.main([*map(str, argv)])


def write_published(folder: Path) -> Path:
    """The files of the Wan release, a LongLive generator whose averaged weights are the release's, and a LoRA."""
    folder.mkdir()
    write_wan(folder / "wan")
    averaged = as_torch(dit_tensors("model._fsdp_wrapped_module."))
    trained = {key: 2 * x for key, x in as_torch(dit_tensors("model.")).items()}
    torch.save({"generator": trained, "generator_ema": averaged}, folder / "base.pt")
    # Small beside the weights, as a trained one is.
    torch.save({"generator_lora": {k: 0.1 * x for k, x in as_torch(lora_tensors()).items()}}, folder / "lora.pt")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Not to be changed."""
    return write_published(tmp_path_factory.mktemp("published") / "files")


# --- from files to a video ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A conversion and the video made with it."""

    checkpoint: Path
    video: Path
    output: Output


@pytest.fixture(scope="module")
def make(tmp_path_factory, published) -> Callable[[str], Made]:
    """Converts a layout and generates with it, once."""
    folder = tmp_path_factory.mktemp("made")
    wan, generator, lora = (published / name for name in ("wan", "base.pt", "lora.pt"))
    layouts = {
        "wan": lambda: ("wan", "--source", wan, *FLOAT32),
        "longlive": lambda: ("longlive", "--base", wan, "--generator", generator, "--lora", lora, *FLOAT32),
        "diffusers": lambda: ("diffusers", "--source", write_diffusers(folder / "published-diffusers")),
    }

    @functools.cache
    def made(layout: str) -> Made:
        checkpoint, video, seen = folder / layout, folder / f"{layout}.mp4", []
        assert streamt1("convert", *layouts[layout](), "--out", checkpoint, *SIZE) == 0
        save = generate.save_result
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generate, "save_result", lambda out, *args, **kw: seen.append(out) or save(out, *args, **kw))
            argv = ("generate", PROMPT, "--checkpoint", checkpoint, "--out", video, "--frames", FRAMES)
            assert streamt1(*argv) == 0
        return Made(checkpoint, video, *seen)

    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "summary"),
    [
        ("wan", "wan, converted to float32"),
        ("longlive", "Causal generator base.pt with LoRA lora.pt on wan, converted to float32"),
        ("diffusers", "published-diffusers in the diffusers format, converted to bfloat16"),
    ],
    ids=["wan", "longlive", "diffusers"],
)
def test_every_layout_becomes_a_video(make, layout, summary):
    made = make(layout)
    assert read_video(made.video)[0].shape == (FRAMES, TINY.height, TINY.width, 3)
    with Image.open(made.video.with_suffix(".png")) as picture:
        picture.verify()
    record = json.loads(made.video.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    weights = record["weights"]
    assert (weights["origin"]["recipe"], weights["summary"]) == (layout, summary)
    networks = load_checkpoint(made.checkpoint).manifest["networks"]
    assert weights["params_sha256"] == {name: entry["params_sha256"] for name, entry in networks.items()}
    assert np.isfinite(made.output.latents).all()
    assert made.output.latents.std() > 0.1


@pytest.mark.slow
def test_a_lora_changes_the_latents(make, published, tmp_path):
    """Without it the generator's averaged weights are those of the Wan release, whose latents are there already."""
    argv = ("longlive", "--base", published / "wan", "--generator", published / "base.pt")
    assert streamt1("convert", *argv, *FLOAT32, "--out", tmp_path / "plain") == 0
    plain, wan, merged = map(dit_hash, (tmp_path / "plain", make("wan").checkpoint, make("longlive").checkpoint))
    assert plain == wan != merged
    difference = np.abs(make("wan").output.latents - make("longlive").output.latents)
    assert difference.mean() > 1e-3


class InMemory:
    """The weights of the Wan release straight from their tensors: no file, no checkpoint."""

    config, tokenizer, default_rewards, own_rewards = TINY, TOKENIZER, "native", None

    def generator_params(self, dtype):
        dit = build(lambda: CausalWanDiT(TINY.dit, dtype=dtype, rngs=nnx.Rngs(0)), wan_dit_rules(), dit_tensors())
        vae = build(lambda: WanVAE(TINY.vae, dtype=dtype, rngs=nnx.Rngs(0)), wan_vae_rules(TINY.vae), vae_tensors())
        return {"dit": nnx.split(dit)[1], "decoder": nnx.split(vae.decoder)[1]}

    def text_params(self, dtype):
        tensors = as_torch(umt5_tensors(), "bfloat16")  # As published.
        text = build(lambda: UMT5Encoder(TINY.text, dtype=dtype, rngs=nnx.Rngs(0)), wan_umt5_rules(), tensors)
        return nnx.split(text)[1]

    def describe(self):
        return {"name": "in memory", "summary": "built in memory"}


@pytest.mark.slow
def test_a_checkpoint_generates_what_its_tensors_do(make):
    expected = StreamT1Pipeline(InMemory())(PROMPT, frames=FRAMES)
    found = make("wan").output
    assert found.trace.winner == expected.trace.winner
    assert_equal("latents", found.latents, expected.latents)
    assert_equal("frames", found.frames, expected.frames)


def dit_hash(checkpoint: Path) -> str:
    return load_checkpoint(checkpoint).manifest["networks"]["dit"]["params_sha256"]


def test_a_second_conversion_needs_overwrite_and_is_equal(published, tmp_path, capsys):
    argv = ("convert", "wan", "--source", published / "wan", "--out", tmp_path / "out")
    assert streamt1(*argv) == 0
    before = load_checkpoint(tmp_path / "out").manifest["networks"]
    capsys.readouterr()
    assert streamt1(*argv) == 2
    assert "--overwrite" in one_line(capsys)
    assert streamt1(*argv, "--overwrite") == 0
    assert load_checkpoint(tmp_path / "out").manifest["networks"] == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- faults of the files (FAULTS rows 15, 16, 18, 19, 20) -----------------------------------------------------

WAN = ("wan", "--source", "wan")
PLAIN = ("longlive", "--base", "wan", "--generator", "base.pt")
LORA = (*PLAIN, "--lora", "lora.pt")
SELF_FORCING = "`hf download gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt --local-dir Self-Forcing`"
LONGLIVE = "`hf download Efficient-Large-Model/LongLive models/{} --revision COMMIT --local-dir LongLive`"


@pytest.fixture
def files(published, tmp_path, monkeypatch) -> Path:
    """A copy of the published files to break, which is the working folder; results are to go to its sibling."""
    shutil.copytree(published, tmp_path / "files")
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


def one_line(capsys) -> str:
    """What a failed command printed: one line, no traceback."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("streamt1: error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def refused(capsys, files: Path, *argv: object, code: int = 3) -> str:
    """The error of a conversion that must fail and leave nothing behind."""
    found = streamt1("convert", *argv, "--out", files.parent / "results" / "out")
    line = one_line(capsys)
    assert found == code, line
    assert not list((files.parent / "results").iterdir())
    return line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("wan", "--source", "no/such/dir"), "`hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir Wan2.1-T2V-1.3B`"),
        (("wan", "--source", "base.pt"), "'base.pt' is a file, expected a folder"),
        (("diffusers", "--source", "nodir"), "`hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir"),
        (("diffusers", "--source", "wan"), "no transformer/config.json, vae/config.json"),
        (("longlive", "--base", "nodir", "--generator", "base.pt"), "`hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir"),
        (("longlive", "--base", "wan", "--generator", "nofile.pt"), SELF_FORCING),
        (("longlive", "--base", "wan", "--generator", "nofile.pt"), LONGLIVE.format("longlive_base.pt")),
        (("longlive", "--base", "wan", "--generator", "wan"), "'wan' is a folder, expected a weights file"),
        ((*PLAIN, "--lora", "nofile.pt"), LONGLIVE.format("lora.pt")),
        ((*PLAIN, "--lora", ""), "'' does not exist"),
        (("longlive", "--base", "wan", "--generator", "x" * 300), "x' does not exist"),
        (("wan", "--source", "x" * 300), "x' does not exist"),
    ],
)
def test_row_15_missing_weights_tell_the_command(capsys, files, argv, words):
    assert words in refused(capsys, files, *argv)


@pytest.mark.parametrize("name", [TEXT, VAE, "google/umt5-xxl/tokenizer.json", DIT])
def test_row_15_missing_files_of_a_folder(capsys, files, name):
    (files / "wan" / name).unlink()
    line = refused(capsys, files, *WAN)
    assert name in line
    assert ("Download the missing files" if name == DIT else f"`hf download Wan-AI/Wan2.1-T2V-1.3B {name} ") in line


def test_row_15_generating_without_a_checkpoint(capsys, files):
    argv = ("generate", PROMPT, "--checkpoint", "none", "--out", files.parent / "results" / "out.mp4")
    assert streamt1(*argv) == 3
    assert "streamt1 convert " in one_line(capsys)
    assert not list((files.parent / "results").iterdir())


BROKEN = {
    "empty": b"",
    "web page": b"<!DOCTYPE html><html></html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    "truncated": None,
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("name", [f"wan/{DIT}", f"wan/{TEXT}", "base.pt", "lora.pt"])
def test_row_16_broken_files(capsys, files, name, how):
    path, size = files / name, (files / name).stat().st_size
    path.write_bytes(path.read_bytes()[:-100] if how == "truncated" else BROKEN[how])
    line = refused(capsys, files, *(WAN if name.endswith(DIT) else LORA))
    assert path.name in line
    assert f"found {path.stat().st_size} bytes" in line or f"of {path.stat().st_size} bytes" in line
    if how == "truncated":
        assert (f"expected {size}" if name.endswith(DIT) else "expected more than ") in line


def test_row_18_keys_that_do_not_fit(capsys, files):
    """Of two networks, all in one error."""
    dit = dit_tensors()
    dit["extra.weight"] = dit.pop("head.head.bias")
    dit["time_projection.1.weight"] = dit["time_projection.1.weight"][:-1].copy()
    for path in (files / "wan").glob("diffusion_pytorch_model*"):
        path.unlink()
    save_file(dit, files / "wan" / "diffusion_pytorch_model.safetensors")
    vae = as_torch(vae_tensors())
    del vae["conv2.bias"]
    torch.save(vae, files / "wan" / VAE)
    line = refused(capsys, files, *WAN)
    listed = ("dit: found 3", "no rule: + extra.weight", "wrong shape: + time_projection.1.weight", "never set: - head")
    for part in (*listed, "vae: found 1", "never set: - decoder.post_quant.bias"):
        assert part in line, f"{part!r} is not in {line}"


def test_row_18_found_while_writing(capsys, files):
    """Types are seen when a tensor is read, when others are written already."""
    text = as_torch(umt5_tensors(), "bfloat16")
    text["norm.weight"] = text["norm.weight"].to(torch.int8)
    torch.save(text, files / "wan" / TEXT)
    assert "quantised" in refused(capsys, files, *WAN)


class Malicious:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch canary",)


@pytest.mark.parametrize("name", ["base.pt", "lora.pt", f"wan/{TEXT}", f"wan/{VAE}"])
def test_row_19_a_malicious_pickle(capsys, files, name):
    torch.save({"generator": {"w": torch.zeros(3)}, "step": Malicious()}, files / name)
    assert "nothing was run" in refused(capsys, files, *LORA)
    assert not (files / "canary").exists()


def lora_of(change: Callable[[dict], None]) -> dict[str, torch.Tensor]:
    lora = as_torch(lora_tensors())
    change(lora)
    return lora


MODULE = "base_model.model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lora: lora.update({f"{MODULE}.lora_B.weight": torch.zeros(24, 5)}), "wrong shape or rank: B (24, 5)"),
        (lambda lora: lora.update({f"{MODULE}x.lora_A.weight": torch.zeros(3, 24)}), "unknown target"),
        (lambda lora: lora.pop(f"{MODULE}.lora_A.weight"), "only the other half is there"),
        (lambda lora: lora.clear(), "expected a state dict"),
    ],
    ids=["rank", "target", "half", "empty"],
)
def test_row_20_a_lora_that_does_not_fit(capsys, files, change, words):
    torch.save(lora_of(change), files / "lora.pt")
    assert words in refused(capsys, files, *LORA)


def test_row_20_a_lora_applied_twice(capsys, files):
    assert "expected one LoRA" in refused(capsys, files, *LORA, "--lora", "lora.pt", code=2)
    both = as_torch(dit_tensors("model.") | lora_tensors())
    torch.save({"generator": both}, files / "base.pt")
    assert "already carry a LoRA" in refused(capsys, files, *LORA)
    torch.save({"generator": as_torch(dit_tensors()), "generator_lora": lora_of(dict)}, files / "base.pt")
    assert "--no-lora" in refused(capsys, files, *PLAIN)
    assert streamt1("convert", *PLAIN, "--lora", "lora.pt", "--out", "merged") == 0
    capsys.readouterr()
    twice = ("longlive", "--base", "wan", "--generator", "merged", "--lora", "lora.pt")
    assert "merged already" in refused(capsys, files, *twice)
