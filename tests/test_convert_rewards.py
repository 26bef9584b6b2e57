"""`streamt1 convert rewards`: names both ways, instruction texts as data, and every fault of the files."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from compare import assert_equal
from reward_case import CASE, CHECKPOINT, cli_sources, copy_case, edit_json, sources, tensors_of, to_adapter_layout
from safetensors.torch import save_file

from convert import instructions
from convert.engine import plan
from convert.instructions import read_instructions, texts_of
from convert.lora import LoRASource
from convert.reward_files import model_config_of, video_config_of
from convert.rewards import convert_rewards, prepare_hpsv3
from convert.rewards_table import published_name, reward_rules, split_peft
from convert.sources import SafetensorsSource
from streamt1_jax import cli
from streamt1_jax.errors import WeightsError
from streamt1_jax.rewards import PromptTable, PublishedRewards, load_rewards
from streamt1_jax.rewards.loading import head_of
from streamt1_jax.rewards.model_settings import RESERVED, ModelSettings
from streamt1_jax.rewards.published import read_settings
from streamt1_jax.rewards.qwen2vl import empty_network, parameter_shapes, published_sizes, reward_config

VIDEO = ("videoreward",)
IMAGE = ("hpsv3",)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "rewards"
    assert cli.main(["convert", "rewards", *cli_sources(), "--out", str(out)]) == 0
    return out


@pytest.fixture
def case(tmp_path) -> Path:
    return copy_case(tmp_path / "case")


def refused(case: Path, models, words: str) -> None:
    """A conversion that must fail with these words and leave nothing behind."""
    out = case.parent / "results" / "out"
    with pytest.raises(WeightsError, match=words):
        convert_rewards(sources(case, models), out)
    assert not out.parent.exists() or not list(out.parent.iterdir())


class Shapes:
    """A source without tensors."""

    def __init__(self, shapes):
        self.shapes = dict(shapes)

    def read(self, key: str) -> np.ndarray:
        raise AssertionError(f"{key} was read")


def full_size(name: str, folder: Path, rows: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a published model at its full size, by our names."""
    settings = read_settings(folder, name)
    network = empty_network(reward_config(published_sizes(name), rows), head_of(settings), 151655)
    return {key: tuple(x.shape) for key, x in parameter_shapes(network).items()}


class TestNames:
    def test_hpsv3_at_full_size(self, converted):
        ours = full_size("hpsv3", converted, 151658)
        published = {published_name(name): shape for name, shape in ours.items()} | {"lm_head.weight": (151658, 3584)}
        counts = [sum(key.startswith(p) for key in published) for p in ("visual.", "model.", "lm_head", "rm_head.")]
        assert (len(published), counts) == (736, [391, 338, 1, 6])
        made = plan(published, reward_rules(), {name: np.empty(shape, np.void) for name, shape in ours.items()})
        assert {leaf.fills[0].key: name for name, leaf in made.leaves.items()} == {published_name(n): n for n in ours}

    def test_videoreward_at_full_size(self, converted):
        ours = full_size("videoreward", converted, 151660)
        prefix, keys = "base_model.model.", {"lm_head.weight": (151660, 1536)}
        for name, shape in ours.items():
            key = published_name(name)
            keys[key] = shape
            if ".self_attn." in key or (".mlp." in key and key.startswith("model.")):
                module, _, kind = key.rpartition(".")
                keys[f"{module}.base_layer.{kind}"] = keys.pop(key)
                if kind == "weight":
                    keys[f"{module}.lora_A.default.weight"] = (64, shape[1])
                    keys[f"{module}.lora_B.default.weight"] = (shape[0], 64)
        published = {prefix + key: shape for key, shape in keys.items()}
        lora_keys = [key for key in published if ".lora_" in key]
        assert (len(published), len(lora_keys)) == (1123, 392)
        weights, lora = split_peft(Shapes(published))
        assert lora is not None
        merged = LoRASource(weights, lora, 128.0)
        assert merged.ranks == [64]
        made = plan(merged.shapes, reward_rules(), {name: np.empty(shape, np.void) for name, shape in ours.items()})
        assert set(made.leaves) == set(ours)

    def test_there_and_back(self, converted):
        """The stored weights under published names are the published file."""
        back = {published_name(name): x for name, x in tensors_of(converted / "hpsv3/weights.safetensors").items()}
        theirs = tensors_of(CASE / "hpsv3/HPSv3.safetensors")
        assert back.keys() == theirs.keys() - {"lm_head.weight"}
        for name, x in back.items():
            assert x.dtype == (torch.float32 if name.startswith("rm_head") else torch.bfloat16)
            assert_equal(name, x.float(), theirs[name].to(x.dtype).float())

    def test_a_name_that_is_none(self):
        with pytest.raises(WeightsError, match="no published name"):
            published_name("encoder.weight")

    def test_the_lora_is_merged_in_float32_and_then_cast(self, converted):
        name = "model.layers.0.mlp.up_proj"
        state = {k: x.float() for k, x in tensors_of(CASE / CHECKPOINT / "model.pth").items() if name in k}
        w, a, b = (next(x for key, x in state.items() if part in key) for part in ("base_layer", "lora_A", "lora_B"))
        ours = SafetensorsSource(converted / "videoreward/weights.safetensors").read(
            "model.language_model.layers.0.mlp.up_proj.weight"
        )
        assert ours.dtype == ml_dtypes.bfloat16
        merged = w.numpy() + np.float32(8 / 4) * (b.numpy() @ a.numpy())
        assert_equal("merged", ours.astype(np.float32), merged.astype(ml_dtypes.bfloat16).astype(np.float32))


class TestOlderFiles:
    @pytest.mark.parametrize("layout", ["HPSv3.pth", "pytorch_model.bin", "shards"])
    def test_the_same_weights_from_files_of_pytorch(self, case, layout):
        path = case / "hpsv3/HPSv3.safetensors"
        tensors = tensors_of(path)
        path.unlink()
        if layout == "shards":
            names = [f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2)]
            where = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
            for name in names:
                torch.save({key: x for key, x in tensors.items() if where[key] == name}, case / "hpsv3" / name)
            index = json.dumps({"metadata": {}, "weight_map": where})
            (case / "hpsv3/pytorch_model.bin.index.json").write_text(index)
        else:
            torch.save(tensors, case / "hpsv3" / layout)
            if layout == "pytorch_model.bin":
                torch.save({"epochs": 3}, case / "hpsv3/training_args.bin")
        source = prepare_hpsv3(sources(case, IMAGE), json.loads((case / "templates.json").read_text())["hpsv3"]).source
        assert source.shapes.keys() == tensors.keys()
        for key, x in tensors.items():
            assert_equal(key, source.read(key).astype(np.float32), x.float())


HPSV3_SOURCE = '''
"""Never run."""
import torch
raise SystemExit("it was run")
SIZE = 3
INSTRUCTION = """Rate {text_prompt} well.
"""
INSTRUCTION_short = "{text_prompt}"
tail: str = "Score: <|Reward|> {end}"
other = "Score: "
made = INSTRUCTION.format(text_prompt="x")
'''
VIDEO_SOURCE = 'A = B = "VQ <|VQ_reward|> MQ <|MQ_reward|> {text_prompt} TA <|TA_reward|>"\nC = "{text_prompt}"\n'


class TestInstructions:
    def test_hpsv3_keeps_two_constants(self):
        (text,) = texts_of(HPSV3_SOURCE, "source").values()
        assert text.format(text_prompt="a {cat}") == "Rate a {cat} well.\nScore: <|Reward|> {end}"

    def test_from_a_wheel_a_checkout_and_json(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "hpsv3-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("hpsv3/dataset/data_collator_qwen.py", HPSV3_SOURCE)
        (tmp_path / "checkout").mkdir()
        one = VIDEO_SOURCE.replace("A = B", "DETAILED")
        (tmp_path / "checkout" / "prompt_template.py").write_text(one)
        texts = read_instructions([str(tmp_path / "hpsv3-1.0.0-py3-none-any.whl"), str(tmp_path / "checkout")])
        assert all(token in texts[model] for model, tokens in RESERVED.items() for token in tokens)
        (tmp_path / "both.json").write_text(json.dumps(texts))
        assert read_instructions([str(tmp_path / "both.json")]) == texts

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            (VIDEO_SOURCE, "A, B could all be the instruction text of videoreward"),
            ("x = 3", r"none of its constants \(none\)"),
            ("x = 'no'", r"none of its constants \(x\)"),
            ("x = (", "is not Python"),
        ],
    )
    def test_source_that_says_nothing_or_too_much(self, source, words):
        with pytest.raises(WeightsError, match=words):
            texts_of(source, "prompt_template.py")

    def test_a_missing_text_names_what_to_fetch(self, tmp_path, monkeypatch):
        monkeypatch.setattr(instructions, "cache_folder", lambda: tmp_path / "xla")
        for model, words in (("hpsv3", "pip download --no-deps hpsv3"), ("videoreward", "VideoAlign")):
            with pytest.raises(WeightsError, match=f"--offline was given; .*{words}"):
                read_instructions([], (model,), offline=True)

    def test_a_download_is_kept(self, tmp_path, monkeypatch):
        monkeypatch.setattr(instructions, "cache_folder", lambda: tmp_path / "xla")
        asked = []

        def urlopen(url, timeout):
            asked.append(url)
            return (tmp_path / "source.py").open("rb")

        (tmp_path / "source.py").write_text(VIDEO_SOURCE.replace("A = B", "A"))
        monkeypatch.setattr(instructions.urllib.request, "urlopen", urlopen)
        texts = read_instructions([], ("videoreward",))
        assert read_instructions([], ("videoreward",), offline=True) == texts
        assert len(asked) == 1
        assert instructions.VIDEOALIGN_COMMIT in asked[0]

    def test_no_network_is_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setattr(instructions, "cache_folder", lambda: tmp_path / "xla")
        monkeypatch.setattr(
            instructions.urllib.request, "urlopen", lambda *args, **kw: (_ for _ in ()).throw(OSError("down"))
        )
        with pytest.raises(WeightsError, match=r"could not be downloaded \(OSError: down\); clone "):
            read_instructions([], ("videoreward",))

    @pytest.mark.parametrize("name", ["none.whl", "empty.json", "broken.whl", "folder"])
    def test_paths_that_hold_none(self, tmp_path, name):
        (tmp_path / "empty.json").write_text("{}")
        (tmp_path / "broken.whl").write_bytes(b"PK")
        (tmp_path / "folder").mkdir()
        with pytest.raises(WeightsError, match=name):
            read_instructions([str(tmp_path / name)])


class TestFaults:
    def test_tokens_that_the_weights_were_not_trained_with(self, case):
        """A tokenizer with one token more: every reserved id is one too high for the rows."""
        path = case / CHECKPOINT / "tokenizer/tokenizer.json"
        values = json.loads(path.read_text())
        tokens = values["added_tokens"]
        for token in tokens[-3:]:
            token["id"] += 1
        tokens.insert(-3, {**tokens[0], "id": tokens[-4]["id"] + 1, "content": "<|more|>"})
        path.write_text(json.dumps(values))
        refused(case, VIDEO, "rows for 443 tokens, expected the tokenizer's 444")

    def test_tokens_in_another_order(self, case):
        path = case / CHECKPOINT / "tokenizer/tokenizer.json"
        text = path.read_text()
        swapped = text.replace("VQ_reward", "x").replace("MQ_reward", "VQ_reward").replace("x|>", "MQ_reward|>")
        path.write_text(swapped)
        refused(case, VIDEO, "its last ones in this order")

    @pytest.mark.parametrize("name", ["hpsv3/HPSv3.safetensors", f"{CHECKPOINT}/model.pth"])
    @pytest.mark.parametrize("how", ["truncated", "empty", "page", "pointer"])
    def test_broken_weights(self, case, name, how):
        path = case / name
        data = {"empty": b"", "page": b"<html>", "pointer": b"version https://git-lfs.github.com/spec/v1\nsize 9\n"}
        path.write_bytes(data.get(how, path.read_bytes()[:-100]))
        refused(case, IMAGE if "hpsv3" in name else VIDEO, f"{path.name}: found")

    def test_a_malicious_pickle_runs_nothing(self, case, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)

        class Malicious:
            def __reduce__(self):
                return os.system, ("touch canary",)

        torch.save({"w": torch.zeros(3), "x": Malicious()}, case / CHECKPOINT / "model.pth")
        refused(case, VIDEO, "nothing was run")
        assert not (tmp_path / "canary").exists()

    def test_missing_extra_and_wrong_shapes_at_once(self, case):
        path = case / "hpsv3/HPSv3.safetensors"
        tensors = tensors_of(path)
        del tensors["rm_head.5.bias"]
        tensors["extra.weight"] = torch.zeros(2)
        tensors["visual.merger.ln_q.bias"] = torch.zeros(3)
        save_file(tensors, path)
        words = r"found 3 tensors.*no rule: \+ extra.weight.*wrong shape: .*ln_q.bias.*never set: - rm_head.5.bias"
        refused(case, IMAGE, words)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"peft_lora_config": {"use_rslora": True}}, "use_rslora is True"),
            ({"data_config": {"sample_type": "multi_pts"}}, "sample_type is 'multi_pts'"),
            ({"data_config": {"prompt_template_type": "simple"}}, "prompt_template_type is 'simple'"),
            ({"model_config": {"output_dim": 3}}, "the head has 1 outputs and model_config.json says 3"),
            ({"inference_config": {"MQ_std": None}}, "MQ_std is missing"),
            ({"peft_lora_config": {"lora_r": 64}}, "expected rank 64"),
            ({"peft_lora_config": {"lora_r": 32}}, r"ranks are \[4\], expected rank 32"),  # a width of its layers
            ({"data_config": []}, r"data_config is \[\], not an object"),
            ({"data_config": {"num_frames": "8"}}, "num_frames is '8', not null or a whole number, at least 2"),
            ({"data_config": {"num_frames": 1}}, "num_frames is 1, not"),
            ({"data_config": {"num_frames": True}}, "num_frames is True, not"),
            ({"data_config": {"max_frame_pixels": 0}}, "max_frame_pixels is 0, not a whole number, at least 784"),
            ({"data_config": {"fps": 0}}, "fps is 0, not a number above 0"),
            ({"data_config": {"fps": True}}, "fps is True, not"),
            ({"inference_config": {"VQ_std": 0}}, "VQ_std is 0, not a number above 0"),
            ({"inference_config": {"TA_std": float("nan")}}, "TA_std is nan, not"),
            ({"inference_config": {"MQ_mean": float("inf")}}, "MQ_mean is inf, not a number"),
        ],
    )
    def test_a_model_config_of_another_kind(self, case, changes, words):
        edit_json(case / "videoreward/model_config.json", **changes)
        refused(case, VIDEO, words)

    def test_several_files_of_weights_are_named(self, case):
        tensors = tensors_of(case / "hpsv3/HPSv3.safetensors")
        (case / "hpsv3/HPSv3.safetensors").unlink()
        for name in ("a.pth", "b.bin"):
            torch.save(tensors, case / "hpsv3" / name)
        refused(case, IMAGE, r"found a\.pth, b\.bin, expected one .safetensors file or one of PyTorch")

    def test_a_section_that_is_null(self, case):
        path = case / "videoreward/model_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "data_config": None}))
        refused(case, VIDEO, "data_config is None, not an object")

    def test_a_number_of_frames_needs_no_rate(self, case):
        path = case / "videoreward/model_config.json"
        edit_json(path, data_config={"fps": None, "num_frames": 8})
        video = video_config_of(model_config_of(path))
        assert (video.fps, len(video.frames(81, 16.0)), len(video.frames(81, 4.0))) == (None, 8, 8)

    @pytest.mark.parametrize(
        "changes",
        [{"hidden_size": "64"}, {"num_attention_heads": 0}, {"vision_config": 3}, {"num_hidden_layers": None}],
    )
    def test_a_config_that_makes_no_network(self, case, changes):
        path = case / "base_image/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        refused(case, IMAGE, "makes no network|do not fit|no rule|wrong shape")

    def test_a_processor_that_divides_by_nothing(self, case):
        edit_json(case / "base_image/preprocessor_config.json", image_std=[0.0, 1.0, 1.0])
        refused(case, IMAGE, "expected Qwen2-VL's processor")

    @pytest.mark.parametrize(
        ("template", "words"),
        [
            ("{% for %}", "TemplateSyntaxError"),
            ("{{ raise_exception('no images') }}", "TemplateError: no images"),
            ("{{ messages.none.none }}", "UndefinedError"),
            ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ],
    )
    def test_a_chat_template_that_fails(self, case, template, words):
        edit_json(case / "base_image/chat_template.json", chat_template=template)
        refused(case, IMAGE, f"the chat template .* fails with {words}")

    @pytest.mark.parametrize("name", ["base_image/chat_template.jinja", "templates.py"])
    def test_files_that_are_no_text(self, case, name):
        (case / name).write_bytes(b"x = '\xff'")
        templates = str(case / ("templates.json" if "base" in name else name))
        with pytest.raises(WeightsError, match="is no text"):
            convert_rewards(sources(case, IMAGE, templates=[templates]), case.parent / "out")

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("base_image/config.json", "config.json: no such file"),
            ("base_image/preprocessor_config.json", "preprocessor_config.json: no such file"),
            ("base_image/tokenizer.json", None),
            ("hpsv3/HPSv3.safetensors", "expected one .safetensors file"),
        ],
    )
    def test_missing_files(self, case, name, words):
        (case / name).unlink()
        if words is None:  # the vocabulary and the merges do as well
            (case / "base_image/vocab.json").unlink()
            words = "no usable tokenizer"
        refused(case, IMAGE, words)

    def test_missing_checkpoints(self, case):
        (case / CHECKPOINT / "model.pth").unlink()
        refused(case, VIDEO, "holds neither model.pth or adapter_model.safetensors with non_lora_state_dict.pth")
        shutil.rmtree(case / CHECKPOINT)
        refused(case, VIDEO, "holds no checkpoint-N")

    def test_a_base_of_another_kind(self, case):
        edit_json(case / "base_image/config.json", model_type="qwen2_5_vl")
        refused(case, IMAGE, "is of 'qwen2_5_vl', expected 'qwen2_vl'")

    def test_a_chat_template_that_is_nowhere(self, case):
        (case / "base_image/chat_template.json").unlink()
        edit_json(case / "base_image/tokenizer_config.json", chat_template=None)
        refused(case, IMAGE, "no chat_template")

    def test_an_adapter_without_enough_rows(self, case):
        to_adapter_layout(case)
        path = case / "base_video/model.safetensors"
        tensors = tensors_of(path)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:442].contiguous()
        save_file(tensors, path)
        refused(case, VIDEO, "has 442 rows, expected at least the tokenizer's 443")

    def test_a_flipped_bit_of_the_converted_weights(self, converted, tmp_path):
        folder = tmp_path / "rewards"
        shutil.copytree(converted, folder)
        path = folder / "hpsv3/weights.safetensors"
        data = bytearray(path.read_bytes())
        data[-7] ^= 1
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=r"hpsv3/weights.safetensors has sha256"):
            load_rewards(folder, PromptTable())
        PublishedRewards(folder, device="cpu").load("videoreward")  # the other model is whole

    def test_settings_of_another_version(self):
        with pytest.raises(WeightsError, match=r"settings\.json"):
            ModelSettings.from_json({"name": "hpsv3", "head": [1, 2], "colour": "red"})


class TestCommand:
    def test_one_of_the_two(self, tmp_path, capsys):
        out = tmp_path / "out"
        assert cli.main(["convert", "rewards", *cli_sources(), "--only", "videoreward", "--out", str(out)]) == 0
        assert "videoreward written" in capsys.readouterr().out
        assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "manifest.sha256", "videoreward"]
        with pytest.raises(WeightsError, match="holds videoreward, expected hpsv3; convert it too"):
            PublishedRewards(out).weight_bytes("hpsv3")

    def test_an_existing_folder_is_refused_before_a_download(self, tmp_path, capsys):
        (tmp_path / "mine").mkdir()
        assert cli.main(["convert", "rewards", "--out", str(tmp_path / "mine"), "--overwrite"]) == 2
        assert "was not made by this program" in capsys.readouterr().err

    def test_defaults_are_the_hub(self, tmp_path, capsys, monkeypatch):
        asked = []

        def snapshot_download(repo, *, revision, allow_patterns, local_files_only=False):
            asked.append((repo, revision, local_files_only))
            raise ConnectionError("offline")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        argv = ["convert", "rewards", "--templates", str(CASE / "templates.json"), "--out", str(tmp_path / "out")]
        assert cli.main([*argv, "--hpsv3-revision", "abc", "--offline"]) == 3
        assert "MizzenAI/HPSv3 at revision abc" in capsys.readouterr().err
        assert asked == [("MizzenAI/HPSv3", "abc", True)]
