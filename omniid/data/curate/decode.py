"""Frames of a video, upright and with the scene cuts marked, decoded in a process of their own.

A broken file may take its decoder down; here that ends a child process and becomes an error about that one video. The
pipe holds less than a frame, so the child decodes the next frame while the parent looks at the last one.
"""

import importlib.util
import math
import multiprocessing
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from omniid.errors import OmniIDError

SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"})
_CUT_SIDE = 192  # of the frames in which cuts are looked for, pixels
# Below PySceneDetect's 27: a cut too many costs nothing, since tracks of one person are merged.
_CUT_THRESHOLD = 15.0
_MAX_BAD_PACKETS = 100


class VideoError(OmniIDError):
    """A video that cannot be used."""


def check_packages() -> None:
    """Raises VideoError where a package that videos need is missing."""
    missing = [name for name in ("av", "scenedetect") if importlib.util.find_spec(name) is None]
    if missing:
        raise VideoError(f"videos need {' and '.join(missing)}; install them with: pip install 'omniid[video]'")


@dataclass(slots=True, frozen=True)
class Span:
    """A part of a video, both ends included: seconds, or numbers of frames at its mean rate."""

    start: float
    stop: float
    in_frames: bool = False


@dataclass(slots=True, frozen=True, eq=False)
class Frame:
    index: int
    """Counted from 0 among the frames of the video, or of its span, that could be decoded."""
    time: float
    """Seconds from the start; distances vary where the rate does."""
    starts_scene: bool
    pixels: np.ndarray = field(repr=False)
    """uint8 (H, W, 3) RGB, upright."""
    full_size: tuple[int, int]
    """Width and height of the upright frame before it was scaled."""


class Decoder:
    """A child process that decodes one video after the other. Use it as a context manager, or `close` it."""

    def __init__(self) -> None:
        self._process = self._connection = None
        self.note: str | None = None
        """What was wrong with the video whose frames came last, such as "cut off after 3.0 of 12.0 s"."""
        self.remarks: list[str] = []
        """What else is unusual about it: that it was turned, or that the rate of its frames varies."""

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.terminate()
            self._process.join()
            self._process = self._connection = None

    def frames(
        self,
        path: Path,
        shrink: float = 1.0,
        wanted: Container[int] | None = None,
        find_cuts: bool = True,
        span: Span | None = None,
    ) -> Iterator[Frame]:
        """Frames of a video in order, at `shrink` of their size; of the `wanted` indices and the span only, where given.

        Raises VideoError for a file without frames; one that is cut off gives what it has and leaves a `note`.
        """
        self._start()
        self.note, self.remarks = None, []
        is_done = False
        try:
            self._connection.send((str(path), shrink, wanted, find_cuts, span))
            while True:
                kind, value = self._connection.recv()
                if kind == "frame":
                    shape = value.pop("shape")
                    pixels = np.frombuffer(self._connection.recv_bytes(), np.uint8).reshape(shape)
                    yield Frame(pixels=pixels, **value)
                    continue
                is_done = True
                if kind == "error":
                    raise VideoError(f"{path} {value}")
                self.note, self.remarks = value
                return
        except (EOFError, ConnectionError) as error:
            raise VideoError(f"{path} brings the decoder down; repair or remove the file") from error
        finally:
            if not is_done:  # frames of this video may still be in the pipe
                self.close()

    def _start(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        self.close()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()


def _serve(connection) -> None:
    """The child: answers requests until the parent is gone."""
    while True:
        try:
            path, shrink, wanted, find_cuts, span = connection.recv()
            try:
                connection.send(("end", _decode(path, shrink, wanted, find_cuts, span, connection)))
            except VideoError as error:
                connection.send(("error", str(error)))
        except (EOFError, ConnectionError, KeyboardInterrupt):
            return


def _decode(
    path: str, shrink: float, wanted: Container[int] | None, find_cuts: bool, span: Span | None, connection
) -> tuple[str | None, list[str]]:
    """What was wrong with the video, and what is unusual about it."""
    is_cut = _cut_finder() if find_cuts else None
    last = max(wanted, default=-1) if wanted is not None else None
    index, rotation, times = 0, 0, []
    packets = Packets(path, span)
    for frame in packets:
        starts_scene = is_cut is not None and is_cut(frame, index)
        times.append(float(frame.time or 0.0))
        rotation = frame.rotation
        if wanted is None or index in wanted:
            pixels, full_size = _upright(frame, shrink)
            facts = {"index": index, "time": times[-1], "starts_scene": starts_scene or index == 0}
            connection.send(("frame", {**facts, "shape": pixels.shape, "full_size": full_size}))
            connection.send_bytes(memoryview(pixels).cast("B"))
        index += 1
        if last is not None and index > last:
            return None, []
    if index == 0:
        where = "" if span is None else f" from {span.start:g} to {span.stop:g}"
        reason = packets.trouble or "there is none"
        raise VideoError(f"shows no frame{where} ({reason}); copy the video again from its source")
    return _damage(packets, times), _remarks(rotation, times)


def _damage(packets: "Packets", times: list[float]) -> str | None:
    if packets.trouble:
        return f"damaged ({packets.trouble}), {len(times)} frames were read"
    if (
        packets.span is None
        and packets.duration is not None
        and times[-1] - times[0] < packets.duration - max(1.0, 0.05 * packets.duration)
    ):
        return f"cut off after {times[-1] - times[0]:.1f} of {packets.duration:.1f} s, {len(times)} frames were read"
    return None


def _remarks(rotation: int, times: list[float]) -> list[str]:
    remarks = []
    if round(rotation / 90) % 4:
        remarks.append(f"turned by {-rotation % 360} degrees as its metadata say")
    steps = np.diff(times)
    if len(steps) and steps.max() > 1.5 * max(steps.min(), 1e-6):
        remarks.append(f"frames {steps.min() * 1e3:.0f} to {steps.max() * 1e3:.0f} ms apart")
    return remarks


class Packets:
    """Decoded frames of a file's first video stream; damaged packets are passed over and named in `trouble`."""

    def __init__(self, path: str, span: Span | None = None) -> None:
        self.path, self.span = path, span
        self.trouble: str | None = None
        self.duration: float | None = None
        """Seconds, as the file says."""

    def __iter__(self) -> Iterator:
        import av

        av.logging.set_level(av.logging.PANIC)  # what it says of a damaged file is in `trouble`
        try:
            container = av.open(self.path, metadata_errors="ignore")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"is not a video that can be read ({_reason(error)}); convert it to MP4 first") from error
        with container:
            if not container.streams.video:
                raise VideoError("has no video stream; remove the file")
            stream, bad = container.streams.video[0], 0
            if container.duration:
                self.duration = container.duration / av.time_base
            start, stop = self._seconds(stream)
            if start > 0:
                container.seek(int(start * av.time_base), backward=True)
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets)
                except StopIteration:
                    return
                except (av.FFmpegError, OSError) as error:
                    self.trouble = _reason(error)
                    return
                try:
                    for frame in packet.decode():
                        if frame.time is not None and frame.time > stop:
                            return
                        if frame.time is None or frame.time >= start:
                            yield frame
                except (av.FFmpegError, OSError) as error:
                    self.trouble, bad = _reason(error), bad + 1
                    if bad > _MAX_BAD_PACKETS:
                        return

    def _seconds(self, stream) -> tuple[float, float]:
        """Times of the first and last frame that are wanted, with less than a frame of slack."""
        if self.span is None:
            return 0.0, math.inf
        rate = float(stream.average_rate or 25)
        scale, slack = (1 / rate if self.span.in_frames else 1.0), 0.4 / rate
        return self.span.start * scale - slack, self.span.stop * scale + slack


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().rstrip(".")[:100]


def _upright(frame, shrink: float) -> tuple[np.ndarray, tuple[int, int]]:
    """RGB pixels of a frame, scaled and turned as its metadata says, and the full size."""
    width, height = (max(1, round(side * shrink)) for side in (frame.width, frame.height))
    pixels = frame.reformat(width, height, "rgb24", interpolation="AREA" if shrink < 1 else "BILINEAR").to_ndarray()
    quarter = round(frame.rotation / 90) % 4  # counter-clockwise, from the display matrix
    full_size = (frame.width, frame.height) if quarter % 2 == 0 else (frame.height, frame.width)
    return np.ascontiguousarray(np.rot90(pixels, quarter)), full_size


def _cut_finder() -> Callable[[object, int], bool]:
    """Says of each frame whether a scene starts there: PySceneDetect's content detector on small frames."""
    from scenedetect import ContentDetector, FrameTimecode

    detector = ContentDetector(_CUT_THRESHOLD, min_scene_len=1)

    def is_cut(frame, index: int) -> bool:
        scale = min(1.0, _CUT_SIDE / max(frame.width, frame.height))
        size = (max(16, round(side * scale)) for side in (frame.width, frame.height))
        small = frame.reformat(*size, "bgr24", interpolation="AREA").to_ndarray()
        return bool(detector.process_frame(FrameTimecode(index, 25.0), small))

    return is_cut
