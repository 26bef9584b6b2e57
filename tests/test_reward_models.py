"""HPSv3 and VideoReward: the recorded case, every published layout, batches, the bridge, transformers' own classes."""

import dataclasses
import json
import types
from pathlib import Path

import fake_generator as fake
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_close, assert_equal
from reward_case import (
    CASE,
    CHECKPOINT,
    PROMPTS,
    copy_case,
    edit_json,
    recorded,
    sources,
    to_adapter_layout,
    to_hub_config,
    with_three_outputs,
)
from transformers import Qwen2VLModel

from convert.rewards import convert_rewards
from streamt1_jax.config import RunConfig, SearchConfig, StreamConfig
from streamt1_jax.errors import BadInputError, OutOfMemoryError, RewardError
from streamt1_jax.memory import REWARD_BYTES, REWARD_LINEAR
from streamt1_jax.noise import gaussian_noise
from streamt1_jax.parity import run_parity
from streamt1_jax.rewards import OK, PromptTable, PublishedRewards, load_rewards, placement
from streamt1_jax.rewards.frames import sample_frames
from streamt1_jax.rewards.loading import head_of
from streamt1_jax.rewards.published import read_settings
from streamt1_jax.rewards.qwen2vl import (
    empty_network,
    is_linear,
    pad_rows,
    parameter_shapes,
    published_sizes,
    reward_config,
)
from streamt1_jax.stream import Search, init_state, rollout, score_video

SCORE_ATOL = 5e-5
BATCH_ATOL = 1e-5
OTHER_PROMPTS = ["a cat", "über den Fluß <|Reward|> <|MQ_reward|> \U0001f600 {x}", "two\nlines, and many more words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The recorded case, converted in float32."""
    out = tmp_path_factory.mktemp("rewards") / "rewards"
    convert_rewards(sources(), out, dtype="float32")
    return out


@pytest.fixture(scope="module")
def published(folder) -> PublishedRewards:
    return PublishedRewards(folder, device="cpu")


@pytest.fixture(scope="module")
def arrays():
    return recorded()


def small(scorer):
    """The same model on pictures of a sixteenth of the area: for what does not depend on the size."""
    reader = scorer.reader
    patches = dataclasses.replace(reader.patches, min_pixels=784 * 8, max_pixels=784 * 16)
    twin = type(reader)(reader.network, reader.tokenizer, patches, reader.device, reader.batch_bytes)
    return type(scorer)(twin, scorer.settings)


@pytest.fixture(scope="module")
def hpsv3(published):
    return small(published.load("hpsv3"))


@pytest.fixture(scope="module")
def videoreward(published):
    return small(published.load("videoreward"))


def clips(n: int, frames: int, height: int = 40, width: int = 64) -> list[np.ndarray]:
    return list(np.random.default_rng(n).integers(0, 256, (n, frames, height, width, 3), dtype=np.uint8))


class TestRecorded:
    def test_the_case_matches_and_a_changed_record_does_not(self, tmp_path, capsys):
        case = copy_case(tmp_path / "case")
        changed = {**np.load(case / "expected.npz")}
        assert run_parity(str(case)) == 0, capsys.readouterr().out
        assert "37 of 37 quantities match" in capsys.readouterr().out
        changed["hpsv3_sigma"][1, 2] += 1e-4
        changed["videoreward_overall"][0] -= 1e-4
        changed["videoreward_input_ids_1"][7] += 1
        np.savez(case / "expected.npz", **changed)
        edit_json(case / "expected.json", frame_sampling_16fps_to_2fps={"9": [0, 3, 5, 7]})
        assert run_parity(str(case)) == 1
        wrong = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("MISMATCH")]
        assert wrong == ["hpsv3 sigma", "videoreward token ids of 1", "videoreward overall", "frames taken at 16 fps"]

    @pytest.mark.parametrize("name", ["expected.npz", "prompts.json"])
    def test_a_folder_that_is_no_case(self, tmp_path, name):
        case = copy_case(tmp_path / "case")
        (case / name).unlink()
        with pytest.raises(BadInputError, match=f"lacks {name}"):
            run_parity(str(case))


class TestLayouts:
    """The same weights in every published layout make the recorded scores."""

    def logits(self, case: Path, tmp_path: Path, arrays) -> np.ndarray:
        convert_rewards(sources(case, ("videoreward",)), tmp_path / "out", dtype="float32")
        model = PublishedRewards(tmp_path / "out", device="cpu").load("videoreward")
        window = arrays["window"][0]
        return model.logits([window[model.config.frames(len(window), 16)]], PROMPTS[:1])

    def test_an_adapter_over_the_base(self, tmp_path, arrays):
        case = copy_case(tmp_path / "case")
        to_adapter_layout(case)
        assert_close("logits", self.logits(case, tmp_path, arrays)[0], arrays["videoreward_logits"][0], SCORE_ATOL)

    def test_a_config_as_on_the_hub_and_the_newest_checkpoint(self, tmp_path, arrays):
        case = copy_case(tmp_path / "case")
        to_hub_config(case / "base_video/config.json")
        (case / "videoreward/checkpoint-9").mkdir()  # older, though later in the alphabet; and broken
        assert_close("logits", self.logits(case, tmp_path, arrays)[0], arrays["videoreward_logits"][0], SCORE_ATOL)

    def test_three_outputs_take_the_diagonal(self, tmp_path, arrays):
        case = copy_case(tmp_path / "case")
        head = with_three_outputs(case).numpy()
        expected = (arrays["videoreward_hidden"][0] * head).sum(axis=1)
        assert_close("logits", self.logits(case, tmp_path, arrays)[0], expected, SCORE_ATOL)

    def test_another_system_sentence_and_other_numbers(self, tmp_path, arrays, published):
        case = copy_case(tmp_path / "case")
        path = case / "base_video/chat_template.json"
        path.write_text(path.read_text().replace("You are a helpful assistant.", "You are a strict judge."))
        scale = {"VQ_mean": 1.0, "VQ_std": 2.0}
        edit_json(case / "videoreward/model_config.json", inference_config=scale, data_config={"fps": 4.0})
        convert_rewards(sources(case, ("videoreward",)), tmp_path / "out", dtype="float32")
        settings = read_settings(tmp_path / "out", "videoreward")
        assert "strict judge" in settings.instruction.render("a cat")
        assert settings.video is not None
        assert (settings.video.mean[0], settings.video.std[0], settings.video.fps) == (1.0, 2.0, 4.0)
        assert len(settings.video.frames(81, 16)) == 20


class TestBatches:
    def test_one_by_one_and_together(self, hpsv3, videoreward):
        """Rows of several lengths, padded; prompts that spell reserved tokens touch no other row."""
        for score, videos in ((hpsv3, clips(3, 2)), (videoreward, clips(3, 4))):
            together = np.array(score(videos, OTHER_PROMPTS))
            alone = [score([video], [prompt])[0] for video, prompt in zip(videos, OTHER_PROMPTS, strict=True)]
            assert_close(type(score).__name__, together, alone, BATCH_ATOL)
            assert len(set(np.round(together, 4))) == 3

    def test_a_bound_on_memory_changes_the_batches_alone(self, hpsv3, monkeypatch):
        videos, sizes, look = clips(2, 3), [], hpsv3.reader.network.look
        expected = hpsv3(videos, PROMPTS[:2])
        counting = lambda patches, grid: sizes.append(len(patches)) or look(patches, grid)  # noqa: E731
        monkeypatch.setattr(hpsv3.reader.network, "look", counting)
        for bound, batches in ((1.0, [1] * 6), (2.5 * self.row(hpsv3), [2, 2, 2]), (1e12, [6])):
            sizes.clear()
            monkeypatch.setattr(hpsv3.reader, "batch_bytes", bound)
            assert_close(f"bound {bound:g}", hpsv3(videos, PROMPTS[:2]), expected, BATCH_ATOL)
            assert sizes == batches

    def row(self, model) -> float:
        (batch,) = model.reader.batches(clips(1, 1), PROMPTS[:1])
        return model.reader.row_bytes(batch.grid, batch.ids.shape[1])

    def test_videos_of_several_sizes(self, videoreward):
        videos = [*clips(1, 4), *clips(1, 6), *clips(1, 4, 64, 40), *clips(1, 4)]
        together = videoreward(videos, PROMPTS[:1] * 4)
        assert_close("mixed", together, [videoreward([video], PROMPTS[:1])[0] for video in videos], BATCH_ATOL)
        assert together[0] == together[3]

    def test_visual_and_motion_quality_cannot_depend_on_the_prompt(self, videoreward):
        logits = videoreward.logits(clips(1, 4) * 3, OTHER_PROMPTS)
        assert_close("VQ and MQ", logits[1:, :2], logits[:1, :2].repeat(2, axis=0), BATCH_ATOL)
        assert np.ptp(logits[:, 2]) > 1e-3

    def test_a_video_of_one_frame_is_refused(self, videoreward):
        with pytest.raises(BadInputError, match="1 frame"):
            videoreward(clips(1, 1), PROMPTS[:1])


class TestAgainstTransformers:
    def test_hidden_states_are_those_of_its_own_model(self, hpsv3):
        """The same weights in `Qwen2VLModel`, with the positions of the published scores given to it."""
        network = hpsv3.reader.network
        config = json.loads((CASE / "base_image/config.json").read_text())
        theirs = Qwen2VLModel(reward_config(config, hpsv3.reader.tokenizer.length)).eval()
        state = network.model.state_dict()
        theirs.load_state_dict(state, strict=True)
        with torch.inference_mode():
            (batch,) = hpsv3.reader.batches([clip[None] for clip in clips(2, 3)[0]], OTHER_PROMPTS)
            ids = torch.from_numpy(batch.ids)
            lengths = [len(hpsv3.reader.tokenizer(prompt, batch.features.shape[1])) for prompt in OTHER_PROMPTS]
            mask = torch.tensor(pad_rows([np.ones(n, np.int64) for n in lengths]))
            grid = torch.tensor([batch.grid] * 3)
            pixels = batch.patches.flatten(0, 1)
            positions = torch.arange(ids.shape[1]).expand(3, 3, -1)
            features = theirs.get_image_features(pixels, grid).pooler_output
            assert_close("visual tokens", batch.features, torch.stack(features), BATCH_ATOL)
            hidden = theirs(
                input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pixels, image_grid_thw=grid
            ).last_hidden_state
            reserved = hidden[ids == hpsv3.reader.tokenizer.reserved_ids[0]]
        assert_close("hidden states", batch.hidden[:, 0], reserved, BATCH_ATOL)

    def test_positions_in_three_axes_make_other_scores(self, published, arrays):
        """The default of transformers 5, as recorded: were it used, the difference would be seen."""
        other = json.loads((CASE / "expected.json").read_text())["hpsv3"]["if_3d_positions_were_used_mu_candidate0"]
        assert np.abs(np.array(other) - arrays["hpsv3_mu"][0]).min() > 100 * SCORE_ATOL


FULL = {"hpsv3": 151658, "videoreward": 151660}  # the published tokenizers' lengths


class TestSizes:
    @pytest.mark.parametrize("name", FULL)
    def test_the_plan_knows_the_published_sizes(self, name, folder):
        settings = dataclasses.replace(read_settings(folder, name), head=(1024, 16) if name == "hpsv3" else (1,))
        network = empty_network(reward_config(published_sizes(name), FULL[name]), head_of(settings), 151655)
        shapes = {key: tuple(x.shape) for key, x in parameter_shapes(network).items()}
        numbers = {key: int(np.prod(shape)) for key, shape in shapes.items()}
        in_float32 = sum(n for key, n in numbers.items() if key.startswith("rm_head") and name == "hpsv3")
        assert 2 * sum(numbers.values()) + 2 * in_float32 == REWARD_BYTES[name]
        assert sum(n for key, n in numbers.items() if is_linear(key, shapes[key])) == REWARD_LINEAR[name]
        buffers = dict(network.named_buffers())
        assert buffers
        assert {x.dtype for x in buffers.values()} == {torch.float32}
        assert not any(x.is_meta for x in buffers.values())

    def test_a_folder_knows_its_own(self, folder):
        for name in FULL:
            stored = PublishedRewards(folder).weight_bytes(name)
            assert stored < (folder / name / "weights.safetensors").stat().st_size < 1.2 * stored
            kinds = ("float32", "bfloat16", "int8")
            sizes = {kind: PublishedRewards(folder, precision=kind).weight_bytes(name) for kind in kinds}
            assert stored == sizes["float32"] == 2 * sizes["bfloat16"] > 2 * sizes["int8"]

    def test_a_gpu_without_room_is_said_before_loading(self, folder, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3e9, 80e9))
        monkeypatch.setattr("streamt1_jax.rewards.published.torch_device", lambda name: torch.device("cuda:1"))
        words = r"need 5\.5 GB of cuda:1 \(hpsv3 0\.0 GB, .* and 3\.0 of its 80\.0 GB"
        with pytest.raises(OutOfMemoryError, match=words):
            load_rewards(folder, PromptTable())

    def test_what_jax_leaves_to_torch(self, monkeypatch):
        assert placement.jax_fraction(80e9, 25.4e9) == 0.68
        with pytest.raises(OutOfMemoryError, match="--reward-device"):
            placement.jax_fraction(16e9, 25.4e9)
        placement.refuse_overfull(50e9, 54e9, 25e9)
        with pytest.raises(OutOfMemoryError, match=r"the run needs 60\.0 GB, .* JAX may take 54\.0 GB"):
            placement.refuse_overfull(60e9, 54e9, 25e9)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80e9, 80e9))
        for given, expected in ((None, "0.68"), ("0.5", "0.5")):
            monkeypatch.delenv(placement.FRACTION, raising=False)
            if given:
                monkeypatch.setenv(placement.FRACTION, given)
            placement.share_gpu(25.4e9, torch.device("cuda:0"))
            assert placement.os.environ[placement.FRACTION] == expected
        monkeypatch.delenv(placement.FRACTION)
        placement.share_gpu(25.4e9, torch.device("cpu"))
        assert placement.FRACTION not in placement.os.environ


class TestPrecision:
    def test_bfloat16_is_near_and_keeps_the_image_head(self, folder, arrays):
        model = PublishedRewards(folder, device="cpu", precision="bfloat16").load("hpsv3")
        assert model.reader.network.body_dtype == torch.bfloat16
        assert model.reader.network.rm_head[0].weight.dtype == torch.float32
        (rated,) = model.rate([arrays["frames"][0, :1]], PROMPTS[:1])
        assert 0 < np.abs(rated[0, 0] - arrays["hpsv3_mu"][0, 0]) < 0.1

    def test_eight_bits_are_for_the_body(self, folder, monkeypatch):
        seen = []
        quantization = types.SimpleNamespace(
            quantize_=lambda model, config: seen.append((type(model).__name__, config)),
            Int8WeightOnlyConfig=lambda: "int8",
        )
        monkeypatch.setattr("streamt1_jax.rewards.placement.importlib.import_module", lambda name: quantization)
        model = PublishedRewards(folder, device="cpu", precision="int8").load("videoreward")
        assert seen == [("Qwen2VLModel", "int8")]
        assert model.reader.network.body_dtype == torch.bfloat16

    def test_eight_bits_without_the_library(self, folder, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
        with pytest.raises(BadInputError, match=r"streamt1-jax\[int8\]"):
            PublishedRewards(folder, device="cpu", precision="int8").load("videoreward")

    def test_an_unknown_one(self, folder):
        with pytest.raises(BadInputError, match="precision is 'fp4', expected one of stored"):
            PublishedRewards(folder, precision="fp4")


def search_with(short, long) -> Search:
    stream = StreamConfig(latent_frames_per_chunk=2, sink_size=2, local_attn_size=8, denoising_steps=(1000, 500, 250))
    config = RunConfig(stream, SearchConfig(beams=2, candidates_per_beam=1, max_sink_size=4, sliding_window_size=2))
    return Search(fake.fake_generator(), short, long, gaussian_noise(fake.CHUNK, 3), config)


def run_in_scan(search: Search, prompt_index: int, chunks: int):
    params = fake.fake_params()
    prompt = jnp.ones((3, 5))
    conditioning = search.generator.prepare(params, prompt, jnp.int32(prompt_index))
    run = jax.jit(rollout, static_argnames=("search", "num_chunks"))
    _, head, tail = run(search, params, conditioning, init_state(search, 3, chunks), num_chunks=chunks)
    return jax.device_get((head, tail))


class TestInTheSearch:
    @pytest.fixture(scope="class")
    def rewards(self, published, hpsv3, videoreward):
        prompts = PromptTable(["unused", OTHER_PROMPTS[1]])
        published = dataclasses.replace(published, _loaded={"hpsv3": hpsv3, "videoreward": videoreward})
        return [published.reward(name, prompts) for name in ("hpsv3", "videoreward")]

    def test_inside_the_scan_as_outside_it(self, rewards, hpsv3, videoreward):
        """Every score that the compiled search saw, from the frames that it kept."""
        head, tail = run_in_scan(search_with(*rewards), 1, chunks=3)
        for reward in rewards:
            reward.raise_if_failed()
        records = [head, *(jax.tree.map(lambda x, i=i: x[i], tail) for i in range(2))]
        windows: list[list[np.ndarray]] = [[], []]
        for record in records:
            parents = [0, 1] if record is head else [int(flat) for flat in record.kept]
            windows = [[*windows[parent], record.frames[beam]] for beam, parent in enumerate(parents)]
            kept = [int(flat) for flat in record.kept]
            short = hpsv3(list(record.frames), [OTHER_PROMPTS[1]] * 2)
            assert_close("short", record.short.reshape(-1)[kept], short, BATCH_ATOL)
            videos = [np.concatenate(window[-2:]) for window in windows]
            long = videoreward([v[sample_frames(len(v), 16)] for v in videos], [OTHER_PROMPTS[1]] * 2)
            assert_close("long", record.long.reshape(-1)[kept], long, BATCH_ATOL)

    def test_a_finished_video_of_any_length(self, rewards, videoreward):
        video = clips(1, 21)[0]
        inside = score_video(rewards[1], video, jnp.int32(1))
        assert_close("whole", inside, videoreward([video[sample_frames(21, 16)]], [OTHER_PROMPTS[1]])[0], BATCH_ATOL)
        explained = rewards[1].explain(video, OTHER_PROMPTS[1], 16.0)
        assert_close("explained", explained["score"], inside, BATCH_ATOL)
        assert explained["frame_indices"] == sample_frames(21, 16).tolist()

    def test_only_the_wanted_frames_cross(self, rewards, monkeypatch, videoreward):
        seen, logits = [], videoreward.logits
        counting = lambda clips, prompts: seen.extend(map(len, clips)) or logits(clips, prompts)  # noqa: E731
        monkeypatch.setattr(videoreward, "logits", counting)
        videos = jnp.asarray(np.stack(clips(3, 60, 16, 16)))
        verdict = jax.jit(rewards[1])(videos, jnp.array([9, 60, 41]), jnp.int32(0))
        assert seen == [4, 8, 6]
        assert_equal("status", verdict.status, [OK] * 3)

    def test_one_frame_is_the_models_own_refusal(self, rewards):
        verdict = rewards[1](jnp.zeros((1, 3, 16, 16, 3), jnp.uint8), jnp.array([1]), jnp.int32(0))
        assert np.isnan(verdict.scores[0])
        with pytest.raises(RewardError, match="1 frame, expected at least 2"):
            rewards[1].raise_if_failed()

    def test_a_model_that_raises_and_one_that_says_nan(self, rewards, monkeypatch, hpsv3, videoreward):
        monkeypatch.setattr(hpsv3.reader, "hidden", lambda *args: torch.full((8, 1, 64), torch.nan))
        monkeypatch.setattr(videoreward.reader, "hidden", lambda *args: 1 / 0)
        videos = jnp.zeros((2, 4, 16, 16, 3), jnp.uint8)
        short, long = (reward(videos, jnp.full(2, 4), jnp.int32(0)) for reward in rewards)
        assert np.isnan(short.scores).all()
        assert_equal("status", short.status, [OK] * 2)  # NaN is the model's own word
        rewards[0].raise_if_failed()
        assert np.isnan(long.scores).all()
        with pytest.raises(RewardError, match="'videoreward' failed with ZeroDivisionError"):
            rewards[1].raise_if_failed()

    def test_the_record_says_which_model_it_was(self, rewards, folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        for reward in rewards:
            assert reward.about["weights_sha256"] == manifest["files"][f"{reward.name}/weights.safetensors"]["sha256"]
        assert rewards[1].about["origin"]["weights"]["checkpoint"] == Path(CHECKPOINT).name
        assert rewards[1].about["origin"]["lora"] == {"merged": True, "ranks": [4]}
