"""Video files: what goes in comes out, and a failure leaves nothing."""

import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from streamt1_jax import video
from streamt1_jax.errors import BadInputError
from streamt1_jax.video import GrowingVideo, read_video, write_mp4


def moving_square(frames=21, height=48, width=64):
    """A red square on blue; flat colours survive compression, so errors mean mistakes."""
    video = np.empty((frames, height, width, 3), np.uint8)
    video[...] = (30, 60, 200)
    for t in range(frames):
        video[t, 16:32, t : t + 16] = (250, 20, 30)
    return video


def test_what_is_written_can_be_read(tmp_path):
    frames = moving_square()
    write_mp4(tmp_path / "a.mp4", frames)
    read, fps = read_video(tmp_path / "a.mp4")
    assert (read.shape, read.dtype, fps) == (frames.shape, np.uint8, 16.0)
    error = np.abs(read.astype(int) - frames)
    assert error.mean() < 3, f"mean error {error.mean():.2f}"
    flat = error[:, 40:, :]  # far from every edge: colours themselves, by the right matrix and range
    assert flat.max() <= 4, f"largest error of a flat colour {flat.max()}"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_the_file_plays_while_it_loads_and_names_its_colours(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving_square())
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (int(codec.colorspace), int(codec.color_primaries), int(codec.color_trc)) == (1, 1, 1)
        assert int(codec.color_range) == 1


@pytest.mark.parametrize(
    ("fps", "expected"), [(16, 16.0), (24.0, 24.0), (Fraction(24000, 1001), 24000 / 1001), (23.976, 23.976)]
)
def test_the_rate_is_kept(tmp_path, fps, expected):
    write_mp4(tmp_path / "a.mp4", moving_square(3), fps)
    assert read_video(tmp_path / "a.mp4")[1] == pytest.approx(expected, abs=1e-3)


def test_one_frame_is_a_video(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving_square(1))
    read, fps = read_video(tmp_path / "a.mp4")
    assert (len(read), fps) == (1, 16.0)


@pytest.mark.parametrize(
    ("frames", "fps", "words"),
    [
        (np.zeros((0, 16, 16, 3), np.uint8), 16, "nothing empty"),
        (np.zeros((2, 15, 16, 3), np.uint8), 16, "16x15, expected an even"),
        (np.zeros((2, 16, 16, 3), np.uint8), 0, "fps is 0"),
        (np.zeros((2, 16, 16, 3), np.uint8), float("nan"), "fps is nan"),
        (np.zeros((2, 16, 16, 3), np.uint8), True, "fps is True"),
        (np.zeros((2, 16, 16, 3), np.uint8), 1e9, "fps is"),
    ],
    ids=["empty", "odd", "rate 0", "rate NaN", "rate bool", "rate huge"],
)
def test_what_is_no_video_is_refused(tmp_path, frames, fps, words):
    with pytest.raises(BadInputError, match=words):
        write_mp4(tmp_path / "a.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_a_failure_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"earlier")

    def half(target, frames, rate):
        target.write_bytes(b"half a vid")
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "_encode", half)
    with pytest.raises(KeyboardInterrupt):
        write_mp4(path, moving_square(1))
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.skipif(os.name != "posix", reason="limits a process's files by POSIX means")
@pytest.mark.parametrize("limit", [1000, 30_000])
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, limit):
    code = (
        "import resource, sys, numpy as np\n"
        "from streamt1_jax.errors import BadInputError\n"
        "from streamt1_jax.video import write_mp4\n"
        "import av\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "frames = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)\n"
        "try:\n    write_mp4(sys.argv[1], frames)\n"
        "except BadInputError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.mp4")], capture_output=True, text=True, check=True
    )
    assert "cannot be written" in done.stdout
    assert not list(tmp_path.iterdir())


def test_broken_files_are_refused(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving_square())
    whole = (tmp_path / "a.mp4").read_bytes()
    broken = {"text": b"not a video", "empty": b"", "head": whole[:200], "half": whole[: len(whole) * 3 // 4]}
    for name, data in broken.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(data)
        with pytest.raises(BadInputError, match=name):
            read_video(path)
    with pytest.raises(BadInputError, match="not a file"):
        read_video(tmp_path / "none.mp4")


def test_a_file_without_picture_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(BadInputError, match="no picture"):
        read_video(tmp_path / "a.wav")


def playable(path) -> int:
    """Frames that a player gets out of a file as it is now."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_growing_video_can_be_played_all_along_and_is_an_ordinary_one_in_the_end(tmp_path):
    path, frames = tmp_path / "live.mp4", moving_square(33)
    video = GrowingVideo(path)
    for begin, end in ((0, 9), (9, 21), (21, 33)):
        video.add(frames[begin:end])
        assert playable(path) >= end - 1
    data = path.read_bytes()
    assert b"moof" in data
    assert b"streamt1-jax" in data[:4096]
    video.close()
    video.close()
    read, fps = read_video(path)
    assert (read.shape, fps) == (frames.shape, 16.0)
    assert np.abs(read.astype(int) - frames).mean() < 4
    data = path.read_bytes()
    assert b"moof" not in data
    assert data.index(b"moov") < data.index(b"mdat")
    assert [p.name for p in tmp_path.iterdir()] == ["live.mp4"]


def test_a_growing_video_that_is_cut_short_is_playable(tmp_path):
    """As after a kill: whatever reached the disk."""
    path = tmp_path / "live.mp4"
    video = GrowingVideo(path)
    video.add(moving_square(21))
    whole = path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    assert 5 < playable(tmp_path / "cut.mp4") < 21
    video.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["cut.mp4"]


def test_a_growing_video_without_frames_leaves_nothing(tmp_path):
    with GrowingVideo(tmp_path / "live.mp4"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_growing_video_refuses_a_bad_place_and_bad_frames(tmp_path):
    with pytest.raises(BadInputError, match="cannot be written"):
        GrowingVideo(tmp_path / "none" / "live.mp4").add(moving_square(1))
    with pytest.raises(BadInputError, match="even"):
        GrowingVideo(tmp_path / "live.mp4").add(np.zeros((1, 15, 16, 3), np.uint8))
    assert not list(tmp_path.iterdir())
