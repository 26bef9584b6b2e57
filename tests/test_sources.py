"""Where tensors come from: every kind of file, every way it can be broken (FAULTS rows 16, 18-20), and the LoRA."""

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from published import as_torch, dit_tensors, golden_lora, lora_tensors, random_tensors, write_sharded
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from convert import torch_source
from convert.lora import LoRASource, adapter_alpha
from convert.sources import DictSource, SafetensorsSource, ShardedSource, open_folder
from convert.torch_source import TorchSource, select_generator, select_lora
from streamt1_jax.errors import WeightsError


def test_every_source_reads_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_source, "_REMAP_BYTES", 0)  # Mapped anew before every read but the first.
    tensors = random_tensors({"a": (4, 3), "b": (2, 3, 1), "c": (5,), "d": ()})
    half = {key: x.astype(ml_dtypes.bfloat16) for key, x in tensors.items()}
    save_file(half, tmp_path / "one.safetensors")
    write_sharded(tmp_path, half, "many")
    torch.save(as_torch(tensors, "bfloat16"), tmp_path / "one.pth")
    sources = {
        "dict": DictSource(as_torch(tensors, "bfloat16")),
        "safetensors": SafetensorsSource(tmp_path / "one.safetensors"),
        "sharded": ShardedSource(tmp_path / "many.safetensors.index.json"),
        "torch": TorchSource(tmp_path / "one.pth"),
    }
    for name, source in sources.items():
        assert dict(source.shapes) == {key: x.shape for key, x in tensors.items()}, name
        for key, x in half.items():
            found = source.read(key)
            assert (found.dtype, found.tolist()) == (x.dtype, x.tolist()), f"{key} of {name}"


def damage(path: Path, how: str) -> str:
    """Breaks a weights file; returns what the error must say it expected."""
    data = path.read_bytes()
    broken = {
        "truncated": data[:-100],
        "cut in its header": data[:20],
        "empty": b"",
        "web page": b"<!DOCTYPE html><html><body>404</body></html>",
        "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    }[how]
    path.write_bytes(broken)
    return {"LFS pointer": "12345 bytes", "truncated": str(len(data))}.get(how, "expected")


@pytest.mark.parametrize("how", ["truncated", "cut in its header", "empty", "web page", "LFS pointer"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_broken_files_name_the_file_and_both_sizes(tmp_path, how, suffix):
    path = tmp_path / f"weights.{suffix}"
    tensors = random_tensors({"a": (400, 3), "b": (2,)})
    save_file(tensors, path) if suffix == "safetensors" else torch.save(as_torch(tensors), path)
    expected = damage(path, how)
    if (suffix, how) == ("pth", "truncated"):
        expected = f"more than {1202 * 4}"  # A zip archive without its end tells what its tensors need.
    with pytest.raises(WeightsError) as error:
        SafetensorsSource(path) if suffix == "safetensors" else TorchSource(path)
    text = str(error.value)
    assert str(path) in text
    assert f"{path.stat().st_size} bytes" in text
    assert expected in text, text


def test_missing_file_and_trailing_bytes(tmp_path):
    with pytest.raises(WeightsError, match=r"gone\.safetensors: no such file"):
        SafetensorsSource(tmp_path / "gone.safetensors")
    path = tmp_path / "long.safetensors"
    save_file(random_tensors({"a": (2,)}), path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"1234")
    with pytest.raises(WeightsError, match=f"found {size + 4} bytes, expected {size}"):
        SafetensorsSource(path)


def test_a_header_that_contradicts_itself(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(WeightsError, match="a 8 bytes for its shape"):
        SafetensorsSource(path)


def test_shards(tmp_path):
    tensors = random_tensors({"a": (2,), "b": (3,), "c": (1,)})
    write_sharded(tmp_path, tensors, "model")
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere.bin")
    with pytest.raises(WeightsError, match=r"not beside it: model-00002-of-00002\.safetensors"):
        open_folder(tmp_path)
    (tmp_path / "elsewhere.bin").rename(tmp_path / "model-00002-of-00002.safetensors")

    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": where | {"d": where["a"]}}))
    with pytest.raises(WeightsError, match=r"- d of model-0000"):
        open_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {key: "../" + name for key, name in where.items()}}))
    with pytest.raises(WeightsError, match=r"not beside it: \.\./model"):
        open_folder(tmp_path)


def test_a_folder_must_hold_one_network(tmp_path):
    with pytest.raises(WeightsError, match="found none"):
        open_folder(tmp_path)
    for name in ("a", "a.fp16"):
        save_file(random_tensors({"x": (1,)}), tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"found a\.fp16\.safetensors, a\.safetensors"):
        open_folder(tmp_path)


class Malicious:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_runs_nothing(tmp_path, zipped):
    canary = tmp_path / "canary"
    torch.save(
        {"a": torch.zeros(3), "b": Malicious(canary)}, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(WeightsError, match=r"bad\.pt: .*system to be run" if zipped else r"bad\.pt"):
        TorchSource(tmp_path / "bad.pt")
    data = (tmp_path / "bad.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:-200])  # The size is read off the pickle of a file cut short.
    with pytest.raises(WeightsError, match=r"cut\.pt"):
        TorchSource(tmp_path / "cut.pt")
    assert not canary.exists()


def test_eight_bit_weights_are_refused(tmp_path):
    x = torch.zeros(3).to(torch.float8_e4m3fn)
    torch.save({"a": x}, tmp_path / "x.pth")
    save_torch({"a": x}, tmp_path / "x.safetensors")
    for source in (TorchSource(tmp_path / "x.pth"), SafetensorsSource(tmp_path / "x.safetensors")):
        with pytest.raises(WeightsError, match="quantised"):
            source.read("a")


def test_files_before_torch_1_6_are_refused(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"PyTorch 1\.6"):
        TorchSource(tmp_path / "old.pth")


@pytest.mark.parametrize(
    ("content", "ema", "key"),
    [
        ({"generator": 1, "generator_ema": 2, "step": 7}, None, "generator_ema"),
        ({"generator": 1, "generator_ema": 2}, False, "generator"),
        ({"generator": 1, "critic": 3}, None, "generator"),
        ({"model": 1}, None, "model"),
        ({"generator": 1}, True, None),
        ({"optimizer": 1}, None, None),
    ],
)
def test_which_generator_is_taken(tmp_path, content, ema, key):
    made = {k: {"model.w": torch.full((2,), float(v))} if k != "step" else v for k, v in content.items()}
    torch.save(made, tmp_path / "x.pt")
    if key is None:
        with pytest.raises(WeightsError, match=f"holds {next(iter(content))}, expected generator"):
            TorchSource(tmp_path / "x.pt", select_generator(ema))
        return
    source = TorchSource(tmp_path / "x.pt", select_generator(ema))
    assert source.key == key
    assert source.read("model.w").tolist() == [content[key]] * 2


def test_names_of_training_wrappers_go(tmp_path):
    w = torch.zeros(2)
    wrapped = {
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.w": w,
        "module.b": w,
    }
    torch.save({"generator_ema": wrapped}, tmp_path / "x.pt")
    assert set(TorchSource(tmp_path / "x.pt", select_generator(None)).shapes) == {"model.blocks.0.w", "b"}
    torch.save({"model.w": w, "model._fsdp_wrapped_module.w": w}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="with and without"):
        TorchSource(tmp_path / "x.pt", select_generator(None))
    torch.save({"w": w, "n": 3}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"holds n \(int\)"):
        TorchSource(tmp_path / "x.pt")


# --- LoRA -----------------------------------------------------------------------------------------------------


def test_golden_lora():
    parts, case = golden_lora()
    merged = LoRASource(DictSource(parts["base"]), DictSource(parts["lora"]), case["alpha"])
    assert merged.ranks == [case["rank"]]
    for key, expected in parts["merged"].items():
        error = np.abs(merged.read(key) - expected).max()
        assert error < 1e-6, f"{key}: max error {error:.2e}"


def test_merge_as_peft_does(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 5, bias=False))
    base = {key: x.clone() for key, x in module.state_dict().items()}
    theirs = peft.get_peft_model(
        module, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False)
    )
    lora = {key: x.clone() for key, x in theirs.state_dict().items() if "lora_" in key}  # Names with ".default".
    theirs.save_pretrained(tmp_path)  # Names without.
    expected = theirs.merge_and_unload().state_dict()
    for name, source in {"state dict": DictSource(lora), "file": open_folder(tmp_path)}.items():
        merged = LoRASource(DictSource(base), source, alpha=5)
        for key, x in expected.items():
            error = np.abs(merged.read(key) - x.numpy()).max()
            assert error < 1e-6, f"{key} of the {name}: max error {error:.2e}"


def test_alpha_beside_an_adapter(tmp_path):
    lora = tmp_path / "adapter_model.safetensors"
    assert adapter_alpha(lora) is None
    for config, alpha in (({"lora_alpha": 5, "r": 3}, 5.0), ({"lora_alpha": 5, "use_dora": True}, None), ({}, None)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        if alpha is None:
            with pytest.raises(WeightsError, match="adapter_config"):
                adapter_alpha(lora)
        else:
            assert adapter_alpha(lora) == alpha


def test_alpha_is_the_rank_unless_given():
    base, lora = dit_tensors(), lora_tensors()
    name = "blocks.1.ffn.0"
    a, b = (lora[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    plain = LoRASource(DictSource(base), DictSource(lora)).read(name + ".weight")
    doubled = LoRASource(DictSource(base), DictSource(lora), alpha=6).read(name + ".weight")
    np.testing.assert_allclose(plain, base[name + ".weight"] + b @ a, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(doubled, base[name + ".weight"] + 2 * (b @ a), rtol=1e-6, atol=1e-5)


def test_every_fault_of_a_lora_in_one_error():
    base = {"model.q.weight": np.zeros((4, 6)), "model.k.weight": np.zeros((4, 6)), "model.v.weight": np.zeros((4, 6))}
    lora = {
        "base_model.model.q.lora_A.weight": np.zeros((2, 6)),
        "base_model.model.q.lora_B.weight": np.zeros((4, 3)),  # wrong rank
        "base_model.model.k.lora_A.weight": np.zeros((2, 6)),  # without B
        "base_model.model.z.lora_A.weight": np.zeros((2, 6)),  # unknown
        "base_model.model.z.lora_B.weight": np.zeros((4, 2)),
        "model.v.lora_A.weight": np.zeros((2, 6)),
        "model.v.lora_A.default.weight": np.zeros((2, 6)),  # twice
        "model.v.lora_B.weight": np.zeros((4, 2)),
        "model.v.bias": np.zeros(4),  # no half
    }
    with pytest.raises(WeightsError) as error:
        LoRASource(DictSource(base), DictSource(lora))
    for part in (
        "5 problems",
        "q (wrong shape or rank",
        "- k.lora_B",
        "z (unknown target",
        "set twice",
        "model.v.bias (not",
    ):
        assert part in str(error.value), f"{part!r} is not in {error.value}"
    with pytest.raises(WeightsError, match="it is empty"):
        LoRASource(DictSource(base), DictSource({}))


def test_a_second_lora_is_refused():
    base, lora = DictSource(dit_tensors()), DictSource(lora_tensors())
    with pytest.raises(WeightsError, match="already carry a LoRA"):
        LoRASource(LoRASource(base, lora), lora)
    with pytest.raises(WeightsError, match="already carry a LoRA"):
        LoRASource(DictSource(dit_tensors() | lora_tensors()), lora)


def test_lora_select(tmp_path):
    torch.save({"generator_lora": as_torch(lora_tensors()), "critic": {"w": torch.zeros(1)}}, tmp_path / "lora.pt")
    source = TorchSource(tmp_path / "lora.pt", select_lora)
    assert (source.key, source.others) == ("generator_lora", ("critic",))
    assert set(source.shapes) == set(lora_tensors())
    torch.save(as_torch(lora_tensors()), tmp_path / "lora.pt")
    assert set(TorchSource(tmp_path / "lora.pt", select_lora).shapes) == set(lora_tensors())
