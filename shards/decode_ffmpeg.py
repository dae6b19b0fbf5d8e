"""The default decoder: one ffmpeg process a video, through ffmpeg-python, raw planes over a pipe.

A process of its own is worth its start (20 to 90 ms): a file that crashes or hangs the decoder loses itself only, and
time and memory are limited from outside.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import re
import resource
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from shards.decode import DecodeError, DecoderStoppedError, DecodeSettings, Planes, SourceInfo

STOPPING = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a crash has other numbers
STOPPED = re.compile(r"^(\[\w+\] )*Exiting normally, received signal \d", re.M)  # no title: those are indented
MAX_WORDS = 1 << 16  # bytes of what ffmpeg says that are kept; a damaged file can make it say megabytes
PIPE = 1 << 20  # bytes; what an unprivileged process may ask for
MAX_ADDRESS_SPACE = 8 << 30  # bytes; an ffmpeg that wants more is decoding a file made to exhaust memory


@functools.cache
def ffmpeg_exe() -> str:
    """Path of the ffmpeg binary: the one in IMAGEIO_FFMPEG_EXE if set, the one that the package imageio-ffmpeg carries
    (so that two machines with the same packages make the same bytes), else PATH's."""
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())


@functools.cache
def ffmpeg_version() -> str:
    """First word after "version" in ffmpeg's banner, such as "5.1.9" or "9.0.2-static"."""
    banner = subprocess.run([ffmpeg_exe(), "-version"], capture_output=True, text=True, timeout=60, check=True).stdout
    return banner.split("version", 1)[1].split()[0]


@functools.cache
def passthrough() -> dict[str, str | int]:
    """The option that means "every frame once": -fps_mode from ffmpeg 5.1 on, -vsync before."""
    number = re.match(r"n?(\d+)\.(\d+)", ffmpeg_version())
    old = number is not None and (int(number[1]), int(number[2])) < (5, 1)
    return {"vsync": 0} if old else {"fps_mode": "passthrough"}


def ffmpeg_command(video: Path, settings: DecodeSettings) -> list[str]:
    """Argument list (never a shell string: 536 names of HMDB-51 hold shell characters) that writes planar YUV 4:2:0.

    Full range and BT.601 are what JPEG (JFIF) means by YUV; most sources are limited range, so the scaler converts.
    """
    import ffmpeg  # here: those who only read shards do without

    scale = f"scale={settings.width}:{settings.height}:flags={settings.scaler}"
    scale += ":interl=-1:out_range=full:out_color_matrix=bt601"  # interl: field by field where the source is so marked
    stream = ffmpeg.input(str(video.absolute()), threads=1, max_pixels=settings.max_pixels)
    to = passthrough() | {"threads": 1}  # of the copying of raw frames, too: threads for it cost more than it does
    output = ffmpeg.output(  # no stream is named: ffmpeg takes the best one, not a cover picture that comes first
        stream, "pipe:", an=None, vf=f"{scale},format=yuv420p", format="rawvideo", pix_fmt="yuv420p", **to
    )
    return output.global_args(
        "-filter_threads", "1", "-nostdin", "-hide_banner", "-loglevel", "level+info", "-nostats"
    ).compile(cmd=ffmpeg_exe())


class FFmpegDecoder:
    """shards.decode.Decoder over an ffmpeg process, which is killed past settings.timeout or MAX_ADDRESS_SPACE."""

    def __init__(self, video: Path, settings: DecodeSettings) -> None:
        self.video, self.settings = video, settings
        self.info: SourceInfo | None = None

    def __iter__(self) -> Iterator[Planes]:
        h, w = self.settings.height, self.settings.width
        frame_bytes = h * w * 3 // 2
        pixels = np.empty(frame_bytes, np.uint8)  # one frame's place, filled again and again
        frame, chroma = pixels.data, pixels[h * w :].reshape(2, h // 2, w // 2)
        planes = pixels[: h * w].reshape(h, w), chroma[0], chroma[1]
        count, overran = 0, threading.Event()
        with tempfile.TemporaryFile() as words_file:  # a pipe could fill up and block ffmpeg
            process = subprocess.Popen(
                ffmpeg_command(self.video, self.settings),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=words_file,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for the build, which ends its decoders itself
            )
            assert process.stdout is not None
            with contextlib.suppress(AttributeError, OSError):  # Linux; a frame is larger than a pipe's usual 64 kB
                fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, PIPE)
            if hasattr(resource, "prlimit"):  # Linux; the process may have ended already
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(process.pid, resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))

            def stop() -> None:
                overran.set()
                process.kill()

            watchdog = threading.Timer(self.settings.timeout, stop)
            watchdog.daemon = True
            watchdog.start()
            try:
                assert process.stdout is not None
                while (filled := _fill(process.stdout, frame)) == frame_bytes:
                    count += 1
                    yield planes
                code = process.wait()
            finally:
                watchdog.cancel()
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
            words_file.seek(0)
            words = _without_addresses(words_file.read(MAX_WORDS).decode("utf-8", "replace"))
        if overran.is_set():
            raise DecodeError(self.video, f"took longer than {self.settings.timeout:g} s", words)
        if -code in STOPPING or (code == 255 and re.search(STOPPED, words)):
            raise DecoderStoppedError(
                f"{self.video}: ffmpeg was stopped (signal {-code if code < 0 else 'from outside'}); if the machine is "
                f"short of memory use fewer --workers, then start again"
            )
        if code != 0 or count == 0 or filled:
            found = f"after {count} frames: " if count else ""
            raise DecodeError(self.video, found + _last_words(words), words)
        self.info = _source_info(words)
        if self.info is None:
            raise DecodeError(self.video, "ffmpeg names no video stream", words)


def _fill(pipe: IO[bytes], frame: memoryview) -> int:
    """Reads until `frame` is full or the pipe ends; how many bytes it got."""
    filled = 0
    while filled < len(frame):
        got = pipe.readinto(frame[filled:])  # type: ignore[attr-defined]  # of FileIO, which bufsize=0 gives
        if not got:
            break
        filled += got
    return filled


def _source_info(words: str) -> SourceInfo | None:
    """Reads ffmpeg's line about the video stream it took; imageio-ffmpeg carries no ffprobe to ask instead."""
    # "Stream #0:1 -> #0:0 (h264 (native) -> rawvideo ...)" says which; a title may hold anything, at another place
    mapped = re.search(r"^(?:\[info\] )?\s*Stream #(\d+:\d+) -> #0:0 ", words, re.M)
    place = re.escape(mapped[1]) if mapped else r"0:\d+"
    line = re.search(rf"^(?:\[info\] )?\s*Stream #{place}\b[^\n]*?: Video: (.*)", words, re.M)
    if line is None:
        return None
    codec = re.match(r"\w+", line[1])
    size = re.search(r", ([1-9]\d{0,4})x([1-9]\d{0,4})(?= \[|,|$)", line[1])
    rate = re.search(r"([\d.]+)(k?) (?:fps|tbr)", line[1])
    if codec is None or size is None:
        return None
    fps = _exact(float(rate[1]) * (1000 if rate[2] else 1)) if rate else 0.0
    fault = re.compile(r"(\[[^]]*\] )*\[(error|fatal|panic)\]")
    errors = [line for line in map(str.strip, words.splitlines()) if fault.match(line)]
    errors = [line for line in errors if not line.startswith(("[rawvideo]", "[out#"))]  # of our pipe's timestamps
    complaint = "" if not errors else errors[0] + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")
    return SourceInfo(codec=codec[0], width=int(size[1]), height=int(size[2]), fps=fps, errors=complaint)


def _exact(fps: float) -> float:
    """ffmpeg prints 30000/1001 as 29.97."""
    ntsc = round(fps) * 1000 / 1001
    return ntsc if abs(fps - ntsc) < 0.006 and abs(fps - round(fps)) > 0.006 else fps


def _without_addresses(words: str) -> str:
    """The same failure gives the same words in every run."""
    return re.sub(r" @ 0x[0-9a-f]+", "", words)


def _last_words(words: str) -> str:
    """The line of ffmpeg's output most likely to name the fault."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    too_large = [line for line in lines if "exceeds specified max pixel count" in line]
    if too_large:
        return re.sub(r"(\[[^]]*\] ?)+", "", too_large[0])
    fault = re.compile(r"invalid|error|corrupt|not found|could not|cannot|denied", re.IGNORECASE)
    faults = [line for line in lines if fault.search(line)]
    return re.sub(r"\[\w+\] ?", "", (faults or lines or ["ffmpeg said nothing"])[-1], count=1)
