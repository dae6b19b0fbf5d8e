"""The default decoder: one ffmpeg process a video, through ffmpeg-python, raw planes over a pipe.

A process of its own is worth its start (20 to 90 ms): a file that crashes or hangs the decoder loses itself only, and
time and memory are limited from outside.
"""

from __future__ import annotations

import contextlib
import functools
import re
import resource
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import ffmpeg
import numpy as np

from shards.decode import DecodeError, DecodeSettings, Planes, SourceInfo

MAX_ADDRESS_SPACE = 8 << 30  # bytes; an ffmpeg that wants more is decoding a file made to exhaust memory


@functools.cache
def ffmpeg_exe() -> str:
    """Path of the ffmpeg binary: PATH's own, else the one that the package imageio-ffmpeg carries."""
    found = shutil.which("ffmpeg")
    if found:
        return found
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


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
    stream = ffmpeg.input(str(video.absolute()), threads=1, max_pixels=settings.max_pixels).video
    stream = stream.filter(
        "scale", settings.width, settings.height, flags=settings.scaler, out_range="full", out_color_matrix="bt601"
    ).filter("format", "yuv420p")
    output = ffmpeg.output(stream, "pipe:", format="rawvideo", pix_fmt="yuv420p", **passthrough())
    return output.global_args("-nostdin", "-hide_banner", "-loglevel", "level+info", "-nostats").compile(
        cmd=ffmpeg_exe()
    )


class FFmpegDecoder:
    """shards.decode.Decoder over an ffmpeg process, which is killed past settings.timeout or MAX_ADDRESS_SPACE."""

    def __init__(self, video: Path, settings: DecodeSettings) -> None:
        self.video, self.settings = video, settings
        self.info: SourceInfo | None = None

    def __iter__(self) -> Iterator[Planes]:
        h, w = self.settings.height, self.settings.width
        frame_bytes = h * w * 3 // 2
        count, overran = 0, threading.Event()
        with tempfile.TemporaryFile() as words_file:  # a pipe could fill up and block ffmpeg
            process = subprocess.Popen(
                ffmpeg_command(self.video, self.settings),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=words_file,
            )
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
                while len(raw := process.stdout.read(frame_bytes)) == frame_bytes:
                    planes = np.frombuffer(raw, np.uint8)
                    y, chroma = planes[: h * w].reshape(h, w), planes[h * w :].reshape(2, h // 2, w // 2)
                    count += 1
                    yield y, chroma[0], chroma[1]
                code = process.wait()
            finally:
                watchdog.cancel()
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
            words_file.seek(0)
            words = words_file.read().decode("utf-8", "replace")
        if overran.is_set():
            raise DecodeError(self.video, f"took longer than {self.settings.timeout:g} s", words)
        if code != 0 or count == 0 or raw:
            found = f"after {count} frames: " if count else ""
            raise DecodeError(self.video, found + _last_words(words), words)
        self.info = _source_info(words)
        if self.info is None:
            raise DecodeError(self.video, "ffmpeg names no video stream", words)


def _source_info(words: str) -> SourceInfo | None:
    """Reads ffmpeg's line about the first input video stream; imageio-ffmpeg carries no ffprobe to ask instead."""
    line = re.search(r"Stream #0:\d+.*?: Video: (.*)", words)
    if line is None:
        return None
    codec = re.match(r"\w+", line[1])
    size = re.search(r"[ ,](\d{1,5})x(\d{1,5})\b", line[1])
    rate = re.search(r"([\d.]+)(k?) (?:fps|tbr)", line[1])
    if codec is None or size is None:
        return None
    fps = float(rate[1]) * (1000 if rate[2] else 1) if rate else 0.0
    fault = re.compile(r"(\[[^]]*\] )*\[(error|fatal|panic)\]")
    errors = [re.sub(r" @ 0x[0-9a-f]+", "", text.strip()) for text in words.splitlines() if fault.match(text)]
    complaint = "" if not errors else errors[0] + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")
    return SourceInfo(codec=codec[0], width=int(size[1]), height=int(size[2]), fps=fps, errors=complaint)


def _last_words(words: str) -> str:
    """The line of ffmpeg's output most likely to name the fault."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    fault = re.compile(r"invalid|error|corrupt|not found|could not|cannot|failed|denied", re.IGNORECASE)
    faults = [line for line in lines if fault.search(line)]
    return re.sub(r"\[\w+\] ?", "", (faults or lines or ["ffmpeg said nothing"])[-1], count=1)
