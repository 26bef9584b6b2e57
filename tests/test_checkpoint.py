"""The converted checkpoint's folder: written whole or not at all, verified on load (FAULTS rows 15, 17, 18, 21)."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import TINY, TOKENIZER

from streamt1_jax import atomic_folder as atomic
from streamt1_jax import params_store
from streamt1_jax.atomic_folder import MARKER, atomic_folder, sweep
from streamt1_jax.checkpoint import (
    NETWORKS,
    load_checkpoint,
    load_params,
    write_checkpoint,
)
from streamt1_jax.errors import BadInputError, WeightsError
from streamt1_jax.networks import network_graph
from streamt1_jax.params_store import params_sha256

TESTS = Path(__file__).parent
FLOAT32 = jnp.dtype("float32")


def tiny_params(network: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    flat = nnx.to_flat_state(network_graph(TINY, network, FLOAT32)[1])
    return {".".join(map(str, path)): rng.standard_normal(leaf.shape, np.float32) for path, leaf in flat}


def write(out: Path, networks=("text",), *, seed: int = 0, overwrite: bool = False, change=lambda params: params):
    with write_checkpoint(out, TINY, {"recipe": "test"}, overwrite=overwrite) as writer:
        writer.add_tokenizer(TOKENIZER)
        for network in networks:
            for path, array in change(tiny_params(network, seed)).items():
                writer.add(network, path, array)


def state_hash(out: Path) -> str:
    return load_checkpoint(out).manifest["networks"]["text"]["params_sha256"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A whole checkpoint; not to be changed."""
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    write(out, NETWORKS)
    return out


@pytest.fixture
def copy(tmp_path, checkpoint) -> Path:
    shutil.copytree(checkpoint, tmp_path / "copy", ignore=lambda folder, names: ["dit", "vae"])
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    kept = {k: v for k, v in manifest["files"].items() if not k.startswith(("dit", "vae"))}
    reseal(tmp_path / "copy", manifest | {"files": kept})
    return tmp_path / "copy"


def reseal(folder: Path, manifest: dict) -> None:
    from streamt1_jax.manifest import file_sha256

    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "manifest.sha256").write_text(file_sha256(folder / "manifest.json") + "\n")


# --- reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_written_is_loaded(checkpoint, network):
    found = load_checkpoint(checkpoint)
    assert found.config == TINY
    params = load_params(found, network)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}
    for path, array in tiny_params(network).items():
        assert flat[path].dtype == np.float32
        assert np.array_equal(np.asarray(flat[path][...]), array), path
    assert params_sha256(params) == found.manifest["networks"][network]["params_sha256"]

    graphdef, abstract = network_graph(TINY, network, FLOAT32)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    module = nnx.merge(graphdef, params)
    nnx.update(module, jax.tree.map(jnp.zeros_like, params))
    assert not any(leaf.any() for leaf in jax.tree.leaves(nnx.state(module)))


def test_the_decoder_alone(checkpoint):
    """A generator needs no encoder: the decoder's part of the VAE is what its own graph takes."""
    params = load_params(load_checkpoint(checkpoint), "vae")["decoder"]
    assert jax.tree.structure(params) == jax.tree.structure(network_graph(TINY, "decoder", FLOAT32)[1])


def test_types_change_only_when_asked(checkpoint):
    found = load_checkpoint(checkpoint)
    plain, cast = load_params(found, "text"), load_params(found, "text", jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(plain)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cast)} == {"bfloat16"}
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), plain)
    assert params_sha256(cast) == params_sha256(expected)


def test_missing_checkpoint_tells_the_command(tmp_path):
    with pytest.raises(WeightsError, match=r"streamt1 convert longlive --base .* --generator .* --out .*gone"):
        load_checkpoint(tmp_path / "gone")
    with pytest.raises(WeightsError, match=r"no manifest\.json"):
        load_checkpoint(tmp_path)


def test_one_flipped_bit_anywhere_is_found(copy):
    """In every file of the folder, the manifest and Orbax's own files included."""
    files = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    assert len(files) > 30
    rng = np.random.default_rng(0)
    for path in files:
        data = bytearray(path.read_bytes())
        at, bit = int(rng.integers(len(data))), int(rng.integers(8))
        data[at] ^= 1 << bit
        path.write_bytes(data)
        with pytest.raises(WeightsError) as error:
            load_checkpoint(copy)
        assert path.name in str(error.value)
        assert "sha256" in str(error.value)
        data[at] ^= 1 << bit
        path.write_bytes(data)
    load_checkpoint(copy)


def test_missing_and_short_files_are_listed_together(copy):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    short = next(path for path in sorted(copy.rglob("*")) if path.name == "0.0")
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"2 files.*tokenizer/tokenizer\.json is missing") as error:
        load_checkpoint(copy)
    assert f"{short.relative_to(copy)} has {short.stat().st_size} bytes, expected {short.stat().st_size + 1}" in str(
        error.value
    )


def test_another_version_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    reseal(copy, manifest | {"version": 99})
    with pytest.raises(WeightsError, match="99"):
        load_checkpoint(copy)


def test_names_and_shapes_that_are_not_the_networks(tmp_path):
    def change(params):
        params["odd.kernel"] = params.pop("norm.scale")
        params["token_embedding.embedding"] = params["token_embedding.embedding"][:-1]
        return params

    write(tmp_path / "out", change=change)
    with pytest.raises(WeightsError) as error:
        load_params(load_checkpoint(tmp_path / "out"), "text")
    for part in ("- norm.scale [16]", "+ odd.kernel [16]", "+ token_embedding.embedding [1023, 16], not [1024, 16]"):
        assert part in str(error.value), f"{part!r} is not in {error.value}"
    with pytest.raises(WeightsError, match="holds no 'dit'"):
        load_params(load_checkpoint(tmp_path / "out"), "dit")


def test_a_stored_array_that_is_not_what_the_manifest_says(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["networks"]["text"]["dtype"] = "bfloat16"
    reseal(copy, manifest)
    with pytest.raises(WeightsError, match=r"restored as float32 .*, expected bfloat16"):
        load_params(load_checkpoint(copy), "text")


# --- writing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 1000, 20_000])
def test_the_hash_does_not_depend_on_the_shards(tmp_path, monkeypatch, checkpoint, shard_bytes):
    monkeypatch.setattr(params_store, "SHARD_BYTES", shard_bytes)
    out = tmp_path / "out"
    with write_checkpoint(out, TINY, {}) as writer:
        for path, array in reversed(tiny_params("text").items()):
            rows = max(1, len(array) // 3)  # Cut, as a large parameter is.
            for start in range(0, len(array), rows):
                writer.add("text", path, array[start : start + rows], start)
    assert len(list((out / "text").iterdir())) > 1
    assert state_hash(out) == state_hash(checkpoint)
    found, expected = (load_params(load_checkpoint(folder), "text") for folder in (out, checkpoint))
    assert params_sha256(found) == params_sha256(expected)


def test_overwriting_needs_the_option_and_only_meets_our_own(tmp_path):
    out = tmp_path / "out"
    write(out)
    with pytest.raises(BadInputError, match="--overwrite"):
        write(out)
    write(out, seed=1, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (out / MARKER).exists()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(out)
    for place, text in ((foreign, "not made by"), (tmp_path / "file", "not made by"), (tmp_path / "link", "is a link")):
        with pytest.raises(BadInputError, match=text):
            write(place, overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "mine"
    with pytest.raises(BadInputError, match="cannot be written"):
        write(tmp_path / "file" / "below")


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_error_leaves_the_earlier_result_and_nothing_else(tmp_path, error):
    out = tmp_path / "out"
    write(out)
    before = state_hash(out)

    def fail(params):
        raise error

    with pytest.raises(error):
        write(out, ("text", "dit"), overwrite=True, change=fail)
    assert state_hash(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "disk_usage", lambda path: usage(10, 9, 1))
        with pytest.raises(BadInputError, match=r"0\.0 GB free, expected 5\.0 GB"):
            write_checkpoint(tmp_path / "out", TINY, {}, needed_bytes=5 * 10**9).__enter__()

    def full(*_args, **_kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", full)  # What tensorstore says of it.
    with pytest.raises(BadInputError, match=os.strerror(errno.ENOSPC)):
        write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_the_last_rename(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out)
    before = state_hash(out)
    rename = Path.rename

    def fail(self, target):
        if "streamt1-partial" in self.name:
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="broken disk"):
        write(out, seed=1, overwrite=True)
    assert state_hash(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (out / MARKER).exists()


# --- kill -9 --------------------------------------------------------------------------------------------------


def killed(out: Path, at: str) -> None:
    """Overwrites `out` in another process, which dies without a word at a certain moment."""
    code = f"""
        import os, sys
        sys.path.insert(0, {str(TESTS)!r})
        from pathlib import Path
        from test_checkpoint import write

        class Die(dict):
            def items(self):
                yield from list(super().items())[:3]
                os._exit(9)

        rename, unlink = Path.rename, Path.unlink
        def dying(moment, function):
            def call(self, *args, **kwargs):
                result = function(self, *args, **kwargs)
                moment(self, *args) and os._exit(9)
                return result
            return call

        at = {at!r}
        if at == "between the renames":
            Path.rename = dying(lambda self, target: "replaced" in Path(target).name, rename)
        if at == "after the renames":
            Path.rename = dying(lambda self, target: "partial" in self.name, rename)
        if at == "while the old one goes":
            Path.unlink = dying(lambda self: "replaced" in self.parent.name, unlink)
        write(Path({str(out)!r}), seed=1, overwrite=True, change=Die if at == "while writing" else dict)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 9, done.stderr


@pytest.mark.parametrize(
    ("at", "kept"),
    [
        ("while writing", 0),
        ("between the renames", 0),
        ("after the renames", 1),
        ("while the old one goes", 1),
    ],
)
def test_kill_leaves_a_whole_result_and_the_next_start_sweeps(tmp_path, at, kept):
    out = tmp_path / "out"
    write(out)
    hashes = [state_hash(out)]
    write(tmp_path / "other", seed=1)
    hashes.append(state_hash(tmp_path / "other"))
    shutil.rmtree(tmp_path / "other")

    killed(out, at)
    assert any("streamt1-" in path.name for path in tmp_path.iterdir())
    assert sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert state_hash(out) == hashes[kept]
    write(out, seed=1, overwrite=True)  # A re-run ends in the same hash.
    assert state_hash(out) == hashes[1]
    assert not (out / MARKER).exists()


def test_only_our_own_dead_leftovers_are_swept(tmp_path):
    foreign = tmp_path / ".x.streamt1-partial-0000"
    foreign.mkdir()
    (foreign / "data").write_text("mine")
    with atomic_folder(tmp_path / "a", overwrite=False, is_ours=lambda _: False) as alive:
        (alive / "file").write_text("a")
        assert sweep(tmp_path) == []  # Its writer lives.
        with atomic_folder(tmp_path / "b", overwrite=False, is_ours=lambda _: False):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [foreign.name, "a", "b"]
    assert (tmp_path / "a" / "file").read_text() == "a"


def test_reading_imports_no_torch():
    code = "import sys, streamt1_jax.checkpoint; print(sorted({'torch', 'orbax.checkpoint'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
