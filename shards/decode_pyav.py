"""The fast decoder: ffmpeg's libraries in this process, through PyAV.

No process to start, no pipe to copy through: four fifths of the cost of decode_ffmpeg.py (docs/performance.md). In
return a file that crashes libavcodec takes this process with it, and the time limit is looked at between packets only.
In a worker of a build (pool.py), `give_notice` makes of both what the other decoder makes of them: a video that is set
aside with its reason. The build then begins the unfinished shards again without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import json
import re
import resource
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from shards.decode import DecodeError, DecodeSettings, Planes, SourceInfo

MAX_ERROR_RATE = 2 / 3  # of packets, past which ffmpeg's own command gives a video up
GRACE = 5.0  # seconds past the limit, which is otherwise found between packets
MAX_ADDRESS_SPACE = 8 << 30  # bytes beyond what a worker has at its start, as decode_ffmpeg.py gives a process

_notice: IO[str] | None = None  # where this process, if it may be ended for a video, writes which it is


@functools.cache
def pyav_version() -> str:
    """PyAV's version and those of the libraries that it carries, which decide the pixels."""
    libraries = (f"{name} {'.'.join(map(str, av.library_versions[name]))}" for name in ("libavcodec", "libswscale"))
    return f"PyAV {av.__version__}, {', '.join(libraries)}"


class PyAVDecoder:
    """shards.decode.Decoder without a process of its own."""

    def __init__(self, video: Path, settings: DecodeSettings) -> None:
        self.video, self.settings = video, settings
        self.info: SourceInfo | None = None

    def __iter__(self) -> Iterator[Planes]:
        with _noticed(self.video, self.settings.timeout + GRACE):
            try:
                yield from self._frames()
            except MemoryError as error:
                if _notice is None:  # the machine's shortage, not a limit's
                    raise
                raise DecodeError(self.video, "wants more memory than a decoder may have") from error

    def _frames(self) -> Iterator[Planes]:
        deadline = time.monotonic() + self.settings.timeout
        try:
            # titles in Latin-1 are common in HMDB-51 and no reason to refuse a video
            container = av.open(str(self.video.absolute()), metadata_errors="replace")
        except av.error.MemoryError:  # an FFmpegError, and no fault of the video: frames would be missing
            raise
        except av.error.FFmpegError as error:
            raise DecodeError(self.video, _words(error), repr(error)) from None
        with container:
            stream = container.streams.best("video")  # as ffmpeg's command: not a cover picture that comes first
            if not isinstance(stream, av.VideoStream):
                raise DecodeError(self.video, "it has no video stream")
            context = stream.codec_context
            if context.width * context.height > self.settings.max_pixels:
                found = f"frames of {context.width}x{context.height}"
                raise DecodeError(self.video, f"{found} exceed the limit of {self.settings.max_pixels} pixels")
            context.thread_count = 1  # a video a worker; threads of the codec would count a worker twice
            context.options = {"max_pixels": str(self.settings.max_pixels)}
            reformatter, complaints = VideoReformatter(), Counter[str]()
            count = packets = faults = turns = 0
            # read before decoding: a damaged frame can change the context
            source = SourceInfo(
                codec=context.codec.canonical_name,
                width=context.width,
                height=context.height,
                fps=float(stream.average_rate or stream.guessed_rate or 0),
            )
            demuxer = container.demux(stream)
            while True:
                if time.monotonic() > deadline:
                    raise DecodeError(self.video, f"took longer than {self.settings.timeout:g} s")
                try:
                    packet = next(demuxer)
                    if not packet.size:  # damage, or demux()'s own last word: the decoder would take it for the end
                        continue
                except StopIteration:
                    packet = None
                except av.error.MemoryError:
                    raise
                except av.error.FFmpegError as error:  # a container that breaks off: what came before it counts
                    complaints[_words(error)] += 1
                    packet = None
                packets += packet is not None
                try:
                    frames = context.decode(packet)  # None drains the decoder
                except av.error.MemoryError:
                    raise
                except av.error.FFmpegError as error:
                    complaints[_words(error)] += 1
                    faults += 1
                    frames = []
                for frame in frames:
                    if frame.is_corrupt:
                        complaints["corrupt decoded frame"] += 1
                    if count == 0:  # asked once: a frame that has shown its side data lives until the next collection
                        turns = self._turns(frame)
                    count += 1
                    yield self._planes(frame, turns, reformatter)
                if packet is None:
                    break
        said = "; ".join(f"{words} ({times} times)" for words, times in complaints.items())
        if count == 0 or faults > MAX_ERROR_RATE * packets:
            found = f"after {count} frames: " if count else ""
            raise DecodeError(self.video, found + (said or "no frame could be decoded"), said)
        self.info = dataclasses.replace(source, errors=said)

    def _planes(self, frame: av.VideoFrame, turns: int, reformatter: VideoReformatter) -> Planes:
        """Scaled like decode_ffmpeg.py's `scale` filter; upright, as ffmpeg's command turns a rotated source."""
        h, w = self.settings.height, self.settings.width
        if turns % 2:
            h, w = w, h
        scaled = reformatter.reformat(
            frame,
            width=w,
            height=h,
            format="yuvj420p",
            interpolation=self.settings.scaler.upper(),
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        y, u, v = (
            np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
            for plane in scaled.planes
        )
        if turns:
            y, u, v = (np.ascontiguousarray(np.rot90(plane, turns)) for plane in (y, u, v))
        return y, u, v

    def _turns(self, frame: av.VideoFrame) -> int:
        """Quarter turns to the left that make the frame upright; DecodeError where it takes more than turning."""
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return 0
        a, b, _, c, d, *_ = struct.unpack("<9i", bytes(memoryview(matrix))[:36])
        if a * d - b * c < 0 or ((a or d) and (b or c)):
            raise DecodeError(self.video, "it is to be shown mirrored or aslant; use --decoder ffmpeg for it")
        return round(frame.rotation / 90) % 4


def give_notice(path: Path, settings: DecodeSettings) -> None:
    """From now on a video that crashes this process, or hangs in it past its time, ends it and is named in the file
    `path`, which `ended_by` reads; and one that wants more than MAX_ADDRESS_SPACE, the JPEGs apart, is a DecodeError.
    """
    global _notice
    _notice = open(path, "w", encoding="utf-8")  # noqa: SIM115  as long as the process lives
    faulthandler.enable(_notice)
    with contextlib.suppress(OSError, ValueError):  # Linux
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = used + MAX_ADDRESS_SPACE + 2 * (settings.max_mib << 20)
        if soft == resource.RLIM_INFINITY or soft > wanted:  # a lower one of the user's stays
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


@contextlib.contextmanager
def _noticed(video: Path, seconds: float) -> Iterator[None]:
    """Gives notice of a video, where `give_notice` was called."""
    if _notice is None:
        yield
        return
    _notice.write(f"{json.dumps(str(video))}\n")
    _notice.flush()
    # a thread that needs no interpreter, which a decoder that hangs may hold
    faulthandler.dump_traceback_later(seconds, exit=True, file=_notice)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        _notice.seek(0)
        _notice.truncate()


def ended_by(path: Path, settings: DecodeSettings) -> tuple[str, str] | None:
    """(video, reason) where the process whose notice this is was ended for a video, else None."""
    named, _, said = path.read_text("utf-8", "replace").partition("\n")
    if not named.startswith('"'):  # nothing, or what a crash between two videos left
        return None
    video = json.loads(named)
    if crashed := re.search(r"^Fatal Python error: (.+)$", said, re.M):
        return video, f"crashed the decoder ({crashed[1]})"
    return (video, f"took longer than {settings.timeout:g} s") if re.match(r"Timeout \(", said) else None


def _words(error: av.error.FFmpegError) -> str:
    return str(error.strerror or error).strip()
