"""Video files by PyAV: H.264 in mp4, written whole or not at all; or growing, for streams.

Colours are BT.709 in limited range and tagged so: without tags players guess from the height, and guess
differently.
"""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from streamt1_jax.errors import BadInputError
from streamt1_jax.outputs import SOFTWARE, atomic_write, write_errors

CRF = 18  # visually lossless in H.264's scale of 0 (exact) to 51
FASTSTART = {"movflags": "+faststart"}
BT709, LIMITED_RANGE = 1, 1  # in the numbering of H.264, annex E, and of FFmpeg


def write_mp4(
    path: str | Path,
    frames: UInt8[np.ndarray, "T H W 3"],
    fps: float | Fraction = 16,
    *,
    overwrite: bool = True,
) -> None:
    """Writes a video that plays while it loads (index first); `path` appears when it is complete.

    Args:
        path: in a folder that exists.
        frames: RGB; H and W even, as 4:2:0 colour needs.
        fps: frames a second.
        overwrite: False refuses a `path` that exists, also one that appeared meanwhile.

    Raises:
        BadInputError: frames that are no video, or a path that cannot be written.
    """
    rate = _rate(fps)
    check_frames(frames)
    with atomic_write(path, overwrite=overwrite) as temporary:
        _encode(temporary, frames, rate)


def check_frames(frames: np.ndarray) -> None:
    """Raises `BadInputError` for frames that are no video."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise BadInputError(
            f"frames are {frames.dtype} {list(frames.shape)}, expected uint8 [T, H, W, 3] with nothing empty: "
            "pass at least one RGB frame"
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise BadInputError(
            f"frames are {width}x{height}, expected an even width and height (4:2:0 colour): crop a row or a column"
        )


def _rate(fps: float | Fraction) -> Fraction:
    try:
        rate = Fraction(fps).limit_denominator(1001)
    except (TypeError, ValueError, OverflowError):
        rate = Fraction(0)
    if isinstance(fps, bool) or not 0 < rate <= 1000:
        raise BadInputError(
            f"fps is {fps!r}, expected a number above 0 and up to 1000: 16 is what the models were trained at"
        )
    return rate


def _h264(container: Any, frames: np.ndarray, rate: Fraction, options: dict[str, str]) -> Any:
    """A stream for frames like these."""
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(CRF), **options})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    codec = stream.codec_context
    codec.colorspace = codec.color_primaries = codec.color_trc = BT709
    codec.color_range = LIMITED_RANGE
    return stream


def _picture(image: np.ndarray) -> Any:
    import av

    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return picture.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED_RANGE)


def _key_frame() -> Any:
    from av.video.frame import PictureType

    return PictureType.I


def _encode(path: Path, frames: np.ndarray, rate: Fraction) -> None:
    import av

    with av.open(str(path), "w", format="mp4", options=FASTSTART) as container:
        container.metadata["comment"] = SOFTWARE
        stream = _h264(container, frames, rate, {})
        for image in frames:
            container.mux(stream.encode(_picture(image)))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        written = sum(packet.size > 0 for packet in container.demux(video=0))
    # FFmpeg does not report every write that failed while it moves the index to the front.
    if written != len(frames):
        raise OSError(f"{written} of {len(frames)} frames arrived on the disk")


class GrowingVideo:
    """An mp4 that a player can open while it grows; when closed it is an ordinary mp4, its index first.

    It grows in fragments of one frame, so that after a kill all but the last frame are playable. Memory and time of a
    chunk do not depend on the length.

    Args:
        path: in a folder that exists; what stands there is replaced.
        fps: frames a second.

    Raises:
        BadInputError: a path that cannot be written.
    """

    def __init__(self, path: str | Path, fps: float | Fraction = 16):
        self.path, self._rate = Path(path), _rate(fps)
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> "GrowingVideo":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, frames: UInt8[np.ndarray, "T H W 3"]) -> None:
        """Appends frames, of the size of the first ones; they are in the file when this returns, but for the last."""
        with write_errors(self.path):
            container = self._container or self._open(frames)
            for number, image in enumerate(frames):
                picture = _picture(image)
                if number == 0:  # players can start at every chunk
                    picture.pict_type = _key_frame()
                container.mux(self._stream.encode(picture))

    def _open(self, frames: np.ndarray) -> Any:
        import av

        check_frames(frames)
        flags = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
        self._container = av.open(str(self.path), "w", format="mp4", options=flags)
        self._container.metadata["comment"] = SOFTWARE
        # No look-ahead: every frame leaves the encoder at once.
        self._stream = _h264(self._container, frames, self._rate, {"tune": "zerolatency"})
        return self._container

    def close(self) -> None:
        """Ends the file and makes it an ordinary mp4 without encoding anew; nothing where nothing was added."""
        if self._container is None:
            return
        container, self._container = self._container, None
        with write_errors(self.path):
            container.mux(self._stream.encode())
            container.close()
        with atomic_write(self.path) as temporary:
            _remux(self.path, temporary)

    def discard(self) -> None:
        """Ends the file and deletes it."""
        container, self._container = self._container, None
        if container is not None:
            with write_errors(self.path):
                container.close()
                self.path.unlink(missing_ok=True)


def _remux(source: Path, target: Path) -> None:
    import av

    with av.open(str(source)) as old, av.open(str(target), "w", format="mp4", options=FASTSTART) as new:
        new.metadata["comment"] = SOFTWARE
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


def read_video(path: str | Path) -> tuple[UInt8[np.ndarray, "T H W 3"], float]:
    """Every frame of a video file, and its frames a second.

    Raises:
        BadInputError: no such file, not a video, or a damaged one.
    """
    import av
    from av.error import FFmpegError

    if not Path(path).is_file():
        raise BadInputError(f"{path} is not a file, expected a video: check the path")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadInputError(f"{path} holds no picture, expected a video: check the file")
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            rate, promised = stream.average_rate or stream.guessed_rate, stream.frames
    except FFmpegError as error:
        raise BadInputError(
            f"{path} cannot be read as a video ({error}): check that it plays and is complete"
        ) from error
    if not frames or not rate or len(frames) < promised:
        raise BadInputError(
            f"{path} holds {len(frames)} of {promised} frames at the rate {rate}, expected a video: check its size"
        )
    return np.stack(frames), float(rate)
